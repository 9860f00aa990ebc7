"""The method against closed forms and definitions."""

import pytest
import torch

from papers._template import Network, bench


def test_parameters_closed_form():
    convolutions = 9 * 3 * 16 + 9 * 16 * 32
    for norm, per_channel in ((True, 2), (False, 1)):
        model = Network(16, norm=norm)
        assert sum(p.numel() for p in model.parameters()) == convolutions + per_channel * 48 + 33 * 10


def test_an_image_depends_on_its_batch_through_the_norm_alone():
    x = torch.randn(4, 3, 8, 8)
    for norm in (True, False):
        model = Network(4, norm=norm)
        assert torch.allclose(model(x)[:2], model(x[:2]), atol=1e-6) != norm


def test_wrong_input_is_refused():
    with pytest.raises(ValueError, match="expected \\(N, 3, H, W\\)"):
        Network()(torch.zeros(2, 1, 8, 8))
    with pytest.raises(ValueError, match="width=0"):
        Network(0)


def test_bench_runs():
    """Smoke test; the numbers are the step experiment's business."""
    found = bench.step_bench(batch=2, rounds=1)
    assert set(found) == {"plain_ms", "norm_ms", "norm_time"}
    assert min(found.values()) > 0

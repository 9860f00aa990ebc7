"""The method against closed forms and definitions."""

import pytest
import torch

from papers._template.model import Network


def test_parameters_closed_form():
    assert sum(p.numel() for p in Network(16).parameters()) == 9 * 16 + 2 * 16 + 16 * 64 * 10 + 10


def test_wrong_shape_is_refused():
    with pytest.raises(ValueError, match="expected \\(N, 1, 8, 8\\)"):
        Network()(torch.zeros(2, 3, 8, 8))

"""The engine against running every exit and choosing: same exits, same logits, and nothing computed for who has left."""

import pytest
import torch
from torch import nn

from common.metrics.early_exit import confidence, exit_fractions, exits_taken, thresholds
from papers.msdnet_training import IMTA, CollaborativeHeads, MSDNet, msdnet_cifar
from papers.msdnet_training.engine import AdaptiveEngine, for_inference, in_chunks

CIFAR = {"stem": "cifar", "channels": 4, "growth": 2, "growth_factor": (1, 2, 4), "bottleneck_factor": (1, 2, 4)}
NETWORKS = {
    "lin_grow": {"exits": 4, "base": 1, "step": 1, "step_mode": "lin_grow"},
    "even": {"exits": 5, "base": 2, "step": 1},
    "two scales to the end": {"exits": 2, "base": 2, "step": 2},
    "one scale": {"exits": 3, "base": 1, "step": 1, "growth_factor": (2,), "bottleneck_factor": (2,)},
}


def network(kind="lin_grow", imta=False, **changes) -> nn.Module:
    """Eval mode, with batch norms that do something and confidences that differ between samples."""
    torch.manual_seed(0)
    model = MSDNet(classes=6, **{**CIFAR, **NETWORKS[kind], **changes})
    if imta:
        model = IMTA(model, CollaborativeHeads(model.feature_dims, 6))
    for module in model.modules():
        if isinstance(module, nn.BatchNorm1d | nn.BatchNorm2d):
            module.running_mean.normal_(0, 0.2)
            module.running_var.uniform_(0.2, 1)
            nn.init.uniform_(module.weight, 0.5, 1.5)
            nn.init.normal_(module.bias, 0, 0.2)
    return model.eval()


@torch.no_grad()
def every_exit(model, images):
    """Logits (N, k, classes) of the untouched model, and thresholds half-way between confidences, so that rounding
    decides nothing."""
    logits = torch.stack(model(images), dim=1)
    scores = confidence(logits)
    bounds = thresholds(scores, exit_fractions(1.0, model.num_exits))
    below = torch.where(scores < bounds, scores, -torch.inf).amax(0)
    return logits, torch.where(below.isfinite() & bounds.isfinite(), (bounds + below) / 2, bounds)


def assert_same(engine, images, logits, bounds):
    found, exits = engine(images)
    expected = exits_taken(confidence(logits), bounds)
    assert torch.equal(exits, expected)
    torch.testing.assert_close(found, logits[torch.arange(len(images)), expected], rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("imta", [False, True], ids=["MSDNet", "IMTA"])
@pytest.mark.parametrize("kind", NETWORKS)
def test_equals_running_every_exit_and_choosing(kind, imta):
    """For chunks of one sample, of a few (several wait in the queues) and the whole batch; the second call like the first."""
    model, images = network(kind, imta), torch.randn(45, 3, 32, 32)
    logits, bounds = every_exit(model, images)
    assert exits_taken(confidence(logits), bounds).unique().numel() == model.num_exits
    for chunk in (1, 16, 45):
        engine = AdaptiveEngine(model, bounds, chunk)
        assert_same(engine, images, logits, bounds)
        assert_same(engine, images[:20], logits[:20], bounds)
        assert_same(engine, images[:1], logits[:1], bounds)
        assert_same(engine, images[:0], logits[:0], bounds)


def test_all_leave_at_each_exit():
    """All at the first, all at the second, ..., none before the last: then no sample is copied."""
    model, images = network("even"), torch.randn(24, 3, 32, 32)
    logits, _ = every_exit(model, images)
    for t in range(5):
        bounds = torch.full((5,), torch.inf)
        bounds[t] = 0.0
        engine = AdaptiveEngine(model, bounds, chunk=16)
        assert_same(engine, images, logits, bounds)
        assert engine.samples_run == [24] * (t + 1) + [0] * (4 - t)
        assert all(not queue.buffers for queue in engine.queues)


def test_another_image_size():
    """The queues follow."""
    model = network()
    for size in (32, 48, 32):
        images = torch.randn(20, 3, size, size)
        logits, bounds = every_exit(model, images)
        engine = AdaptiveEngine(model, bounds, chunk=8)
        assert_same(engine, images, logits, bounds)
    engine = AdaptiveEngine(model, torch.tensor([0.3, 0.3, 0.3, 0.3]), chunk=8)
    for size in (32, 48):
        images = torch.randn(20, 3, size, size)
        assert_same(engine, images, every_exit(model, images)[0], torch.tensor([0.3, 0.3, 0.3, 0.3]))


@pytest.mark.parametrize("chunk", [4, 32, 40])
def test_nothing_is_computed_for_a_sample_that_has_left(chunk):
    """Batch sizes that every convolution really sees: block i and exit i, the samples still there; the finer scales that
    an exit does not read, those that stay after it."""
    model, images = network(), torch.randn(40, 3, 32, 32)
    logits, bounds = every_exit(model, images)
    taken = exits_taken(confidence(logits), bounds)
    there = [int((taken >= i).sum()) for i in range(5)]  # at block i; 0 after the last
    assert there[0] == 40
    assert there[-2] < 15
    engine, seen = AdaptiveEngine(model, bounds, chunk), {}

    def count(module, inputs):
        seen[module] = seen.get(module, 0) + len(inputs[0])

    def watch(part):
        convs = [m for m in part.modules() if isinstance(m, nn.Conv2d)]
        for conv in convs:
            conv.register_forward_pre_hook(count)
        return convs

    parts = []
    for i, stage in enumerate(engine.stages):
        now = [*watch(stage.body), *watch(engine.model.exits[i]), *(watch(stage.coarsest) if stage.parted else [])]
        parts += [(conv, there[i]) for conv in now]
        parts += [(conv, there[i + 1]) for conv in (watch(stage.finer) if stage.parted else [])]
    engine(images)
    assert sum(stage.parted for stage in engine.stages) >= 2
    assert [seen.get(conv, 0) for conv, _ in parts] == [n for _, n in parts]
    assert engine.samples_run == there[:4]


def test_an_interrupted_call_leaves_nothing_behind():
    model, images = network(), torch.randn(40, 3, 32, 32)
    logits, bounds = every_exit(model, images)
    engine = AdaptiveEngine(model, bounds, chunk=16)

    def interrupt(_module, _inputs):
        raise KeyboardInterrupt

    hook = engine.model.exits[3].register_forward_pre_hook(interrupt)
    with pytest.raises(KeyboardInterrupt):
        engine(images)
    assert any(queue.filled for queue in engine.queues)
    hook.remove()
    assert_same(engine, images, logits, bounds)


def test_model_is_left_as_it_is():
    model = network().train()
    before = {name: x.clone() for name, x in model.state_dict().items()}
    engine = AdaptiveEngine(model, torch.zeros(4))
    engine(torch.randn(2, 3, 32, 32))
    assert model.training
    assert all(torch.equal(x, before[name]) for name, x in model.state_dict().items())
    assert all(p.requires_grad for p in model.parameters())


@pytest.mark.parametrize("imta", [False, True], ids=["MSDNet", "IMTA"])
def test_for_inference(imta):
    """Same logits without any batch norm, whole or in chunks."""
    model, images = network(imta=imta), torch.randn(10, 3, 32, 32)
    fast = for_inference(model)
    assert not any(isinstance(m, nn.BatchNorm1d | nn.BatchNorm2d) for m in fast.modules())
    logits, _ = every_exit(model, images)
    for found in (fast(images), in_chunks(fast, images, 4)):
        torch.testing.assert_close(torch.stack(found, dim=1), logits, rtol=1e-4, atol=1e-5)


def test_imagenet_stem_folds_too():
    torch.manual_seed(0)
    model = MSDNet(exits=2, base=2, step=2, channels=4, growth=2, classes=6).eval()
    model.blocks[0][0].scales[0][1].running_mean.normal_()
    images = torch.randn(3, 3, 64, 64)
    logits, bounds = every_exit(model, images)
    assert_same(AdaptiveEngine(model, bounds, 2), images, logits, bounds)


def test_not_a_number_goes_to_the_last_exit():
    """As in exits_taken: no threshold is reached, no sample is lost."""
    images = torch.randn(3, 3, 32, 32)
    images[1] = torch.nan
    logits, exits = AdaptiveEngine(network(), torch.zeros(4))(images)
    assert exits.tolist() == [0, 3, 0]
    assert logits.isnan().any(1).tolist() == [False, True, False]


def test_bad_input():
    model = network()
    for bad in (torch.zeros(3), torch.zeros(4, 1), torch.tensor([0.5, torch.nan, 0.5, 0.5])):
        with pytest.raises(ValueError, match="one number for each of 4 exits"):
            AdaptiveEngine(model, bad)
    with pytest.raises(ValueError, match="chunk=0"):
        AdaptiveEngine(model, torch.zeros(4), chunk=0)
    for shape in ((3, 32, 32), (2, 1, 32, 32)):
        with pytest.raises(ValueError, match=r"expected \(N, 3, H, W\)"):
            AdaptiveEngine(model, torch.zeros(4))(torch.zeros(shape))


def test_paper_network_has_nothing_else_to_skip():
    """One scale is left at the end of the CIFAR networks: the last layers compute nothing that no exit reads."""
    with torch.device("meta"):
        for model in (msdnet_cifar(), msdnet_cifar(5, "lin_grow")):
            assert len(model.blocks[-1][-1].scales) == 1

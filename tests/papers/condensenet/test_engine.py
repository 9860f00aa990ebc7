"""The engine computes what the condensed layers compute, for every shape of network, image and batch."""

import re
import threading

import pytest
import torch
from torch import nn

from papers.condensenet import bench, engine
from papers.condensenet.conversion import condense
from papers.condensenet.engine import FastCondenseNet, clamp, fold, pool_step
from papers.condensenet.model import CondenseNet, densenet_bc


def trained(G=4, C=4, *, G3=4, blocks=(2, 2, 2), growth=(8, 16, 32), **options):
    """Fully pruned, in eval mode; batch norms with scales of both signs, zero and tiny ones, and large shifts."""
    torch.manual_seed(0)
    model = CondenseNet(blocks, growth, G, C, G3, **options)
    for m in model.modules():
        if isinstance(m, nn.BatchNorm2d):
            m.weight.data.normal_(1, 0.7)
            m.weight.data[::7] = 0
            m.weight.data[3::11] = 1e-30
            m.weight.data[4::11] = -1e-6
            m.bias.data.normal_(0, 0.5)
            m.bias.data[5::13] = 0
            m.running_mean.normal_(0, 0.5)
            m.running_var.uniform_(0.01, 2)
    model.prune(0.5)
    return model.eval()


def images(*shape):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(1))


def assert_equal(fast, model, x):
    """To 1e-5 of the largest logit, and to 1e-3 of how much the logits of two images differ."""
    with torch.no_grad():
        got, expected = fast(x), model(x)
    assert got.shape == expected.shape
    assert (got - expected).abs().max() <= 1e-5 * expected.abs().max()
    if len(x) > 1:
        assert (got - expected).abs().max() <= 1e-3 * (expected - expected[0]).abs().max()


# ------------------------------------------------------------------------------------------------ pieces
def test_clamp_and_fold_are_relu_of_an_affine_map():
    a = torch.tensor([2.0, 0.5, -1, -3, 0, 0, 0, 1e-30, -1e-30, 1e-40, -1e-40, 1e-8], dtype=torch.float64)
    b = torch.tensor([1.0, -4, 2, -0.5, 3, -3, 0, 2, 2, -2, -2, -1e-8], dtype=torch.float64)
    x = torch.linspace(-5, 5, 101).expand(len(a), -1)
    folded = fold(a, b, torch.eye(len(a))[None])
    clamped = torch.empty_like(x)
    clamp(folded, x, clamped)
    expected = (a[:, None] * x + b[:, None]).relu()
    torch.testing.assert_close(folded.bias[0] + folded.weight[0] @ clamped, expected.float(), rtol=1e-6, atol=1e-6)


def test_no_minimum_and_no_gather_where_none_is_needed():
    ones, order = torch.ones(4, dtype=torch.float64), torch.arange(4)
    plain = fold(ones, ones, torch.ones(2, 3, 2), order)
    assert plain.index is None
    assert plain.upper is None
    other = fold(-ones, ones, torch.ones(2, 3, 2), order.flip(0))
    assert other.index.tolist() == [3, 2, 1, 0]
    assert other.upper.flatten().tolist() == [1] * 4


def test_pool_is_the_average_pool_and_drops_odd_edges():
    x = images(3, 5, 7, 2)
    out = torch.empty(3, 2, 3, 2)
    pool_step(x, out)()
    expected = nn.functional.avg_pool2d(x.permute(3, 0, 1, 2), 2).permute(1, 2, 3, 0)
    torch.testing.assert_close(out, expected)


# ------------------------------------------------------------------------------------------------ networks
@pytest.mark.parametrize(("G", "C", "G3"), [(4, 4, 4), (4, 2, 4), (4, 8, 2), (8, 4, 8), (2, 4, 1), (1, 1, 4)], ids=str)
def test_groups(G, C, G3):
    model = trained(G, C, G3=G3)
    assert_equal(FastCondenseNet(model), model, images(3, 3, 16, 16))


@pytest.mark.parametrize(
    "options",
    [
        {"conv": "static"},
        {"conv": "dense"},
        {"reduction": 0.5},
        {"growth": (8, 8, 8), "reduction": 0.5, "blocks": (1, 3, 1)},
        {"stem_stride": 2, "blocks": (1, 2, 1, 1, 1), "growth": (8, 16, 32, 64, 128), "classes": 20},
        {"blocks": (3,), "growth": (8,), "dropout": 0.5},
    ],
    ids=str,
)
def test_other_networks(options):
    model = trained(**options)
    assert_equal(FastCondenseNet(model), model, images(2, 3, 35, 33))


def test_densenet():
    torch.manual_seed(0)
    model = densenet_bc(22).eval()
    assert_equal(FastCondenseNet(model), model, images(2, 3, 8, 8))


def test_condensed_model_with_half_a_classifier():
    model = condense(trained())
    assert_equal(FastCondenseNet(model), model, images(3, 3, 16, 16))


@pytest.mark.parametrize("threads", [1, 2, 3])
@pytest.mark.parametrize("pixels", [256, 1024, 10**6])
def test_batches_and_chunks(threads, pixels, monkeypatch):
    monkeypatch.setattr(engine, "CHUNK_PIXELS", pixels)
    model = trained(blocks=(1, 1, 1))
    fast = FastCondenseNet(model, threads=threads)
    for n in (1, 3, 64, 7, 1):
        assert_equal(fast, model, images(n, 3, 16, 16))


@pytest.mark.parametrize("size", [(32, 32), (12, 20), (9, 23), (4, 4), (5, 64)], ids=str)
def test_sizes(size):
    model = trained()
    assert_equal(FastCondenseNet(model), model, images(3, 3, *size))


def test_images_of_many_sizes_do_not_pile_up_buffers():
    model = trained(blocks=(1, 1, 1))
    fast = FastCondenseNet(model)
    for size in range(8, 28):
        assert_equal(fast, model, images(1, 3, size, 8))
    assert len(fast.plans) <= 9


def test_layouts_of_the_images():
    model = trained()
    fast, x = FastCondenseNet(model), images(4, 3, 16, 16)
    for view in (x.contiguous(memory_format=torch.channels_last), x.flip(3)[..., ::2], x[1:3]):
        assert_equal(fast, model, view)


# ------------------------------------------------------------------------------------------------ behaviour
def test_calls_leave_nothing_behind():
    fast = FastCondenseNet(trained())
    x, y = images(3, 3, 16, 16), 1e3 * images(3, 3, 16, 16)
    first = fast(x)
    kept = first.clone()
    fast(y)
    assert first.equal(kept)  # not a view of a buffer
    assert fast(x).equal(kept)


def test_result_can_meet_autograd():
    logits = FastCondenseNet(trained())(images(2, 3, 8, 8))
    weight = torch.ones(10, requires_grad=True)
    (logits * weight).sum().backward()
    torch.testing.assert_close(weight.grad, logits.sum(0))


def test_snapshot_of_the_weights():
    model, x = trained(), images(2, 3, 8, 8)
    fast = FastCondenseNet(model)
    before = fast(x)
    state = {k: v.clone() for k, v in model.state_dict().items() if isinstance(v, torch.Tensor)}
    with torch.no_grad():
        for v in (*model.parameters(), *model.buffers()):
            v.zero_()
    assert fast(x).equal(before)
    model.load_state_dict(state, strict=False)
    assert FastCondenseNet(model)(x).equal(before)


def test_training_mode_of_the_model_does_not_matter():
    model, x = trained(dropout=0.5), images(2, 3, 8, 8)
    assert FastCondenseNet(model.train())(x).equal(FastCondenseNet(model.eval())(x))


def test_calls_from_several_threads():
    fast = FastCondenseNet(trained(), threads=2)
    batches = [i * images(5, 3, 16, 16) for i in range(1, 5)]
    expected = [fast(x) for x in batches]
    wrong = []

    def caller(x, logits):
        wrong.extend(1 for _ in range(10) if not fast(x).equal(logits))

    callers = [threading.Thread(target=caller, args=pair) for pair in zip(batches, expected, strict=True)]
    for t in callers:
        t.start()
    for t in callers:
        t.join()
    assert not wrong


def test_thread_settings_stay():
    before = torch.get_num_threads()
    try:
        torch.set_num_threads(3)
        fast = FastCondenseNet(trained(blocks=(1, 1, 1)))
        assert fast.threads == 3
        fast(images(6, 3, 8, 8))
        seen = [torch.get_num_threads()]
        new = threading.Thread(target=lambda: seen.append(torch.get_num_threads()))
        new.start()
        new.join()
        assert seen == [3, 3]
        assert fast.pool.submit(torch.get_num_threads).result() == 1
    finally:
        torch.set_num_threads(before)


@pytest.mark.parametrize(
    ("x", "message"),
    [
        (torch.zeros(1, 4, 8, 8), "expected (N, 3, H, W)"),
        (torch.zeros(3, 8, 8), "expected (N, 3, H, W)"),
        (torch.zeros(0, 3, 8, 8), "N at least 1"),
        (torch.zeros(1, 3, 8, 3), "H and W at least 4"),
        (torch.zeros(1, 3, 8, 8, dtype=torch.float64), "expected float32 on the CPU"),
        (torch.zeros(1, 3, 8, 8, device="meta"), "expected float32 on the CPU"),
        (torch.zeros(1, 3, 8, 8, requires_grad=True), "no backward"),
    ],
    ids=["channels", "dims", "empty", "small", "float64", "device", "grad"],
)
def test_bad_images(x, message):
    fast = FastCondenseNet(trained(blocks=(1, 1, 1)))
    with pytest.raises(ValueError, match=re.escape(message)):
        fast(x)


def test_bad_models():
    with pytest.raises(ValueError, match="condensing stages"):
        FastCondenseNet(CondenseNet((1, 1), (8, 8)))
    with pytest.raises(ValueError, match="float32 model on the CPU"):
        FastCondenseNet(trained().double())
    with pytest.raises(ValueError, match="threads=0"):
        FastCondenseNet(trained(), threads=0)


# ------------------------------------------------------------------------------------------------ bench
def test_speed_bench(monkeypatch):
    rows = bench.speed_bench(batch=2, rounds=1, depth=8, which=("dense", "dense_last", "layers", "engine", "static"))
    assert list(rows) == ["dense", "dense_last", "layers", "engine", "static"]
    assert max(rows["dense"]["speedup"], rows["dense_last"]["speedup"]) == 1
    assert rows["layers"]["theory"] == rows["engine"]["theory"] == rows["static"]["theory"] > 1
    assert "in the engine" in bench.table(rows, 2)
    with pytest.raises(ValueError, match="dense_last"):
        bench.speed_bench(which=("engine",))
    monkeypatch.setattr(bench, "FastCondenseNet", lambda net: lambda x: 1.001 * net(x))
    with pytest.raises(RuntimeError, match="engine differs"):
        bench.speed_bench(batch=1, rounds=1, depth=8, which=("dense", "dense_last", "engine"))

"""The supernet: the official code's counts, and the shared cell against the plain one."""

import copy

import pytest
import torch
import torch.nn.functional as F
from torch.utils.flop_counter import FlopCounterMode

from papers.pc_darts import SuperNet, supernet_weights
from papers.pc_darts.bench import saved_mib, search_step_bench, table
from papers.pc_darts.reference import MixedOp, channel_shuffle

WEIGHTS = {1: 1_930_618, 2: 671_482, 4: 299_578}


@pytest.mark.parametrize("K", [1, 2, 4, 8])
@pytest.mark.parametrize("cell", ["plain", "shared"])
def test_number_of_weights(K, cell):
    with torch.device("meta"):
        count = sum(p.numel() for p in SuperNet(K=K, cell=cell).parameters())
    assert count == supernet_weights(K=K) == WEIGHTS.get(K, count)
    with torch.device("meta"):
        small = SuperNet(C=16, num_classes=100, layers=5, K=K, cell=cell)
    assert sum(p.numel() for p in small.parameters()) == supernet_weights(16, K, 5, 100)


@pytest.mark.parametrize(("K", "expected"), [(1, 300_253_184), (2, 115_269_632), (4, 56_594_432)])
def test_convolution_multiply_adds(K, expected):
    with torch.device("meta"):
        model = SuperNet(K=K, cell="plain")
    with FlopCounterMode(display=False) as counter, torch.no_grad():
        model(torch.zeros(1, 3, 32, 32, device="meta"))
    assert counter.get_flop_counts()["Global"][torch.ops.aten.convolution] // 2 == expected


@pytest.mark.parametrize(
    ("K", "edge_norm", "expected"), [(1, False, 119.79), (1, True, 123.51), (2, True, 66.55), (4, True, 38.07)]
)
def test_saved_memory(K, edge_norm, expected):
    """MiB that autograd keeps per image: the plain cell as measured on the official code, the shared one far below."""
    plain = saved_mib(SuperNet(K=K, edge_norm=edge_norm, cell="plain"), 2)
    assert plain == pytest.approx(expected, rel=0.01)
    assert saved_mib(SuperNet(K=K, edge_norm=edge_norm), 2) < 0.5 * plain


def test_saved_memory_ratio_of_partial_channels():
    """K=1 against K=4, bytes of one more image: 3.24 for the plain cell, 3.22 for the shared."""
    for cell, expected in (("plain", 3.24), ("shared", 3.22)):
        models = [SuperNet(K=K, cell=cell) for K in (1, 4)]
        more = [4 * saved_mib(m, 4) - 2 * saved_mib(m, 2) for m in models]
        assert more[0] / more[1] == pytest.approx(expected, rel=0.005)


def test_shuffle():
    x = torch.arange(16.0).view(1, 16, 1, 1)
    assert channel_shuffle(x, 4).flatten().tolist() == [0, 4, 8, 12, 1, 5, 9, 13, 2, 6, 10, 14, 3, 7, 11, 15]
    assert torch.equal(channel_shuffle(x, 1), x)
    with pytest.raises(ValueError, match="cannot shuffle 16 channels in 3 groups"):
        channel_shuffle(x, 3)


def test_bypass_channels_never_reach_the_mixture():
    torch.manual_seed(0)
    op, weights = MixedOp(8, 1, 4), torch.rand(8).softmax(0)
    x = torch.randn(2, 8, 4, 4)
    permuted = torch.cat([x[:, :2], x[:, [7, 2, 5, 3, 6, 4]]], dim=1)
    out, out_permuted = op(x, weights), op(permuted, weights)
    mixed = torch.arange(8) % 4 == 0  # the mixed channels land at multiples of K
    assert torch.equal(out[:, mixed], out_permuted[:, mixed])
    assert torch.equal(channel_shuffle(x, 4)[:, ~mixed], out[:, ~mixed])  # the others are copies


def randomised(dtype=torch.float64, **kwargs) -> tuple[SuperNet, SuperNet]:
    """A plain supernet with random architecture and its shared twin."""
    plain = SuperNet(**kwargs, cell="plain").to(dtype)
    with torch.no_grad():
        for a in plain.arch_parameters():
            a.normal_()
    shared = SuperNet(**kwargs).to(dtype)
    shared.load_plain(plain)
    return plain, shared


def difference(a: torch.Tensor, b: torch.Tensor) -> float:
    return ((a - b).abs().max() / b.abs().max().clamp(min=1e-12)).item() if a.numel() else 0.0


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
@pytest.mark.parametrize(
    "kwargs",
    [
        {"K": 1},
        {"K": 2},
        {"K": 4},
        {"K": 4, "edge_norm": False},
        {"K": 1, "edge_norm": False},
        {"K": 2, "stem": "imagenet"},
    ],
    ids=str,
)
def test_shared_equals_plain(kwargs, dtype):
    """Logits, gradients of weights, alphas, betas and images, running statistics, evaluation mode."""
    torch.manual_seed(5)  # float32: no value within rounding of a ReLU's or a max's kink, where a gradient may jump
    tolerance = 1e-10 if dtype == torch.float64 else 1e-5
    plain, shared = randomised(dtype, C=8, layers=4, **kwargs)
    size = 64 if kwargs.get("stem") == "imagenet" else 12
    x, y = torch.randn(6, 3, size, size, dtype=dtype).requires_grad_(), torch.randint(10, (6,))
    found = {}
    for name, model in (("plain", plain), ("shared", shared)):
        logits = model(x)
        arch = model.arch_parameters()
        inputs = [x, *arch, *model.parameters()]
        grads = torch.autograd.grad(F.cross_entropy(logits, y), inputs)
        found[name] = (logits, *grads[: 1 + len(arch)]), grads[1 + len(arch) :]
    for a, b in zip(found["shared"][0], found["plain"][0], strict=True):
        assert difference(a, b) < tolerance
    carrier = copy.deepcopy(plain)  # weight gradients travel through the converter, like weights
    with torch.no_grad():
        for p, g in zip(carrier.parameters(), found["plain"][1], strict=True):
            p.copy_(g)
    expected = copy.deepcopy(shared)
    expected.load_plain(carrier)
    largest = max(g.abs().max() for g in found["plain"][1])
    for g, p in zip(found["shared"][1], expected.parameters(), strict=True):
        assert (g - p).abs().max() < tolerance * largest
    expected.load_plain(plain)  # after the same training forward
    for (name, a), b in zip(shared.named_buffers(), expected.buffers(), strict=True):
        assert difference(a.to(dtype), b.to(dtype)) < tolerance, name
    with torch.no_grad():
        assert difference(shared.eval()(x), plain.eval()(x)) < tolerance


def test_gradients_by_finite_differences():
    torch.manual_seed(0)
    model = randomised(C=4, layers=1, K=2, num_classes=2)[1]
    x = torch.randn(2, 3, 4, 4, dtype=torch.float64)
    arch = model.arch_parameters()

    def loss(*_):
        return model(x).square().sum()

    assert torch.autograd.gradcheck(loss, arch[1::2], fast_mode=True, eps=1e-7, atol=1e-5)  # cell 0 reduces


def test_architecture_is_saved_but_no_weight():
    model = SuperNet(C=4, layers=2, K=2)
    names = ["alphas_normal", "alphas_reduce", "betas_normal", "betas_reduce"]
    arch = model.arch_parameters()
    assert [tuple(a.shape) for a in arch] == [(14, 8), (14, 8), (14,), (14,)]
    assert sum(a.numel() for a in arch) == 252
    assert all(a.is_leaf and a.requires_grad and a.std() < 3e-3 for a in arch)
    assert not {id(a) for a in arch} & {id(p) for p in model.parameters()}
    assert set(names) <= set(model.state_dict())
    assert len(SuperNet(C=4, layers=2, K=2, edge_norm=False).arch_parameters()) == 2
    model.double()
    assert all(
        a is b and a.dtype == torch.float64 and a.is_leaf for a, b in zip(arch, model.arch_parameters(), strict=True)
    )
    other = SuperNet(C=4, layers=2, K=2).double()
    other.load_state_dict(model.state_dict())
    assert all(torch.equal(a, b) for a, b in zip(arch, other.arch_parameters(), strict=True))
    assert other.genotype() == model.genotype()


def test_a_step_moves_only_what_it_should():
    torch.manual_seed(0)
    model = SuperNet(C=4, layers=3, K=2)
    x, y = torch.randn(4, 3, 8, 8), torch.randint(10, (4,))
    before = copy.deepcopy(model.state_dict())
    arch = model.arch_parameters()
    adam = torch.optim.Adam(arch, lr=6e-4, betas=(0.5, 0.999), weight_decay=1e-3)
    for a, g in zip(arch, torch.autograd.grad(F.cross_entropy(model(x), y), arch), strict=True):
        a.grad = g
    adam.step()
    assert all(not torch.equal(before[n], model.state_dict()[n]) for n in before if n.startswith(("alpha", "beta")))
    assert all(torch.equal(before[n], p) for n, p in model.named_parameters())
    assert all(p.grad is None for p in model.parameters())


def test_autocast_is_close():
    torch.manual_seed(0)
    model = SuperNet(C=8, layers=3, K=4)
    x = torch.randn(8, 3, 16, 16)
    expected = model(x)
    with torch.autocast("cpu", torch.bfloat16):
        out = model(x)
    assert (out - expected).abs().max() < 0.1 * expected.abs().max()
    out.sum().backward()


def test_bench_runs_and_prints():
    """Smoke test of the bench; its numbers are the search-step experiment's business."""
    found = search_step_bench(C=8, layers=3, batch=2, size=8, rounds=2)
    assert {name: len(time.ratios) for name, time in found.items()} == {"plain_k4": 2, "shared_k4": 2, "shared_k1": 2}
    assert "shared_k1" in table(found, {"plain_k4": 38.07}, 2)
    with pytest.raises(ValueError, match="rounds=0"):
        search_step_bench(rounds=0)


@pytest.mark.parametrize(
    ("kwargs", "message"),
    [
        ({"K": 3}, "C=16, K=3"),
        ({"K": 0}, "C=16, K=0"),
        ({"K": 16}, "even number of channels"),
        ({"layers": 0}, "layers=0"),
        ({"stem": "mnist"}, "unknown stem 'mnist'"),
        ({"cell": "fast"}, "unknown cell 'fast'"),
    ],
)
def test_bad_arguments(kwargs, message):
    with pytest.raises(ValueError, match=message):
        SuperNet(**kwargs)


@pytest.mark.parametrize(
    ("stem", "shape"),
    [("cifar", (1, 3, 30, 32)), ("cifar", (1, 1, 32, 32)), ("cifar", (3, 32, 32)), ("imagenet", (1, 3, 48, 48))],
)
def test_bad_images(stem, shape):
    with pytest.raises(ValueError, match="images of shape"):
        SuperNet(C=4, K=2, layers=2, stem=stem)(torch.zeros(shape))

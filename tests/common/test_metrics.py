import threading
import time

import pytest
import torch
from torch import nn
from torch.utils.checkpoint import checkpoint

from common.errors import UserError
from common.metrics.accuracy import accuracies, evaluating, topk_correct
from common.metrics.compute import element_ops, latency, mult_adds, parameters, peak_memory, saved_bytes
from common.runtime import World

WORLD = World(0, 1, torch.device("cpu"))


# ------------------------------------------------------------------------------------------------ accuracy
def test_topk_by_hand():
    logits = torch.tensor([[3.0, 2, 1], [1, 3, 2], [1, 2, 3]])
    labels = torch.tensor([0, 2, 0])  # ranks 0, 1, 2
    assert topk_correct(logits, labels, (1, 2, 3)).tolist() == [1, 2, 3]
    halves = [(logits[:2], labels[:2]), (logits[2:], labels[2:])]
    assert accuracies(halves, WORLD, (1, 2, 3)).tolist() == pytest.approx([100 / 3, 200 / 3, 100])
    right = nn.functional.one_hot(labels, 3)
    exits = torch.stack([logits, right, -right])
    assert accuracies([(exits, labels)], WORLD).tolist() == [[pytest.approx(100 / 3)], [100], [0]]


def test_evaluating_brings_back_the_mode_and_computes_without_gradients():
    model = nn.Sequential(nn.Linear(3, 3), nn.Dropout()).train()
    for amp, dtype in ((False, torch.float32), (True, torch.bfloat16)):
        with evaluating(model, amp):
            assert not model.training
            y = model(torch.zeros(2, 3))
            assert (y.dtype, y.requires_grad) == (dtype, False)
        assert model.training
    with pytest.raises(RuntimeError), evaluating(model):
        model(torch.zeros(2, 4))
    assert model.training


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16])
@pytest.mark.parametrize("classes", [1, 3, 5, 11])
def test_topk_against_brute_force(classes, dtype):
    generator = torch.Generator().manual_seed(classes)
    logits = torch.randn(64, classes, generator=generator).to(dtype)  # bfloat16 and 11 classes: real ties
    labels = torch.randint(classes, (64,), generator=generator)
    ks = (1, 2, 5, 100)
    expected = [0] * len(ks)
    for row, label in zip(logits.tolist(), labels.tolist(), strict=True):
        order = sorted(range(classes), key=lambda c: (-row[c], c))
        for i, k in enumerate(ks):
            expected[i] += label in order[:k]
    counts = topk_correct(logits, labels, ks)
    assert counts.dtype == torch.int64
    assert counts.tolist() == expected
    assert topk_correct(logits, labels, (1,)).item() == (logits.argmax(1) == labels).sum().item()


def test_topk_edges():
    logits, labels = torch.randn(6, 4), torch.tensor([0, 1, 2, 3, 0, 1])
    strided = torch.randn(4, 6).t(), torch.stack([labels, labels], 1)[:, 0]
    assert not any(t.is_contiguous() for t in strided)
    assert topk_correct(*strided).equal(topk_correct(strided[0].contiguous(), labels))
    assert topk_correct(logits, labels.int()).equal(topk_correct(logits, labels))
    assert topk_correct(logits, labels, (4, 9)).tolist() == [6, 6]
    assert topk_correct(logits[:0], labels[:0]).tolist() == [0, 0]
    assert topk_correct(torch.zeros(4, 4), torch.arange(4)).tolist() == [1, 4]  # a collapsed model is at chance
    assert topk_correct(torch.full((4, 4), torch.nan), torch.arange(4)).tolist() == [0, 0]
    assert topk_correct(logits.to("meta"), labels.to("meta")).device.type == "meta"  # nothing reads the values


@pytest.mark.parametrize(
    ("logits", "labels", "ks"),
    [((4,), (4,), (1,)), ((4, 3), (3,), (1,)), ((4, 3), (4, 1), (1,)), ((4, 3), (4,), (0,)), ((4, 3), (4,), ())],
)
def test_topk_refuses(logits, labels, ks):
    with pytest.raises(UserError, match="expected"):
        topk_correct(torch.zeros(logits), torch.zeros(labels, dtype=torch.long), ks)


def test_accuracy_of_nothing():
    with pytest.raises(UserError, match="no samples"):
        accuracies([(torch.zeros(0, 3), torch.zeros(0, dtype=torch.long))], WORLD)


# ------------------------------------------------------------------------------------------------ counts
def test_parameters():
    net = nn.Sequential(nn.Conv2d(3, 8, 3, bias=False), nn.BatchNorm2d(8), nn.Linear(5, 2))
    assert parameters(net) == 3 * 8 * 9 + 2 * 8 + 5 * 2 + 2
    net[0].weight.requires_grad_(False)
    assert parameters(net, trainable_only=True) == 2 * 8 + 12
    tied = nn.ModuleList([nn.Linear(4, 4), nn.Linear(4, 4)])
    tied[1].weight = tied[0].weight
    assert parameters(tied) == 16 + 4 + 4


@pytest.mark.parametrize("device", ["cpu", "meta"])
@pytest.mark.parametrize(
    ("build", "shape", "expected"),
    [
        (lambda: nn.Linear(5, 7), (3, 5), 3 * 5 * 7),
        (lambda: nn.Linear(5, 7), (5,), 5 * 7),
        (lambda: nn.Linear(5, 7, bias=False), (2, 3, 5), 6 * 5 * 7),
        (lambda: nn.Conv2d(3, 8, 3, stride=2, padding=1), (2, 3, 9, 7), 2 * (5 * 4) * 8 * 3 * 9),
        (lambda: nn.Conv2d(8, 8, 5, padding=2, groups=8), (1, 8, 6, 6), 36 * 8 * 25),
        (lambda: nn.Conv2d(8, 4, 3, padding=2, dilation=2, groups=2), (1, 8, 6, 6), 36 * 4 * 4 * 9),
        (lambda: nn.Conv1d(3, 8, 3), (1, 3, 10), 8 * 8 * 3 * 3),
        (lambda: nn.ConvTranspose2d(3, 8, 2, stride=2), (1, 3, 4, 4), 16 * 3 * 8 * 4),
        (lambda: nn.Sequential(nn.BatchNorm2d(3), nn.ReLU(), nn.MaxPool2d(2)), (1, 3, 4, 4), 0),
        (lambda: nn.LSTM(6, 4), (5, 2, 6), 5 * 2 * 4 * 4 * (6 + 4)),
        (
            lambda: nn.TransformerEncoderLayer(16, 2, 32, batch_first=True),
            (2, 5, 16),
            2 * 5 * (4 * 16 * 16 + 2 * 16 * 32) + 2 * 2 * 5 * 5 * 16,
        ),
    ],
)
def test_mult_adds_closed_forms(build, shape, expected, device):
    with torch.device(device):
        assert mult_adds(build(), torch.empty(shape)) == expected


def test_mult_adds_of_resnet18():
    from torchvision.models import resnet18

    with torch.device("meta"):
        net, images = resnet18(), torch.empty(1, 3, 224, 224)
    assert parameters(net) == 11_689_512
    assert mult_adds(net, images) == 1_814_073_344


class Dropping(nn.Module):
    """Skips its second layer in training, fails on request."""

    def __init__(self):
        super().__init__()
        self.first, self.second = nn.Linear(4, 4), nn.Linear(4, 4)
        self.norm = nn.BatchNorm1d(4)

    def forward(self, x, fail=False):
        if fail:
            raise RuntimeError("asked to")
        x = self.norm(self.first(x))
        return x if self.training else self.second(x)


def test_counting_leaves_no_trace():
    net = Dropping()
    net.norm.eval()  # a frozen norm must stay frozen
    before = {k: v.clone() for k, v in net.state_dict().items()}
    assert mult_adds(net, torch.randn(3, 4)) == 2 * 3 * 16
    assert element_ops(net, torch.randn(3, 4), per_element={nn.Linear: 1}) == 2 * 3 * 4
    for count in (mult_adds, element_ops):
        with pytest.raises(RuntimeError, match="asked to"):
            count(net, torch.randn(3, 4), True)
    assert (net.training, net.first.training, net.norm.training) == (True, True, False)
    assert all(v.equal(before[k]) for k, v in net.state_dict().items())
    assert not any(m._forward_hooks for m in net.modules())
    assert torch.backends.mkldnn.enabled


def test_element_ops():
    relu = nn.ReLU(inplace=True)
    net = nn.Sequential(nn.Conv2d(3, 8, 3, padding=1), nn.BatchNorm2d(8), relu, nn.Conv2d(8, 4, 1), relu)
    images = torch.randn(2, 3, 5, 5)
    bn, first, second = 2 * 8 * 25, 2 * 8 * 25, 2 * 4 * 25
    assert element_ops(net, images) == 2 * bn + first + second  # a module used twice counts twice
    assert element_ops(net, images, per_element={nn.Conv2d: 3}) == 3 * (first + second)
    assert element_ops(net.to("meta"), images.to("meta")) == 2 * bn + first + second


# ------------------------------------------------------------------------------------------------ memory
@pytest.mark.parametrize("device", ["cpu", "meta"])
def test_saved_bytes_of_a_chain(device):
    net = nn.Sequential(nn.Linear(8, 16), nn.ReLU(), nn.Linear(16, 4)).to(device)
    x = torch.randn(3, 8, device=device)
    # Linear 1 keeps x; ReLU keeps its output, which Linear 2 keeps too: one storage; Linear 2 keeps its weight.
    hidden, weight = 3 * 16 * 4, 16 * 4 * 4
    assert saved_bytes(lambda: net(x)) == 3 * 8 * 4 + hidden + weight
    assert saved_bytes(lambda: net(x), exclude=[*net.parameters(), x]) == hidden
    assert saved_bytes(lambda: net(x), exclude=[*net.parameters(), x[1:]]) == hidden  # a view is its storage
    with torch.no_grad():
        assert saved_bytes(lambda: net(x)) == 0


def test_saved_bytes_counts_storages():
    x = torch.randn(10, 10, requires_grad=True)
    assert saved_bytes(lambda: x * x) == 400  # saved twice, one storage
    assert saved_bytes(lambda: x[:1].exp() + x[1:].exp().sum()) == 40 + 360
    y = torch.randn(10, 10)
    assert saved_bytes(lambda: x[0] * y[0]) == 400  # y[0], for the gradient of x[0]: a slice keeps the whole tensor
    # Storages that come and go while fn runs must not be taken for one another.
    assert saved_bytes(lambda: [x.exp() for _ in range(20)][:0]) == 20 * 400


def test_saved_bytes_sees_checkpointing():
    net = nn.Sequential(nn.Linear(8, 16), nn.ReLU(), nn.Linear(16, 4))
    x = torch.randn(3, 8, requires_grad=True)
    assert saved_bytes(lambda: checkpoint(net, x, use_reentrant=False), exclude=net.parameters()) == 3 * 8 * 4


def test_peak_memory_on_cpu():
    mb = 2**20

    def two_at_once():
        a = torch.empty(mb, dtype=torch.uint8)
        b = torch.empty(2 * mb, dtype=torch.uint8)
        del a
        c = torch.empty(mb // 2, dtype=torch.uint8)
        return b, c

    kept = two_at_once()  # alive before: does not count
    assert peak_memory(two_at_once, "cpu") == 3 * mb
    assert peak_memory(lambda: None, "cpu") == 0
    del kept
    net = nn.Sequential(*[layer for _ in range(4) for layer in (nn.Linear(64, 64), nn.Sigmoid())])
    x = torch.randn(256, 64)
    activation = 256 * 64 * 4
    with torch.no_grad():
        assert peak_memory(lambda: net(x), "cpu") == pytest.approx(2 * activation, rel=0.02)
    assert peak_memory(lambda: net(x), "cpu") == pytest.approx(5 * activation, rel=0.02)  # 4 kept + 1


def test_peak_memory_refuses():
    with pytest.raises(UserError, match="expected cpu or cuda"):
        peak_memory(lambda: None, "meta")


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
def test_peak_memory_on_cuda():
    size = 4 * 2**20
    kept = torch.empty(size, dtype=torch.uint8, device="cuda")
    assert peak_memory(lambda: torch.empty(size, dtype=torch.uint8, device="cuda"), "cuda") == size
    del kept


# ------------------------------------------------------------------------------------------------ time
def test_latency_is_interleaved_and_right():
    calls, main = [], threading.get_ident()

    def sleeper(name, seconds):
        def fn():
            assert threading.get_ident() == main
            if calls[-1:] != [name]:
                calls.append(name)
            time.sleep(seconds)

        return fn

    result = latency({"a": sleeper("a", 0.002), "b": sleeper("b", 0.006)}, min_run_time=0.02, rounds=3)
    assert calls == ["a", "b", "a", "b"]  # a b | b a | a b, neighbours merged
    assert list(result) == ["a", "b"]
    assert result["a"].ratios == (1.0, 1.0, 1.0)
    assert len(result["b"].ratios) == 3
    assert result["a"].median == pytest.approx(0.002, rel=0.5)
    assert result["b"].ratio == pytest.approx(3, rel=0.3)
    assert result["b"].iqr >= 0


@pytest.mark.parametrize(("fns", "rounds"), [({}, 3), ({"a": int}, 0)])
def test_latency_refuses(fns, rounds):
    with pytest.raises(UserError, match="expected at least one"):
        latency(fns, rounds=rounds)

"""Local modules: isolated gradients, graphs that do not outlive their backward pass, memory, checkpointing, the test network."""

import copy
import weakref

import pytest
import torch
import torch.nn.functional as F

from common.metrics.compute import parameters, peak_memory, saved_bytes
from papers.infopro import (
    Decoder,
    InfoPro,
    SavedMemory,
    checkpointed,
    contrastive_loss,
    cut_points,
    head,
    network,
    reconstruction_loss,
    resnet_cifar,
)
from papers.infopro.bench import infopro
from papers.infopro.cost import auxiliary_mult_adds, empty_batch

CUTS = ((1, 0), (2, 0), (2, 1))
CLASSES, B = 4, 12


def model_of(cuts=CUTS, loss="contrast", lambda1=(5.0, 1.0), lambda2=(0.5, 2.0), kind="1c2f", depth=14):
    torch.manual_seed(0)
    net = resnet_cifar(depth, CLASSES, (4, 8, 8)).double()
    outputs = 16 if loss == "contrast" else CLASSES
    return InfoPro(net, cuts, Decoder, lambda c: head(kind, c, outputs, 8, 16), lambda1, lambda2, loss).double()


@pytest.fixture
def batch():
    torch.manual_seed(1)
    return torch.randn(B, 3, 12, 12).double(), torch.rand(B, 3, 12, 12).double(), torch.arange(B) % CLASSES


def gradients(model) -> dict[str, torch.Tensor | None]:
    found = {name: p.grad for name, p in model.named_parameters()}
    model.zero_grad()
    return found


# ------------------------------------------------------------------------------------------------ isolation
@pytest.mark.parametrize("loss", ["contrast", "softmax"])
def test_every_gradient_is_that_of_its_own_modules_loss(loss, batch):
    """Against one graph with the modules cut by hand: the sum of all local losses, differentiated at once."""
    model = model_of(loss=loss)
    x, pixels, y = batch
    found, logits = model.backward(*batch)
    ours, h, losses = gradients(model), x, []
    task = contrastive_loss if loss == "contrast" else F.cross_entropy
    for k in range(4):
        h = model.network.run(h.detach(), model.bounds[k], model.bounds[k + 1])
        if k == 3:
            losses.append(F.cross_entropy(h, y))
            assert torch.equal(logits, h)
            assert not logits.requires_grad
            break
        restored = model.decoders[str(k)](h, (12, 12))
        losses.append(
            model.lambda1[k] * reconstruction_loss(restored, pixels)
            + model.lambda2[k] * task(model.heads[str(k)](h), y)
        )
    torch.testing.assert_close(found.double(), torch.stack(losses).detach(), rtol=1e-6, atol=1e-6)
    expected = torch.autograd.grad(sum(losses), list(model.parameters()))
    for (name, p), gradient in zip(model.named_parameters(), expected, strict=True):
        torch.testing.assert_close(ours[name], gradient, msg=name)
        assert p.grad is None


def test_modules_share_no_parameter_and_have_all():
    model = model_of()
    ids = [id(p) for k in range(4) for p in model.module_parameters(k)]
    assert len(ids) == len(set(ids))
    assert set(ids) == {id(p) for p in model.parameters()}


@pytest.mark.parametrize("changed", [1, 2, 3])
def test_a_later_loss_never_reaches_an_earlier_module(changed, batch):
    """Other weights, another head, other labels from module `changed` on: bit for bit the same gradients before it."""
    model = model_of()
    model.backward(*batch)
    before = [[p.grad.clone() for p in model.module_parameters(k)] for k in range(4)]
    model.zero_grad()
    with torch.no_grad():
        for p in model.module_parameters(changed):
            p.add_(torch.randn_like(p))
    model.backward(*batch)
    after = [[p.grad for p in model.module_parameters(k)] for k in range(4)]
    for k in range(4):
        same = all(torch.equal(a, b) for a, b in zip(before[k], after[k], strict=True))
        assert same is (k < changed)


def test_without_a_loss_a_module_has_no_gradient(batch):
    """All lambdas 0: module 1's gradients are exactly 0, the last module's are not; and there is no auxiliary net."""
    model = model_of(lambda1=(0, 0), lambda2=(0, 0))
    losses, _ = model.backward(*batch)
    assert losses[:3].tolist() == [0, 0, 0]
    assert losses[3] > 0
    for k in range(3):
        assert all(p.grad is None or not p.grad.any() for p in model.module_parameters(k))
    assert all(p.grad.any() for p in model.module_parameters(3))
    assert not len(model.decoders) + len(model.heads)


@pytest.mark.parametrize("zero", ["lambda1", "lambda2"])
def test_an_auxiliary_net_that_counts_nothing_is_not_there(zero, batch):
    """lambda = 0 at the first module alone, as in the paper's settings; and the same gradients as with the net."""
    pair = {"lambda1": (5.0, 1.0), "lambda2": (0.5, 2.0)} | {zero: (0.0, 2.0)}
    model = model_of(**pair)
    assert set(model.decoders) == ({"1", "2"} if zero == "lambda1" else {"0", "1", "2"})
    assert set(model.heads) == ({"1", "2"} if zero == "lambda2" else {"0", "1", "2"})
    whole = model_of(**pair | {zero: (1e-300, 2.0)})
    whole.load_state_dict(model.state_dict(), strict=False)
    model.backward(*batch)
    whole.backward(*batch)
    for (name, p), q in zip(model.network.named_parameters(), whole.network.parameters(), strict=True):
        torch.testing.assert_close(p.grad, q.grad, msg=name)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"cuts": ((2, 0), (1, 0))}, r"expected rising \(stage, block\)"),
        ({"cuts": ((1, 0), (1, 0))}, r"expected rising \(stage, block\)"),
        ({"cuts": ((1, 2),)}, "no block 2 in stage 1"),
        ({"loss": "hinge"}, "unknown loss 'hinge'; expected contrast or softmax"),
        ({"lambda1": (-1, 0)}, "expected 0 or more"),
        ({"kind": "9c9f"}, "unknown head '9c9f'"),
    ],
)
def test_bad_input(arguments, message):
    with pytest.raises(ValueError, match=message):
        model_of(**arguments)


# ------------------------------------------------------------------------------------------------ K = 1 and the test
def test_one_module_is_end_to_end_training_bit_for_bit(batch):
    model, plain = model_of(cuts=()), model_of(cuts=()).network
    optimisers = [torch.optim.SGD(m.parameters(), 0.1, 0.9, nesterov=True) for m in (model, plain)]
    for _ in range(3):
        for optimiser in optimisers:
            optimiser.zero_grad()
        model.backward(*batch)
        F.cross_entropy(plain(batch[0]), batch[2]).backward()
        for optimiser in optimisers:
            optimiser.step()
    state = model.network.state_dict()
    assert all(torch.equal(state[name], tensor) for name, tensor in plain.state_dict().items())


def test_the_test_network_does_not_depend_on_the_cuts(batch):
    """Same seed, same weights, same bits for every K; the auxiliary nets have no part in it."""
    outputs = []
    for cuts in ((), CUTS[:1], CUTS):
        model = model_of(cuts=cuts).eval()
        assert parameters(model.network) == parameters(resnet_cifar(14, CLASSES, (4, 8, 8)))
        h = batch[0]
        for k in range(model.K):
            h, _ = model.local_loss(k, h, *batch[1:])
        assert torch.equal(h, model(batch[0])), "module by module it is the network"
        for net in (*model.decoders.values(), *model.heads.values()):
            for p in net.parameters():
                p.data.fill_(torch.nan)
        outputs.append(model(batch[0]))
        assert torch.equal(model(batch[0]), model.network(batch[0]))
    assert all(torch.equal(outputs[0], other) for other in outputs[1:])


def test_gradients_add_up_over_calls(batch):
    """Like .backward(): two halves of a batch accumulate."""
    model = model_of(loss="softmax").eval()
    halves = [tuple(t[part] for t in batch) for part in (slice(0, 6), slice(6, 12))]
    for half in halves:
        model.backward(*half)
    added = gradients(model)
    model.backward(*batch)
    for name, gradient in gradients(model).items():
        torch.testing.assert_close(added[name] / 2, gradient, msg=name)


# ------------------------------------------------------------------------------------------------ asynchronous
def test_asynchronous_training_moves_one_module(batch):
    model = model_of()
    before = copy.deepcopy(model.state_dict())
    for k in range(4):
        model.zero_grad()
        model.train_only(k)
        model.backward_of(k, *batch)
        mine = {id(p) for p in model.module_parameters(k)}
        assert all((p.grad is not None and bool(p.grad.any())) == (id(p) in mine) for p in model.parameters())
        changed = {name for name, t in model.state_dict().items() if not torch.equal(t, before[name])}
        owned = {id(b) for u in model.network.units[model.bounds[k] : model.bounds[k + 1]] for b in u.buffers()}
        owned |= {id(b) for group in (model.decoders, model.heads) if str(k) in group for b in group[str(k)].buffers()}
        assert changed == {name for name, b in model.named_buffers() if id(b) in owned}
        before = copy.deepcopy(model.state_dict())


def test_asynchronous_training_of_the_first_module_is_its_part_of_simultaneous_training(batch):
    model = model_of()
    model.train_only(0)
    model.backward_of(0, *batch)
    alone = gradients(model)
    model.backward(*batch)
    mine = {id(p) for p in model.module_parameters(0)}
    together = {name: p.grad for name, p in model.named_parameters() if id(p) in mine}
    assert all(torch.equal(alone[name], gradient) for name, gradient in together.items())


# ------------------------------------------------------------------------------------------------ memory
def test_no_graph_outlives_its_modules_backward_pass(batch):
    """When module k + 1 starts, nothing that autograd saved for modules 1 .. k is alive, nor is an output that has a graph."""
    model, alive, refs = model_of(), [], []
    run, x = model.network.run, batch[0]

    def watched(h, start=0, stop=None):
        alive.append((memory.alive, sum(ref() is not None for ref in refs)))
        out = run(h, start, stop)
        refs.append(weakref.ref(out))  # with its graph; what goes on is detached
        return out

    model.network.run = watched
    with SavedMemory([*model.parameters(), x]) as memory:
        model.backward(*batch)
    assert alive == [(0, 0)] * 4
    assert memory.alive == 0
    assert memory.peak > 0


def test_meter_counts_storages_once_and_agrees_with_a_forward_pass():
    """At its highest, at the end of the forward pass, it is what common's saved_bytes finds; by hand for one layer."""
    x = torch.randn(8, 16)
    w = torch.randn(16, 16, requires_grad=True)
    with SavedMemory([w]) as memory:
        y = (x @ w).relu()  # saves x, w (left out) and the output
        assert memory.alive == memory.peak == (x.numel() + y.numel()) * 4
        z = (y * y).sum()  # y is there already
        assert memory.alive == (x.numel() + y.numel()) * 4
        z.backward()
        assert memory.alive == 0
        assert memory.peak == (x.numel() + y.numel()) * 4
    model = model_of(cuts=())
    x, y = torch.randn(4, 3, 12, 12).double(), torch.arange(4)
    with SavedMemory(model.parameters()) as memory:
        F.cross_entropy(model(x), y).backward()
    assert memory.peak == saved_bytes(lambda: F.cross_entropy(model(x), y), model.parameters())


@pytest.mark.parametrize(("name", "K", "equal_memory"), [("r32", 8, False), ("r110", 2, True)])
def test_overhead_by_hand(name, K, equal_memory):
    """Decoder and contrastive head after stage 1, 2, 3; test_scripts.py holds all official figures against `costs`."""
    with torch.device("meta"):
        model = infopro(name, K, equal_memory)
    each = [
        (c * 12 + 12 * 3) * 9 * 32**2 + c * min(2 * c, 64) * 9 * side**2 + min(2 * c, 64) * 128 + 128 * 128
        for c, side in ((16, 16), (32, 8), (64, 8))
    ]
    cuts = cut_points(name, model.network, K, equal_memory)
    assert auxiliary_mult_adds(model, 32) == sum(each[stage - 1] for stage, _ in cuts)


def test_memory_on_the_meta_device_is_that_of_a_real_step():
    torch.manual_seed(0)
    real, meta = [], []
    for device, found in (("cpu", real), ("meta", meta)):
        for cuts in ((), CUTS):
            with torch.device(device):
                net = resnet_cifar(14, 10, (4, 8, 8))
                model = InfoPro(net, cuts, Decoder, lambda c: head("1c2f", c, 16, 8, 16), (1, 1), (1, 1), "contrast")
            images, pixels, labels = (torch.zeros_like(t, device=device) for t in empty_batch(6, 12))
            with SavedMemory(model.parameters()) as memory:
                model.backward(images + 0.5, pixels + 0.5, labels)
            found.append(memory.peak)
    assert real == meta


# ------------------------------------------------------------------------------------------------ checkpointing
@pytest.mark.parametrize("segments", [1, 2, 3, 8])
def test_checkpointing_changes_no_bit(segments, batch):
    """Logits, gradients, and running statistics, which the second forward pass must not move again."""
    plain, rival = (model_of(cuts=()).network for _ in range(2))
    x, _, y = batch
    outputs = [plain(x), checkpointed(rival, x, segments)]
    assert torch.equal(*outputs)
    for logits in outputs:
        F.cross_entropy(logits, y).backward()
    for (name, p), q in zip(plain.named_parameters(), rival.named_parameters(), strict=True):
        assert torch.equal(p.grad, q[1].grad), name
    for (name, b), c in zip(plain.named_buffers(), rival.buffers(), strict=True):
        assert torch.equal(b, c), name
    assert all(m.momentum == 0.1 for m in rival.modules() if isinstance(m, torch.nn.BatchNorm2d))


def test_checkpointing_keeps_less_and_so_do_local_modules():
    """Real peaks of the allocator, R-32 at batch 16."""
    torch.manual_seed(0)
    net = network("r32", 10)
    x, y, pixels = torch.randn(16, 3, 32, 32), torch.arange(16) % 10, torch.rand(16, 3, 32, 32)
    local = InfoPro(net, cut_points("r32", net, 4), Decoder, lambda c: head("1c2f", c, 128), (5, 5), (1, 1), "contrast")
    steps = {
        "whole": lambda: F.cross_entropy(net(x), y).backward(),
        "checkpointed": lambda: F.cross_entropy(checkpointed(net, x, 4), y).backward(),
        "local": lambda: local.backward(x, pixels, y),
    }
    for step in steps.values():
        step()  # .grad exists from here on
    peaks = {name: peak_memory(step, "cpu") for name, step in steps.items()}
    assert peaks["checkpointed"] < 0.6 * peaks["whole"]
    assert peaks["local"] < 0.6 * peaks["whole"]


def test_segments_that_do_not_exist(batch):
    for segments in (0, 9):
        with pytest.raises(ValueError, match=f"{segments} segments, expected 1 to 8"):
            checkpointed(model_of(cuts=()).network, batch[0], segments)

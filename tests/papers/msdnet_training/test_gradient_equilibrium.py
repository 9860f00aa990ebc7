"""Gradient equilibrium: the mean of the gradients above, exact on all scales, approximate on the last alone."""

import pytest
import torch
from torch import Tensor

from common.metrics.compute import saved_bytes
from papers.msdnet_training import MSDNet, msdnet_cifar, scale_gradient, sum_of_cross_entropies

CHAIN = {"growth_factor": (1,), "bottleneck_factor": (2,)}
SCALES = {"growth_factor": (1, 2, 4), "bottleneck_factor": (1, 2, 4)}
K = 4


def small(dtype=torch.float64, exits=K, **changes) -> MSDNet:
    """8 layers at three scales, the second of which is dropped in block 3: blocks of 3, 2, 2 and 1 scales."""
    torch.manual_seed(0)
    return msdnet_cifar(exits, base=2, step=2, channels=4, growth=2, classes=5, **changes).to(dtype)


def batch(dtype=torch.float64) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(1)
    images = torch.randn(4, 3, 16, 16, dtype=dtype, generator=generator)
    return images, torch.randint(5, (4,), generator=generator)


def gradients(model: MSDNet, images: Tensor, labels: Tensor, equilibrium, exits=None, of="blocks") -> list[Tensor]:
    """One flat gradient a block (or exit) of the sum of the losses of `exits`, all of them by default."""
    model.equilibrium = equilibrium
    model.zero_grad()
    logits = model(images)
    sum_of_cross_entropies([logits[j] for j in (exits or range(len(logits)))], labels).backward()
    zero = torch.zeros_like
    return [
        torch.cat([(zero(p) if p.grad is None else p.grad).flatten() for p in m.parameters()])
        for m in getattr(model, of)
    ]


def relative(a: Tensor, b: Tensor) -> float:
    return ((a - b).norm() / b.norm()).item()


def test_scale_gradient():
    x = torch.randn(2, 3, dtype=torch.float64, requires_grad=True)
    y = scale_gradient(x, 0.25)
    assert torch.equal(y, x)
    weight = torch.randn(2, 3, dtype=torch.float64)
    y.backward(weight)
    assert torch.equal(x.grad, 0.25 * weight)
    assert saved_bytes(lambda: scale_gradient(x, 0.25)) == 0
    plain = x.detach()
    assert scale_gradient(plain, 0.25) is plain


@pytest.mark.parametrize(("shape", "equilibrium"), [(CHAIN, "all"), (CHAIN, "last"), (SCALES, "all")])
def test_each_block_has_the_mean_of_the_gradients_above(shape, equilibrium):
    """Every one of them computed by a backward pass of its own, without equilibrium."""
    model, (images, labels) = small(**shape), batch()
    of_exit = [gradients(model, images, labels, None, exits=[j]) for j in range(K)]
    for i, found in enumerate(gradients(model, images, labels, equilibrium)):
        mean = sum(of_exit[j][i] for j in range(i, K)) / (K - i)
        assert relative(found, mean) < 1e-10
        assert all(of_exit[j][i].count_nonzero() == 0 for j in range(i))


def test_each_loss_reaches_each_block_by_the_unrolled_factor():
    """1/(k-i+1) of the gradient of L_j, whatever j: the product of the factors telescopes."""
    model, (images, labels) = small(**SCALES), batch()
    for j in range(K):
        plain, scaled = (gradients(model, images, labels, mode, exits=[j]) for mode in (None, "all"))
        for i in range(j + 1):
            assert relative(scaled[i], plain[i] / (K - i)) < 1e-10


def test_last_scale_alone_is_approximate_until_one_scale_is_left():
    model, (images, labels) = small(**SCALES), batch()
    plain, scaled = (gradients(model, images, labels, mode) for mode in (None, "last"))
    distance = [relative(scaled[i], plain[i] / (K - i)) for i in range(K)]
    state, scales = images, []
    for i in range(K):
        state = model.run_block(i, state)
        scales.append(len(state))
    assert scales == [3, 2, 2, 1]
    assert min(distance[:3]) > 0.02
    assert distance[3] < 1e-10


def test_official_network_at_initialisation():
    """CIFAR-10, 5 exits, train mode, 4 images: distances and norms as measured on the official code (one draw there).

    Means of 4 draws; one draw has a standard deviation of at most 0.022 (distance) and 0.004 (ratio) over seeds, and
    the tolerance is 2 of those.
    """
    distances, ratios = torch.zeros(5), torch.zeros(5)
    for seed in range(4):
        torch.manual_seed(seed)
        model, images, labels = msdnet_cifar(5, classes=10), torch.randn(4, 3, 32, 32), torch.randint(10, (4,))
        total, last, every = (gradients(model, images, labels, mode) for mode in (None, "last", "all"))
        for i in range(5):
            distances[i] += relative(last[i], total[i] / (5 - i)) / 4
            ratios[i] += last[i].norm() / total[i].norm() / 4
            assert relative(every[i], total[i] / (5 - i)) < 1e-5
    assert distances.tolist() == pytest.approx([0.37, 0.26, 0.13, 0, 0], abs=0.045)
    assert ratios.tolist() == pytest.approx([0.239, 0.282, 0.346, 0.5, 1], abs=0.008)
    assert distances[3:].max() < 1e-6


@pytest.mark.parametrize("equilibrium", ["all", "last"])
def test_the_function_and_the_exits_own_gradients_stay(equilibrium):
    model, (images, labels) = small(torch.float32), batch(torch.float32)
    plain = model(images)
    model.equilibrium = equilibrium
    assert all(torch.equal(a, b) for a, b in zip(model(images), plain, strict=True))
    own = [gradients(model, images, labels, mode, of="exits") for mode in (None, equilibrium)]
    assert all(torch.equal(a, b) for a, b in zip(*own, strict=True))


@pytest.mark.parametrize("equilibrium", ["all", "last"])
def test_one_exit_is_plain_training(equilibrium):
    model, (images, labels) = small(exits=1), batch()
    plain, scaled = (gradients(model, images, labels, mode)[0] for mode in (None, equilibrium))
    assert torch.equal(plain, scaled)


def test_unknown_mode_set_later():
    model = small()
    model.equilibrium = "none"
    with pytest.raises(ValueError, match="unknown equilibrium 'none', expected None, 'all' or 'last'"):
        model(batch()[0])


def test_no_memory():
    images, _ = batch(torch.float32)
    models = small(torch.float32), small(torch.float32, equilibrium="all")
    plain, scaled = (saved_bytes(lambda model=m: model(images)) for m in models)
    assert scaled == plain

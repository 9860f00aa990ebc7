"""Evaluation networks: every parameter and multiply-add count that the official code gives."""

import pytest
import torch
from torch import nn
from torch.utils.flop_counter import FlopCounterMode

from papers.pc_darts import PUBLISHED, NetworkCIFAR, NetworkImageNet, random_genotype
from papers.pc_darts.model import Cell
from papers.pc_darts.operations import FactorizedReduce, drop_path, operation

MINE = ("PC_DARTS_cifar", "PC_DARTS_image", "DARTS_V1")


def parameters(model: nn.Module) -> int:
    return sum(p.numel() for name, p in model.named_parameters() if not name.startswith("auxiliary"))


def macs(model: nn.Module, size: int) -> tuple[int, int]:
    """(convolution + linear multiply-adds, the same + 2 per batch-norm output element + 1 per ReLU output element)."""
    elements = [0]

    def count(module, _, out):
        elements[0] += (2 if isinstance(module, nn.BatchNorm2d) else 1) * out.numel()

    for module in model.modules():
        if isinstance(module, nn.BatchNorm2d | nn.ReLU):
            module.register_forward_hook(count)
    with FlopCounterMode(display=False) as counter, torch.no_grad():
        model.eval()(torch.zeros(1, 3, size, size, device="meta"))
    return counter.get_total_flops() // 2, counter.get_total_flops() // 2 + elements[0]


@pytest.mark.parametrize(
    ("name", "params", "params100", "mult_adds"),
    [
        ("PC_DARTS_cifar", 3_634_678, 3_686_608, 556_670_592),
        ("PC_DARTS_image", 3_721_510, 3_773_440, 570_466_944),
        ("DARTS_V1", 3_169_414, 3_221_344, 500_987_520),
    ],
)
def test_cifar_network(name, params, params100, mult_adds):
    with torch.device("meta"):
        model = NetworkCIFAR(PUBLISHED[name], auxiliary=True)
        model100 = NetworkCIFAR(PUBLISHED[name], num_classes=100)
    assert parameters(model) == params
    assert parameters(model100) == params100
    assert sum(p.numel() for p in model.auxiliary.parameters()) == 476_426
    assert macs(model, 32)[0] == mult_adds


@pytest.mark.parametrize(
    ("name", "params", "mult_adds", "paper_millions"),
    [
        ("PC_DARTS_cifar", 5_270_560, 571_137_408, 585.95),
        ("PC_DARTS_image", 5_342_464, 581_627_328, 597.06),
        ("DARTS_V1", 4_510_432, 505_864_704, None),
    ],
)
def test_imagenet_network(name, params, mult_adds, paper_millions):
    with torch.device("meta"):
        model = NetworkImageNet(PUBLISHED[name], auxiliary=True)
    assert parameters(model) == params
    assert sum(p.numel() for p in model.auxiliary.parameters()) == 1_260_776
    plain, with_elements = macs(model, 224)
    assert plain == mult_adds
    if paper_millions:
        assert round(with_elements / 1e6, 2) == paper_millions


def test_outputs_and_auxiliary_head():
    torch.manual_seed(0)
    model = NetworkCIFAR(PUBLISHED["PC_DARTS_cifar"], C=4, layers=5, num_classes=7, auxiliary=True)
    x = torch.randn(2, 3, 32, 32)
    logits, aux = model(x)
    assert logits.shape == aux.shape == (2, 7)
    (logits.sum() + aux.sum()).backward()
    assert all(p.grad is not None for p in model.parameters())
    assert model.eval()(x)[1] is None
    assert NetworkCIFAR(PUBLISHED["DARTS_V2"], C=4, layers=5)(x)[1] is None
    model = NetworkImageNet(PUBLISHED["PC_DARTS_image"], C=4, layers=5, num_classes=7, auxiliary=True)
    assert [t.shape for t in model(torch.randn(2, 3, 224, 224))] == [(2, 7), (2, 7)]


def test_cell_against_its_definition():
    torch.manual_seed(0)
    genotype = random_genotype(torch.Generator().manual_seed(3))
    cell = Cell(genotype, 6, 8, 4, reduction=True, reduction_prev=False).eval()
    s0, s1 = torch.randn(2, 6, 8, 8), torch.randn(2, 8, 8, 8)
    states = [cell.preprocess0(s0), cell.preprocess1(s1)]
    for node in range(4):
        (_, a), (_, b) = genotype.reduce[2 * node : 2 * node + 2]
        states.append(cell.ops[2 * node](states[a]) + cell.ops[2 * node + 1](states[b]))
    assert torch.equal(cell(s0, s1), torch.cat(states[2:], 1))
    assert states[2].shape == (2, 4, 4, 4)


def test_factorized_reduce_reads_every_pixel():
    layer = FactorizedReduce(1, 2, affine=False).eval()
    x = torch.rand(1, 1, 4, 4).requires_grad_()
    layer(x).sum().backward()
    assert x.grad[0, 0].ne(0).int().tolist() == [[1, 0, 1, 0], [0, 1, 0, 1]] * 2
    with pytest.raises(ValueError, match="even height and width"):
        layer(torch.rand(1, 1, 5, 4))
    with pytest.raises(ValueError, match="even number"):
        FactorizedReduce(3, 3)


def test_average_pool_does_not_count_padding():
    assert torch.allclose(operation("avg_pool_3x3", 1, 1)(torch.ones(1, 1, 4, 4)), torch.ones(1, 1, 4, 4))


def test_drop_path_is_per_sample_and_keeps_the_mean():
    torch.manual_seed(0)
    x = torch.ones(20_000, 2, 1, 1)
    out = drop_path(x, 0.3)
    assert torch.equal(out[:, 0], out[:, 1])
    values = out[:, 0].flatten()
    assert set(values.tolist()) == {0.0, (1 / torch.tensor(0.7)).item()}
    assert values.eq(0).float().mean().item() == pytest.approx(0.3, abs=0.015)
    assert values.mean().item() == pytest.approx(1, abs=0.02)
    assert torch.equal(x, torch.ones_like(x))  # not in place
    with pytest.raises(ValueError, match="0 <= p < 1"):
        drop_path(x, 1.0)


def test_drop_path_spares_identity_and_evaluation():
    torch.manual_seed(0)
    skips = PUBLISHED["PC_DARTS_cifar"]._replace(normal=tuple(("skip_connect", s) for _ in range(4) for s in (0, 1)))
    cell = Cell(skips, 4, 4, 4, reduction=False, reduction_prev=False)
    s = torch.randn(8, 4, 4, 4)
    assert torch.equal(cell(s, s, 0.9), cell(s, s, 0.0))
    model = NetworkCIFAR(PUBLISHED["DARTS_V1"], C=4, layers=3).eval()
    x = torch.randn(16, 3, 8, 8)
    expected = model(x)[0]
    model.drop_path_prob = 0.3
    assert torch.equal(model(x)[0], expected)
    model.train()
    torch.manual_seed(1)
    first = model(x)[0]
    assert not torch.equal(first, model(x)[0])
    torch.manual_seed(1)
    assert torch.equal(first, model(x)[0])


def test_bad_arguments():
    genotype = PUBLISHED["PC_DARTS_cifar"]
    for wrong in ({"C": 0}, {"C": 5}, {"layers": 0}, {"num_classes": 0}):
        with pytest.raises(ValueError, match="expected C even"):
            NetworkCIFAR(genotype, **wrong)
    with pytest.raises(ValueError, match="unknown operation"):
        NetworkCIFAR(genotype._replace(normal=(("conv", 0), *genotype.normal[1:])))
    with pytest.raises(ValueError, match="divisible by 4"):
        NetworkCIFAR(genotype, C=4, layers=3)(torch.zeros(1, 3, 30, 30))
    with pytest.raises(ValueError, match="divisible by 32"):
        NetworkImageNet(genotype, C=4, layers=3)(torch.zeros(1, 3, 40, 40))
    with pytest.raises(ValueError, match="unknown operation 'sep_conv_7x7'"):
        operation("sep_conv_7x7", 4, 1)

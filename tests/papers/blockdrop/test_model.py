"""Networks, policy networks and costs against the counts of the official code, and the masked forward against its definition."""

import re
from functools import cache

import pytest
import torch
import torch.nn.functional as F
import torchvision
from torch import nn
from torchvision.models.resnet import BasicBlock, Bottleneck, ResNet

from common.metrics.compute import mult_adds as counted
from common.metrics.compute import parameters
from papers.blockdrop.cost import Cost, costs, mult_adds
from papers.blockdrop.model import (
    Block,
    PoolAndPad,
    from_torchvision,
    load_torchvision,
    resnet101,
    resnet_cifar,
)
from papers.blockdrop.policy import PolicyNet, load_resnet18, policy_cifar, policy_imagenet

PAPER = {
    "r32": (lambda: resnet_cifar(32), lambda: policy_cifar(15), 32),
    "r110": (lambda: resnet_cifar(110), lambda: policy_cifar(54), 32),
    "r101": (resnet101, lambda: policy_imagenet(33), 224),
}


@cache
def on_meta(name):
    make, make_policy_net, size = PAPER[name]
    with torch.device("meta"):
        model, policy_net = make(), make_policy_net()
    return model, policy_net, costs(model, policy_net, size)


def shaken(model: nn.Module) -> nn.Module:
    """Batch norms as after training, in float64."""
    for module in model.modules():
        if isinstance(module, nn.BatchNorm2d):
            module.running_mean.normal_(0, 0.2)
            module.running_var.uniform_(0.5, 1.5)
            nn.init.uniform_(module.weight, 0.5, 1.5)
            nn.init.normal_(module.bias, 0, 0.2)
    return model.double()


def cifar_net():
    torch.manual_seed(0)
    return shaken(resnet_cifar(20, classes=5, widths=(4, 6, 8))).eval()  # K = 9


def bottleneck_net():
    torch.manual_seed(0)
    return shaken(from_torchvision(ResNet(Bottleneck, [1, 2, 2, 1], num_classes=5))).eval()  # K = 6


NETS = {"cifar": (cifar_net, 20), "bottleneck": (bottleneck_net, 48)}


def images_and_policy(model, size, rows=6, keep=0.5):
    generator = torch.Generator().manual_seed(1)
    x = torch.randn(rows, 3, size, size, dtype=torch.double, generator=generator)
    return x, torch.rand(rows, model.num_blocks, generator=generator) < keep


def exactly(found, expected):
    torch.testing.assert_close(found, expected, rtol=1e-11, atol=1e-11)


# ------------------------------------------------------------------------------------------------ official numbers
@pytest.mark.parametrize(
    ("name", "K", "size", "policy_size", "unused", "full", "policy", "fixed", "share"),
    [
        ("r32", 15, 464_154, 75_680, 65, "1.3773e+08", "2.4480e+07", "8.8602e+05", 17.8),
        ("r110", 54, 1_727_962, 78_215, 65, "5.0578e+08", "2.4485e+07", "8.8602e+05", 4.84),
        ("r101", 33, 44_549_160, 4_923_234, 513, "1.5603e+10", "4.7192e+08", "9.5945e+08", 3.02),
    ],
)
def test_sizes_and_flops_of_the_official_code(name, K, size, policy_size, unused, full, policy, fixed, share):
    """FLOPs are two a mult-add. The official policy networks hold a linear unit that nothing uses, which is not built here."""
    model, policy_net, cost = on_meta(name)
    assert (model.num_blocks, policy_net.num_blocks, len(cost.blocks)) == (K, K, K)
    assert parameters(model) == size
    assert parameters(policy_net) == policy_size - unused
    total = cost.fixed + sum(cost.blocks)
    assert [f"{2 * n:.4e}" for n in (total, cost.policy, cost.fixed)] == [full, policy, fixed]
    assert 100 * cost.policy / total == pytest.approx(share, abs=0.05 if share > 10 else 0.005)


def test_flops_of_each_block():
    for name, n in (("r32", 5), ("r110", 18)):
        strided = [7_077_888 if k in (n, 2 * n) else 9_437_184 for k in range(3 * n)]
        assert [2 * m for m in on_meta(name)[2].blocks] == strided
    blocks = [436_731_904] * 33
    blocks[0] = 359_661_568
    blocks[3] = blocks[7] = blocks[30] = 539_492_352
    assert [2 * m for m in on_meta("r101")[2].blocks] == blocks


def test_flops_of_the_readme_follow_from_its_mean_numbers_of_blocks():
    """1.81e8 for 16.93 of 54 blocks, both strided ones kept; 1.25e10 for 24.77 of 33, and that is 20 % of 1.56e10 saved."""
    cost = on_meta("r110")[2]
    found = 2 * (cost.fixed + cost.policy + (16.93 - 2) * cost.blocks[0] + 2 * cost.blocks[18])
    assert f"{found:.2e}" == "1.80e+08"
    assert found == pytest.approx(1.81e8, rel=0.005)
    cost = on_meta("r101")[2]
    least = 2 * (cost.fixed + cost.policy + 24.77 * cost.blocks[1])
    most = least + 2 * sum(cost.blocks[k] - cost.blocks[1] for k in (0, 3, 7, 30))
    assert least == pytest.approx(1.225e10, rel=0.001)
    assert f"{most:.2e}" == "1.25e+10"
    assert 1 - 1.25e10 / (2 * (cost.fixed + sum(cost.blocks))) == pytest.approx(0.199, abs=5e-4)


def test_logits_of_the_official_code():
    """models/resnet.py of Tushar-N/blockdrop @ ec52b36d38dc, R-32, seed 0: its weights, drawn in its order, its forward."""
    torch.manual_seed(0)
    model = resnet_cifar(32).eval()
    x = torch.linspace(-1, 1, 2 * 3072).view(2, 3, 32, 32)
    policy = torch.tensor([[1, 0, 0] * 5, [0, 1, 1] * 5])
    masked = [
        [-0.2746327, 0.557804, -0.07039277, 0.2118035, 0.3998937],
        [-1.34197, -0.9753737, -7.609076, 0.9235141, 7.886432],
    ]
    whole = [
        [-20.71655, 2.725837, -40.17478, 1.675016, 33.4859],
        [-9.91344, -0.3197317, -19.55226, 1.301156, 16.64758],
    ]
    torch.testing.assert_close(model(x, policy)[:, :5], torch.tensor(masked), rtol=1e-4, atol=1e-4)
    torch.testing.assert_close(model(x)[:, :5], torch.tensor(whole), rtol=1e-4, atol=1e-4)


def test_cifar_weights_start_as_in_the_paper():
    """Convolutions N(0, 2 / (k k c_out)), batch norms 1 and 0, the classifier as in torch."""
    torch.manual_seed(0)
    model = resnet_cifar(20)
    convs = [m for m in model.modules() if isinstance(m, nn.Conv2d)]
    assert [c.out_channels for c in convs] == [16] * 7 + [32] * 6 + [64] * 6
    units = [c.weight.flatten() / (2 / (9 * c.out_channels)) ** 0.5 for c in convs]
    for unit in [*units, torch.cat(units)]:  # of N(0, 1), the mean and std of n numbers, within 5 standard errors
        assert unit.mean().abs() < 5 / len(unit) ** 0.5
        assert (unit.std() - 1).abs() < 5 / (2 * len(unit)) ** 0.5
    for norm in (m for m in model.modules() if isinstance(m, nn.BatchNorm2d)):
        assert norm.weight.eq(1).all()
        assert norm.bias.eq(0).all()
    assert 0.9 / 8 < model.head[-1].weight.abs().amax() <= 1 / 8
    torch.manual_seed(0)
    assert all(torch.equal(a, b) for a, b in zip(resnet_cifar(20).parameters(), model.parameters(), strict=True))


# ------------------------------------------------------------------------------------------------ cost
@pytest.mark.parametrize("kind", NETS)
def test_cost_of_a_policy_is_what_running_it_takes(kind):
    """Mult-adds counted in a real forward pass of one image under random policies, none and all; shapes (..., K)."""
    make, size = NETS[kind]
    model, policy_net = make(), PolicyNet(resnet_cifar(8, make().num_blocks).double(), shrink=2)
    before = [p.clone() for p in model.parameters()]
    cost = costs(model, policy_net, size)
    assert all(torch.equal(a, b) and b.device.type == "cpu" for a, b in zip(before, model.parameters(), strict=True))
    x, policies = images_and_policy(model, size, rows=8)
    policies[0], policies[1] = False, True
    ran = [counted(model, x[:1], u[None]) for u in policies]
    assert cost.policy == counted(policy_net, x[:1])
    assert mult_adds(cost._replace(policy=0), policies).tolist() == ran
    assert mult_adds(cost, policies.view(2, 4, -1)).flatten().tolist() == [n + cost.policy for n in ran]
    assert mult_adds(cost, policies[2].float()).item() == ran[2] + cost.policy
    assert costs(model, size=size) == cost._replace(policy=0) == Cost(cost.fixed, cost.blocks)
    with pytest.raises(ValueError, match=rf"policies \(8, 3\), expected \(..., {model.num_blocks}\)"):
        mult_adds(cost, policies[:, :3])


# ------------------------------------------------------------------------------------------------ masked forward
@pytest.mark.parametrize("kind", NETS)
def test_masked_batch_is_each_image_alone_and_the_formula(kind):
    """x <- m block(x) + (1 - m) shortcut(x). One image alone really skips."""
    make, size = NETS[kind]
    model = make()
    x, policy = images_and_policy(model, size)
    found = model(x, policy)
    exactly(found, torch.cat([model(x[i : i + 1], policy[i : i + 1]) for i in range(len(x))]))
    h = model.stem(x)
    for block, m in zip(model.blocks, policy.double().T[..., None, None, None], strict=True):
        h = m * F.relu(block.shortcut(h) + block.residual(h)) + (1 - m) * block.shortcut(h)
    exactly(found, model.head(h))
    for other in (policy.double(), policy.float(), policy.long()):
        assert torch.equal(model(x, other), found)


@pytest.mark.parametrize("training", [False, True])
@pytest.mark.parametrize("kind", NETS)
def test_all_ones_is_the_plain_network_to_the_bit(kind, training):
    make, size = NETS[kind]
    model = make().train(training)
    x, policy = images_and_policy(model, size)
    assert torch.equal(model(x, torch.ones_like(policy)), model(x))


@pytest.mark.parametrize("kind", NETS)
def test_all_zeros_is_stem_shortcuts_pool_and_classifier(kind):
    make, size = NETS[kind]
    model = make()
    x, policy = images_and_policy(model, size)
    h = model.stem(x)
    if kind == "cifar":
        for extra in (2, 2):
            h = F.avg_pool2d(h, 2)
            h = torch.cat([h, torch.zeros_like(h[:, :extra])], dim=1)
    else:
        for k in (0, 1, 3, 5):  # where a stage begins; no ReLU follows, so negative features go on
            h = model.blocks[k].shortcut(h)
        assert (h < 0).any()
    linear = model.head[-1]
    exactly(model(x, torch.zeros_like(policy)), h.mean((2, 3)) @ linear.weight.T + linear.bias)


def test_blocks_that_the_whole_batch_drops_are_not_run():
    """Counted, and seen by the batch norms: those of a block that some image keeps move once, a shortcut's always."""
    model = bottleneck_net().train()
    x, policy = images_and_policy(model, 64)
    policy[:, 2] = policy[:, 3] = False
    policy[:, 4] = True
    policy[0, [0, 1, 5]] = True
    ran = {}
    for k, block in enumerate(model.blocks):
        block.residual.register_forward_hook(lambda *_, k=k: ran.update({k: ran.get(k, 0) + 1}))
    before = {name: b.clone() for name, b in model.named_buffers()}
    model(x, policy)
    assert ran == {0: 1, 1: 1, 4: 1, 5: 1}
    for name, after in model.named_buffers():
        dropped = name.startswith(("blocks.2.residual", "blocks.3.residual"))
        assert torch.equal(after, before[name]) == dropped, name
        if name.endswith("num_batches_tracked"):
            assert after == before[name] + (not dropped)


def test_gradients_are_those_of_each_image_alone():
    """In eval mode; an image gives none to a block that it drops."""
    model = cifar_net()
    x, policy = images_and_policy(model, 16, rows=4)
    policy[:, 4] = torch.tensor([True, False, False, False])

    def gradients(rows):
        gradients = torch.autograd.grad(
            model(x[rows], policy[rows]).square().sum(), list(model.parameters()), allow_unused=True
        )
        return [torch.zeros_like(p) if g is None else g for g, p in zip(gradients, model.parameters(), strict=True)]

    alone = [gradients(slice(i, i + 1)) for i in range(4)]
    for whole, *parts in zip(gradients(slice(4)), *alone, strict=True):
        torch.testing.assert_close(whole, sum(parts), rtol=1e-9, atol=1e-9)
    names = [name for name, _ in model.named_parameters()]
    inside = [i for i, name in enumerate(names) if name.startswith("blocks.4.residual")]
    assert all(alone[0][i].any() for i in inside)
    assert not any(alone[row][i].any() for i in inside for row in (1, 2, 3))


def test_forced_first_blocks_can_be_computed_once():
    """features(x, start), then forward_from under any policy: the bits of the whole forward with those blocks kept."""
    model = cifar_net()
    x, policy = images_and_policy(model, 20)
    for start in range(model.num_blocks + 1):
        forced = policy.clone()
        forced[:, :start] = True
        assert torch.equal(model.forward_from(model.features(x, start), policy, start), model(x, forced))
        assert torch.equal(model.forward_from(model.features(x, start), None, start), model(x))


def test_an_empty_batch():
    model = cifar_net()
    assert model(torch.zeros(0, 3, 20, 20).double(), torch.zeros(0, 9)).shape == (0, 5)


def test_pool_and_pad():
    """By hand; then for odd sizes the size that a strided 3x3 convolution gives, so a network takes any."""
    x = torch.arange(32.0).view(1, 2, 4, 4)
    expected = torch.zeros(1, 5, 2, 2)
    expected[0, :2] = torch.tensor([[[2.5, 4.5], [10.5, 12.5]], [[18.5, 20.5], [26.5, 28.5]]])
    assert torch.equal(PoolAndPad(5, 2)(x), expected)
    assert PoolAndPad(2, 2)(x[..., :3, :])[0, 0].tolist() == [[2.5, 4.5], [8.5, 10.5]]  # the last row has no other
    for size in ((7, 9), (28, 28), (1, 1), (50, 33)):
        assert resnet_cifar(14, classes=3, widths=(2, 2, 4))(torch.randn(2, 3, *size)).shape == (2, 3)


# ------------------------------------------------------------------------------------------------ torchvision
@pytest.mark.parametrize("training", [False, True])
@pytest.mark.parametrize(("kind", "layers"), [(BasicBlock, [2, 2, 2, 2]), (Bottleneck, [1, 2, 3, 1])])
def test_from_torchvision_gives_its_logits_to_the_bit(kind, layers, training):
    """And shares its weights."""
    torch.manual_seed(0)
    net = shaken(ResNet(kind, layers, num_classes=7)).float().train(training)
    model, x = from_torchvision(net), torch.randn(3, 3, 64, 64)
    assert model.num_blocks == sum(layers)
    assert model.classes == 7
    assert {id(p) for p in model.parameters()} == {id(p) for p in net.parameters()}
    assert torch.equal(model(x), net(x))
    assert torch.equal(model(x, torch.ones(3, sum(layers))), net(x))


def test_load_torchvision():
    torch.manual_seed(0)
    source = shaken(ResNet(Bottleneck, [1, 2, 3, 1], num_classes=7)).float().eval()
    model = from_torchvision(ResNet(Bottleneck, [1, 2, 3, 1], num_classes=7)).eval()
    x, state = torch.randn(2, 3, 64, 64), source.state_dict()
    load_torchvision(model, state)
    assert torch.equal(model(x), source(x))
    old = {name: value for name, value in state.items() if not name.endswith("num_batches_tracked")}
    load_torchvision(model, old)  # as files of old versions are
    before = {name: value.clone() for name, value in model.state_dict().items()}
    bad = {**state, "fc.weight": torch.zeros(9, 2048), "layer3.3.bn1.bias": torch.zeros(256)}
    del bad["layer2.1.conv2.weight"]
    told = "1 missing (layer2.1.conv2.weight); 1 unexpected (layer3.3.bn1.bias); 1 of another shape (fc.weight)"
    with pytest.raises(ValueError, match=re.escape(told)):
        load_torchvision(model, bad)
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())
    with pytest.raises(ValueError, match=r"\(layer1.1.conv1.weight, layer1.1.bn1.weight, layer1.1.bn1.bias, ...\)"):
        load_torchvision(model, torchvision.models.resnet50(num_classes=7).state_dict())


def test_load_torchvision_takes_cifar_networks_of_the_same_names():
    """Those that the official code starts from: conv1, bn1, layer1.0.conv1, ..., fc."""
    theirs = {"conv1.weight", "layer1.0.bn2.bias", "layer3.4.conv2.weight", "fc.bias"}
    model, state = resnet_cifar(32), {}
    for (name, value), ours in zip(model.state_dict().items(), resnet_cifar(32).state_dict().values(), strict=True):
        part, tensor = name.rsplit(".", 1)
        if part.startswith("blocks"):
            _, k, _, i = part.split(".")
            layer = {0: "conv1", 1: "bn1", 3: "conv2", 4: "bn2"}[int(i)]
            part = f"layer{int(k) // 5 + 1}.{int(k) % 5}.{layer}"
        part = {"stem.0": "conv1", "stem.1": "bn1", "head.2": "fc"}.get(part, part)
        state[f"{part}.{tensor}"] = ours
        assert value.shape == ours.shape
    assert theirs < set(state)
    load_torchvision(model, state)
    assert torch.equal(model.blocks[14].residual[3].weight, state["layer3.4.conv2.weight"])
    assert torch.equal(model.stem[0].weight, state["conv1.weight"])


# ------------------------------------------------------------------------------------------------ policy networks
def test_policies_start_near_one_half_and_stay_probabilities():
    torch.manual_seed(0)
    for net, size in ((policy_cifar(54), 32), (policy_imagenet(33), 64)):
        x = torch.randn(16, 3, size, size)
        s = net(x)
        assert s.shape == (16, net.num_blocks)
        assert s.mean().item() == pytest.approx(0.5, abs=0.1)
        with torch.no_grad():
            net.net.head[-1].bias.fill_(3)
        assert torch.equal(net(x), net.net(x if size == 32 else F.avg_pool2d(x, 2)).sigmoid())
        assert net(x).gt(0.5).all()
        assert net(x).lt(1).all()


def test_imagenet_policy_starts_from_a_resnet18():
    """Its stem and the first block of each stage, run by hand on the image at half its size; a classifier of its own."""
    torch.manual_seed(0)
    resnet18, policy_net = shaken(torchvision.models.resnet18()).float().eval(), policy_imagenet(33).eval()
    linear = policy_net.net.head[-1]
    before = linear.weight.clone()
    load_resnet18(policy_net, resnet18.state_dict())
    assert torch.equal(linear.weight, before)
    x = torch.randn(2, 3, 96, 96)
    h = resnet18.maxpool(resnet18.relu(resnet18.bn1(resnet18.conv1(F.avg_pool2d(x, 2)))))
    for layer in (resnet18.layer1, resnet18.layer2, resnet18.layer3, resnet18.layer4):
        h = layer[0](h)
    torch.testing.assert_close(policy_net(x), linear(h.mean((2, 3))).sigmoid(), rtol=1e-5, atol=1e-6)
    for other in (torchvision.models.resnet34, torchvision.models.resnet50):
        with torch.device("meta"):
            state = other().state_dict()
        with pytest.raises(ValueError, match="does not fit"):
            load_resnet18(policy_net, state)


# ------------------------------------------------------------------------------------------------ bad input
def test_bad_input():
    for depth in (2, 7, 33, -4):
        with pytest.raises(ValueError, match=f"depth={depth}, expected 6n"):
            resnet_cifar(depth)
    for widths in ((16, 32), (16, 32, 16), (0, 1, 2)):
        with pytest.raises(ValueError, match="expected three widths"):
            resnet_cifar(8, widths=widths)
    model, x = resnet_cifar(8, widths=(2, 2, 2)), torch.zeros(2, 3, 8, 8)
    for shape in ((3, 8, 8), (2, 1, 8, 8)):
        with pytest.raises(ValueError, match=r"expected \(B, 3, H, W\)"):
            model(torch.zeros(shape))
    for policy in (torch.ones(3), torch.ones(2, 4), torch.ones(3, 3)):
        with pytest.raises(ValueError, match=r"expected \(2, 3\)"):
            model(x, policy)
    for value in (0.5, -1.0, 2.0, torch.nan):
        policy = torch.ones(2, 3)
        policy[1, 2] = value
        with pytest.raises(ValueError, match="other values than 0"):
            model(x, policy)


def test_skip_of_a_block_is_its_shortcut():
    block, x = Block(nn.Conv2d(3, 3, 1), nn.Identity()), torch.randn(2, 3, 4, 4)
    assert block.skip(x) is x
    exactly(block(x), F.relu(x + block.residual(x)))

"""The engine against the masked forward, what it really runs, and its benchmark."""

import pytest
import torch
from torch import nn
from torchvision.models.resnet import Bottleneck, ResNet

from papers.blockdrop import bench
from papers.blockdrop.cost import costs, mult_adds
from papers.blockdrop.engine import SkippingEngine, chunk_for, for_inference, in_chunks, plan
from papers.blockdrop.model import from_torchvision, resnet_cifar
from papers.blockdrop.policy import PolicyNet, policy_cifar


def network(kind="cifar"):
    """In eval mode, float64, batch norms as after training: 9 blocks, or 6 with convolutions in shortcuts."""
    torch.manual_seed(0)
    if kind == "cifar":
        model = resnet_cifar(20, classes=5, widths=(4, 6, 8))
    else:
        model = from_torchvision(ResNet(Bottleneck, [1, 2, 2, 1], num_classes=5))
    for module in model.modules():
        if isinstance(module, nn.BatchNorm2d):
            module.running_mean.normal_(0, 0.2)
            module.running_var.uniform_(0.5, 1.5)
            nn.init.uniform_(module.weight, 0.5, 1.5)
            nn.init.normal_(module.bias, 0, 0.2)
    return model.double().eval()


def policies(rows, blocks, keep=0.5):
    return torch.rand(rows, blocks, generator=torch.Generator().manual_seed(1)) < keep


def assert_same(engine, model, x, policy):
    found, used = engine(x, policy)
    assert torch.equal(used, policy.bool())
    torch.testing.assert_close(found, model(x, policy), rtol=1e-10, atol=1e-10)


@pytest.mark.parametrize("keep", [0.2, 0.5, 0.8])
@pytest.mark.parametrize("kind", ["cifar", "bottleneck"])
@torch.no_grad()
def test_equals_the_masked_forward(kind, keep):
    """For chunks of one image, of a few, of all; for one image, for none; policies of any type; again and again."""
    model, size = network(kind), 16 if kind == "cifar" else 24
    x = torch.randn(23, 3, size, size, dtype=torch.double)
    policy = policies(23, model.num_blocks, keep)
    for chunk in (None, 1, 6, 23):
        engine = SkippingEngine(model, chunk=chunk)
        assert_same(engine, model, x, policy)
        assert_same(engine, model, x[3:12], policy[3:12].float())
        assert_same(engine, model, x[:1], policy[:1].long())
        assert_same(engine, model, x[:0], policy[:0])


@pytest.mark.parametrize("kind", ["cifar", "bottleneck"])
@torch.no_grad()
def test_all_none_and_few_policies(kind):
    model, size = network(kind), 16 if kind == "cifar" else 24
    x, K = torch.randn(20, 3, size, size, dtype=torch.double), model.num_blocks
    few = policies(3, K)[torch.arange(20) % 3]
    for policy in (torch.ones(20, K), torch.zeros(20, K), few):
        for chunk in (4, 20):
            assert_same(SkippingEngine(model, chunk=chunk), model, x, policy)
    kept_by_one = torch.zeros(20, K)
    kept_by_one[7] = 1
    assert_same(SkippingEngine(model), model, x, kept_by_one)
    assert_same(SkippingEngine(model), model, x, 1 - kept_by_one)


@pytest.mark.parametrize("shape", [(2, 1), (5, 2), (16, 9), (40, 54), (7, 33)])
def test_plan_gives_each_block_the_rows_that_keep_it(shape):
    """Rows followed by number; among all policies, and where all, none or one of the rows keep a block."""
    policy = policies(*shape)
    policy[0] = True
    policy[:, shape[1] // 2] = False
    orders, moved, slices = plan(policy)
    assert orders.shape == ((shape[1] + 1) // 2 + 1, shape[0])
    assert len(slices) == shape[1]
    rows = torch.arange(shape[0])
    for k, found in enumerate(slices):
        if k % 2 == 0:
            assert moved[k // 2] == (not torch.equal(rows[orders[k // 2]], rows))
            rows = rows[orders[k // 2]]
        assert sorted(rows[found].tolist()) == policy[:, k].nonzero()[:, 0].tolist()
    assert torch.equal(rows[orders[-1]], torch.arange(shape[0]))


def test_nothing_moves_where_policies_are_equal():
    policy = policies(1, 9).expand(4, 9)
    _, moved, slices = plan(policy)
    assert not any(moved)
    assert slices == [slice(0, 4 * keep) for keep in policy[0].tolist()]


@pytest.mark.parametrize("chunk", [None, 5])
@torch.no_grad()
def test_a_dropped_block_is_not_run(chunk):
    """Images that every convolution really sees: in a block, those that keep it; in stem and shortcuts, all."""
    model = network("bottleneck")
    engine, policy, seen = SkippingEngine(model, chunk=chunk), policies(12, 6), {}
    policy[:, 3] = False
    names = {module: name for name, module in engine.model.named_modules()}

    def count(module, inputs):
        seen[names[module]] = seen.get(names[module], 0) + len(inputs[0])

    for module in names:
        if isinstance(module, nn.Conv2d | nn.Linear):
            module.register_forward_pre_hook(count)
    engine(torch.randn(12, 3, 24, 24, dtype=torch.double), policy)
    assert any(name.startswith("blocks.1.shortcut") for name in seen)
    for name, rows in seen.items():
        inside = name.startswith("blocks") and ".residual." in name
        assert rows == (policy[:, int(name.split(".")[1])].sum() if inside else 12), name
    assert not any(name.startswith("blocks.3.residual") for name in seen)


@torch.no_grad()
def test_policy_network_decides():
    """u = 1[s >= 0.5]; a policy that is given is taken instead, and the network is not asked."""
    model, policy_net = network(), PolicyNet(resnet_cifar(8, 9, widths=(4, 4, 4)).double(), shrink=2).eval()
    x = torch.randn(30, 3, 16, 16, dtype=torch.double)
    policy_net.net.head[-1].bias -= policy_net.net(x).median(0).values  # half of the images keep each block
    expected = policy_net(x) >= 0.5
    assert 0 < expected.double().mean() < 1
    engine = SkippingEngine(model, policy_net, chunk=8)
    logits, used = engine(x)
    assert torch.equal(used, expected)
    torch.testing.assert_close(logits, model(x, expected), rtol=1e-10, atol=1e-10)
    assert torch.equal(engine.policies(x), expected)
    engine.policy_net = None
    assert_same(engine, model, x, ~expected)
    with pytest.raises(ValueError, match="without a policy network"):
        engine(x)


def test_networks_and_input_are_left_as_they_are():
    model, x, policy = network().train(), torch.randn(9, 3, 16, 16, dtype=torch.double), policies(9, 9)
    x = x.contiguous(memory_format=torch.channels_last)
    before = {name: value.clone() for name, value in model.state_dict().items()}
    given = x.clone(), policy.clone()
    SkippingEngine(model)(x, policy)
    assert model.training
    assert all(p.requires_grad for p in model.parameters())
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())
    assert torch.equal(x, given[0])
    assert torch.equal(policy, given[1])


@pytest.mark.parametrize("kind", ["cifar", "bottleneck"])
@torch.no_grad()
def test_for_inference(kind):
    """Same logits without any batch norm, whole or in chunks."""
    model, x = network(kind), torch.randn(7, 3, 24, 24, dtype=torch.double)
    fast = for_inference(model)
    assert not any(isinstance(m, nn.BatchNorm2d) for m in fast.modules())
    for found in (fast(x), in_chunks(fast, x), in_chunks(fast, x, 3)):
        torch.testing.assert_close(found, model(x), rtol=1e-10, atol=1e-10)


def test_chunks():
    sizes = [chunk_for(torch.empty(256, 3, n, n)) for n in (32, 64, 224, 512)]
    assert sizes == [64, 16, 4, 4]
    assert chunk_for(torch.empty(256, 3, 32, 32, device="meta")) == 256


def test_bad_input():
    model = network()
    with pytest.raises(ValueError, match="a policy of 7 bits for 9 blocks"):
        SkippingEngine(model, policy_cifar(7))
    with pytest.raises(ValueError, match="chunk=0"):
        SkippingEngine(model, chunk=0)
    engine, x = SkippingEngine(model), torch.zeros(2, 3, 16, 16, dtype=torch.double)
    for shape in ((3, 16, 16), (2, 1, 16, 16)):
        with pytest.raises(ValueError, match=r"expected \(B, 3, H, W\)"):
            engine(torch.zeros(shape), torch.ones(2, 9))
    for bad in (torch.ones(9), torch.ones(2, 8), torch.ones(3, 9)):
        with pytest.raises(ValueError, match=r"expected \(2, 9\)"):
            engine(x, bad)
    with pytest.raises(ValueError, match="other values than 0"):
        engine(x, torch.full((2, 9), 0.5))


@pytest.mark.gpu
@torch.no_grad()
def test_on_a_gpu():
    model = network().cuda()
    x, policy = torch.randn(40, 3, 32, 32, dtype=torch.double).cuda(), policies(40, 9).cuda()
    for chunk in (None, 16):
        assert_same(SkippingEngine(model, chunk=chunk), model, x, policy)


# ------------------------------------------------------------------------------------------------ benchmark
@pytest.fixture
def tiny(monkeypatch):
    made = bench.Network(lambda: resnet_cifar(20), lambda: policy_cifar(9), 16, (3, 6), 4)
    monkeypatch.setitem(bench.NETWORKS, "r110", made)
    return made


def test_figures_of_the_benchmark(tiny):
    figures = bench.skipping_bench(2, rounds=1, min_run_time=1e-3)
    cases = ["3_own", "3_few", "6_own", "6_few"]
    names = [f"{part}_{case}" for case in cases for part in ("mult_adds", "time", "saving")]
    assert [*figures] == ["full_s", "policy_time", "policy_mult_adds", *names]
    cost = costs(tiny.model(), tiny.policy_net(), 16)
    full = cost.fixed + sum(cost.blocks)
    assert figures["policy_mult_adds"] == cost.policy / full
    for case in cases:
        share, kept = figures[f"mult_adds_{case}"], int(case[0])
        some = [mult_adds(cost, torch.eye(9)[chosen].sum(0)).item() / full for chosen in ([1] * kept, [3] * kept)]
        assert min(some) <= share <= max(some)
        assert figures[f"saving_{case}"] == (1 - figures[f"time_{case}"]) / (1 - share)
    assert bench.table(figures, 2).count("\n") == 6


def test_policies_of_the_benchmark():
    own, few = bench.random_policies(256, 54, 17, "own"), bench.random_policies(256, 54, 17, "few")
    assert own.sum(1).eq(17).all()
    assert few.sum(1).eq(17).all()
    assert len(own.unique(dim=0)) == 256
    assert len(few.unique(dim=0)) == bench.FEW


def test_benchmark_refuses_a_wrong_engine(tiny):
    model, x = tiny.model().eval(), torch.randn(4, 3, 16, 16)
    policy = bench.random_policies(4, 9, 3, "own")
    with torch.no_grad():
        expected = model(x, policy)
        bench.check(SkippingEngine(model), x, policy, expected)
        with pytest.raises(AssertionError, match="the engine differs by"):
            bench.check(SkippingEngine(model), x, ~policy, expected)
        with pytest.raises(AssertionError, match="the engine differs by"):
            bench.check(SkippingEngine(model), x, policy, expected.flip(0))
    for wrong in ({"rounds": 0}, {"batch": 0}, {"network": "r18"}):
        with pytest.raises(ValueError, match="expected at least 1, one of"):
            bench.skipping_bench(**wrong)

"""Learned group convolution: schedule, pruning, lasso, gradients."""

import pytest
import torch
import torch.nn.functional as F

from papers.condensenet.layers import CondensedConv, CondensedLinear, LearnedGroupConv, stage_of

SHAPES = [(4, 4, 16, 32), (4, 2, 16, 12), (4, 8, 24, 32), (8, 4, 16, 16), (2, 3, 12, 6), (1, 4, 8, 5)]  # G, C, R, O


def layer_of(G, C, R, O, score="magnitude", seed=0):
    torch.manual_seed(seed)
    return LearnedGroupConv(R, O, G, C, score=score)


def pruned_one_by_one(weight, mask, G, size):
    """The definition: in each group, `size` times, the least important of the inputs still there goes."""
    mask = mask.clone()
    for g in range(G):
        for _ in range(size):
            importance = {
                j: sum(abs(weight[i, j].item()) for i in range(g, len(weight), G))
                for j in range(weight.shape[1])
                if mask[g, j]
            }
            mask[g::G, min(importance, key=importance.get)] = 0
    return mask


@pytest.mark.parametrize(("C", "ends"), [(4, [1 / 6, 1 / 3, 1 / 2]), (2, [1 / 2]), (8, [i / 14 for i in range(1, 8)])])
def test_stages_end_evenly_over_the_first_half(C, ends):
    for i, end in enumerate(ends):
        assert stage_of(end - 1e-9, C) == i
        assert stage_of(end + 1e-9, C) == i + 1
    assert stage_of(0, C) == 0
    assert stage_of(0.5, C) == stage_of(1.0, C) == C - 1


def test_stage_of_dense_and_of_bad_progress():
    assert stage_of(0.7, 1) == 0
    for progress in (-0.1, 1.1, float("nan")):
        with pytest.raises(ValueError, match="iterations done"):
            stage_of(progress, 4)


@pytest.mark.parametrize(("G", "C", "R", "O"), SHAPES)
def test_each_stage_removes_what_the_definition_removes(G, C, R, O):
    layer, expected = layer_of(G, C, R, O), torch.ones(O, R)
    for stage in range(1, C):
        layer.weight.data.normal_()  # as if trained in between: inputs removed before may have the largest weights
        expected = pruned_one_by_one(layer.weight[:, :, 0, 0], expected, G, R // C)
        assert layer.prune_to(stage)
        assert torch.equal(layer.mask[:, :, 0, 0], expected)
        assert layer.density == pytest.approx(1 - stage / C)
        assert not layer.prune_to(stage)
        assert not layer.prune_to(0)
        assert torch.equal(layer.mask[:, :, 0, 0], expected)
    assert layer.kept().sum(1).tolist() == [R / C] * G
    assert layer.density == pytest.approx(1 / C)


@pytest.mark.parametrize("progresses", [(0, 0.9), (0, 0.4, 0.9), (1.0,), (0.2, 0.21, 0.5)])
def test_stages_jumped_over_are_made_up(progresses):
    layer = layer_of(4, 4, 16, 32)
    stages = layer_of(4, 4, 16, 32)
    for progress in progresses:
        layer.prune_to(stage_of(progress, 4))
    for stage in (1, 2, 3):
        stages.prune_to(stage)
    assert layer.density == 1 / 4
    assert torch.equal(layer.mask, stages.mask)


def test_columns_of_zeros_do_not_take_the_place_of_removed_ones():
    layer = layer_of(2, 4, 8, 4)
    layer.prune_to(1)
    gone = layer.kept() == 0
    layer.weight.data.zero_()  # all scores tie at zero
    layer.prune_to(2)
    assert layer.density == 0.5
    assert not layer.kept()[gone].any()


def test_random_scores_follow_the_same_schedule_and_ignore_the_weights():
    layer = layer_of(4, 4, 64, 32, score="random")
    magnitude = layer_of(4, 4, 64, 32)
    before = layer.kept().clone()
    for stage in (1, 2, 3):
        layer.prune_to(stage)
        magnitude.prune_to(stage)
        assert layer.density == 1 - stage / 4
        assert not (layer.kept() > before).any()  # never regrows
        before = layer.kept().clone()
    assert not torch.equal(layer.mask, magnitude.mask)
    again = layer_of(4, 4, 64, 32, score="random")
    for stage in (1, 2, 3):
        again.prune_to(stage)
    assert torch.equal(layer.mask, again.mask)  # torch's seed decides


def test_forward_is_bn_relu_masked_convolution():
    layer = layer_of(4, 4, 16, 32).double()
    layer.prune_to(3)
    x = torch.randn(3, 16, 5, 4, dtype=torch.float64)
    normed = (x - x.mean((0, 2, 3), keepdim=True)) / (x.var((0, 2, 3), correction=0, keepdim=True) + 1e-5).sqrt()
    expected = torch.einsum("or,nrhw->nohw", (layer.weight * layer.mask)[:, :, 0, 0], normed.clamp(min=0))
    assert torch.allclose(layer(x), expected, atol=1e-12)


def test_dropout_is_between_relu_and_convolution_and_off_in_eval():
    torch.manual_seed(0)
    layer = LearnedGroupConv(2000, 4, 1, 1, dropout=0.25).eval()
    layer.weight.data.fill_(1)
    x = torch.ones(1, 2000, 2, 2)
    assert torch.allclose(layer(x), torch.full((1, 4, 2, 2), 2000.0), rtol=1e-3)
    layer.train()
    layer.norm.eval()
    out = layer(x)
    # every output reads the same dropped inputs, so all outputs agree at a pixel; pixels differ
    assert torch.allclose(out, out[:, :1].expand_as(out))
    assert out[0, 0].unique().numel() > 1
    assert torch.allclose(out, torch.full_like(out, 2000), rtol=0.1)


def test_masked_weights_get_no_gradient_and_the_others_do():
    layer = layer_of(4, 4, 16, 32)
    layer.prune_to(2)
    layer(torch.randn(2, 16, 4, 4)).square().sum().backward()
    assert torch.equal(layer.weight.grad != 0, layer.mask != 0)


def test_lasso_closed_form():
    layer = layer_of(4, 4, 16, 32)
    layer.weight.data.fill_(1)
    assert layer.lasso().item() == pytest.approx(181.019, abs=1e-3)  # R G sqrt(O / G)
    for stage in (1, 2, 3):
        layer.prune_to(stage)
        assert layer.lasso().item() == pytest.approx(181.0193 * (1 - stage / 4), abs=1e-3)


def test_lasso_gradient():
    layer = layer_of(4, 4, 16, 32).double()
    layer.prune_to(1)
    layer.lasso().backward()
    weight = layer.weight.detach()[:, :, 0, 0]
    norms = torch.stack([weight[g::4].norm(dim=0) for g in range(4)]).repeat(8, 1)
    assert torch.allclose(layer.weight.grad[:, :, 0, 0], weight / norms * layer.mask[:, :, 0, 0], atol=1e-12)
    layer.weight.data.zero_()
    layer.weight.grad = None
    layer.lasso().backward()
    assert layer.weight.grad.eq(0).all()


def test_state_dict_holds_stage_and_mask():
    layer, other = layer_of(4, 4, 16, 32), layer_of(4, 4, 16, 32, seed=1)
    layer.prune_to(2)
    other.load_state_dict(layer.state_dict())
    assert other.stage == 2
    assert not other.prune_to(2)
    other.prune_to(3)
    layer.prune_to(3)
    assert torch.equal(other.mask, layer.mask)
    with pytest.raises(RuntimeError, match="_extra_state"):
        other.load_state_dict({k: v for k, v in layer.state_dict().items() if k != "_extra_state"})


def test_static_group_convolution_against_its_definition():
    torch.manual_seed(0)
    layer = CondensedConv(12, 8, 4).double().eval()
    layer.norm.running_mean.normal_()
    x = torch.randn(2, 12, 3, 3, dtype=torch.float64)
    rectified = layer.norm(x).clamp(min=0)
    out = layer(x)
    for g in range(4):
        group = torch.einsum(
            "or,nrhw->nohw", layer.conv.weight[2 * g : 2 * g + 2, :, 0, 0], rectified[:, 3 * g : 3 * g + 3]
        )
        assert torch.allclose(out[:, g::4], group, atol=1e-12)  # group g is at channels g, g + G
    # the identity as an index is the same layer
    gathering = CondensedConv(12, 8, 4, 4).double().eval()
    assert gathering.index.tolist() == list(range(12))
    gathering.load_state_dict(layer.state_dict())
    assert torch.equal(gathering(x), out)
    out.sum().backward()
    assert all(p.grad.ne(0).any() for p in layer.parameters())


def test_condensed_layers_read_only_what_their_index_lists():
    torch.manual_seed(0)
    layer = CondensedConv(4, 4, 2, 2).eval()
    layer.index.copy_(torch.tensor([3, 0, 0, 2]))  # group 0 reads 3 and 0, group 1 reads 0 and 2, nobody 1
    layer.conv.weight.data.fill_(1)
    x = torch.tensor([1.0, 10, 100, 1000]).view(1, 4, 1, 1)
    assert layer(x).flatten().tolist() == pytest.approx([1001, 101, 1001, 101], rel=1e-4)
    linear = CondensedLinear(4, 1, 2)
    linear.index.copy_(torch.tensor([1, 3]))
    expected = F.linear(x.flatten()[[1, 3]], linear.linear.weight, linear.linear.bias)
    assert torch.allclose(linear(x.flatten(1)), expected)


@pytest.mark.parametrize(("R", "O", "G", "C"), [(6, 8, 4, 2), (8, 8, 4, 3), (8, 6, 4, 4), (8, 8, 0, 4), (8, 8, 4, 0)])
def test_sizes_that_do_not_divide(R, O, G, C):
    for kind in (LearnedGroupConv, CondensedConv):
        with pytest.raises(ValueError, match="R divisible by G and by C, and O divisible by G"):
            kind(R, O, G, C)


def test_bad_arguments():
    with pytest.raises(ValueError, match="'magnitude' or 'random'"):
        LearnedGroupConv(8, 8, 4, 4, score="l2")
    for stage in (-1, 4):
        with pytest.raises(ValueError, match="expected 0 .. C - 1 = 3"):
            LearnedGroupConv(8, 8, 4, 4).prune_to(stage)
    with pytest.raises(ValueError, match="keep=5 of 4 features"):
        CondensedLinear(4, 2, 5)
    with pytest.raises(ValueError, match="O divisible by G"):
        CondensedConv(9, 8, 4)

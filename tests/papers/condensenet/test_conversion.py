"""The condensed network computes what the trained one computes."""

import pytest
import torch

from papers.condensenet import CondensedConv, CondensedLinear, CondenseNet, LearnedGroupConv, condense, condensed_like
from papers.condensenet.conversion import _condense_conv, _condense_linear


def trained(G=4, C=4, reduction=None, dtype=torch.float32, conv="learned"):
    """A network with batch-norm statistics and affine parameters of its own, fully pruned, in eval mode."""
    torch.manual_seed(0)
    model = CondenseNet((2, 2, 2), (8, 16, 32), G, C, G, reduction=reduction, dropout=0.1, conv=conv).to(dtype)
    for m in model.modules():
        if isinstance(m, torch.nn.BatchNorm2d):
            m.weight.data.uniform_(0.5, 1.5)
            m.bias.data.normal_(0, 0.3)
            m.running_mean.normal_(0, 0.3)
            m.running_var.uniform_(0.5, 1.5)
    model.prune(0.5)
    return model.eval()


def test_hand_example():
    layer = LearnedGroupConv(4, 4, 2, 2)
    rows = torch.tensor([[9.0, 1, 5, 3], [1, 9, 3, 5], [8, 2, 5, 3], [2, 8, 3, 5]])
    layer.weight.data.copy_(rows[:, :, None, None])
    layer.prune_to(1)
    assert layer.kept().tolist() == [[1, 0, 1, 0], [0, 1, 0, 1]]
    condensed = _condense_conv(layer)
    assert condensed.index.tolist() == [0, 2, 1, 3]
    assert condensed.conv.weight.flatten(1).tolist() == [[9, 5], [8, 5], [9, 5], [8, 5]]


@pytest.mark.parametrize("reduction", [None, 0.5])
@pytest.mark.parametrize(("G", "C"), [(4, 4), (4, 2), (4, 8), (8, 4)])
def test_features_are_those_of_the_training_form(G, C, reduction):
    x = torch.randn(2, 3, 16, 16, generator=torch.Generator().manual_seed(1))
    for dtype, tolerance in ((torch.float32, 1e-6), (torch.float64, 1e-13)):
        model = trained(G, C, reduction, dtype)
        condensed = condense(model)
        assert not any(isinstance(m, LearnedGroupConv) for m in condensed.modules())
        with torch.no_grad():
            expected, got = model.features(x.to(dtype)), condensed.features(x.to(dtype))
        assert expected.abs().max() > 0.1
        assert (got - expected).abs().max() < tolerance * expected.abs().max()


def test_random_pruning_condenses_too():
    model, x = trained(conv="random"), torch.randn(2, 3, 8, 8)
    with torch.no_grad():
        assert torch.allclose(condense(model).features(x), model.features(x), atol=1e-5)


def test_without_the_classifier_logits_agree_and_with_it_they_do_not():
    model, x = trained(), torch.randn(2, 3, 8, 8)
    with torch.no_grad():
        logits = model(x)
        assert torch.allclose(condense(model, classifier=False)(x), logits, atol=1e-5)
        assert not torch.allclose(condense(model)(x), logits, atol=1e-3)


def test_classifier_keeps_the_half_with_the_largest_column_sums():
    linear = torch.nn.Linear(5, 2)
    linear.weight.data.copy_(torch.tensor([[1.0, -4, 0, 2, 3], [1, 3, 0.5, -2, -9]]))  # sums 2 7 .5 4 12
    condensed = _condense_linear(linear)
    assert condensed.index.tolist() == [1, 4]  # 5 // 2 = 2 features
    x = torch.randn(3, 5)
    zeroed = x * torch.tensor([0, 1, 0, 0, 1])
    assert torch.allclose(condensed(x), linear(zeroed), atol=1e-6)


def test_condense_leaves_the_model_and_the_random_stream_alone():
    model = trained().train()
    before, stream = {k: v.clone() for k, v in model.state_dict().items()}, torch.get_rng_state()
    condensed = condense(model)
    assert torch.equal(torch.get_rng_state(), stream)
    assert model.training
    assert not condensed.training
    for p in (*condensed.parameters(), *condensed.buffers()):
        p.data.fill_(0)
    assert all(torch.equal(v, before[k]) for k, v in model.state_dict().items())
    assert isinstance(model.blocks[0][0].conv1, LearnedGroupConv)


def test_saved_condensed_network_loads_into_the_empty_one():
    model, x = trained(4, 8), torch.randn(2, 3, 8, 8)
    condensed = condense(model)
    empty = condensed_like(CondenseNet((2, 2, 2), condense_factor=8, dropout=0.1))
    assert isinstance(empty.blocks[0][0].conv1, CondensedConv)
    assert isinstance(empty.classifier, CondensedLinear)
    empty.load_state_dict(condensed.state_dict())
    with torch.no_grad():
        assert torch.equal(empty(x), condensed(x))


def test_not_fully_pruned():
    model = trained()
    fresh = CondenseNet((1, 1), (8, 16))
    with pytest.raises(ValueError, match=r"blocks.0.0.conv1: density 1, expected 1/C = 0.25.*model.prune\(0.5\)"):
        condense(fresh)
    fresh.prune(0.4)
    with pytest.raises(ValueError, match="density 0.5, expected"):
        condense(fresh)
    with pytest.raises(ValueError, match="condensed already"):
        condense(condense(model))
    # the right number of weights in all, but not in each group
    layer = model.blocks[1][0].conv1
    layer.mask[0::4] = 1
    layer.mask[1::4] = 0
    layer.mask[2::4] = 0
    layer.mask[3::4] = 0
    assert layer.density == 0.25
    with pytest.raises(ValueError, match="in every group"):
        condense(model)

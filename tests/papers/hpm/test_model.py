"""The network and its parts: counts, head by head, erasing, the loss, what is refused."""

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from common.metrics.compute import mult_adds, parameters
from papers.hpm import HPM, HorizontalErasing, PyramidHead, pyramid_loss, resnet50, small
from papers.hpm.kernels import reference


def tiny(**changed) -> HPM:
    torch.manual_seed(0)
    return HPM(small(16), 16, **{"identities": 7, "dim": 6, **changed})


# ------------------------------------------------------------------------------------------------ counts
@pytest.mark.parametrize(("identities", "total"), [(751, 34_263_872), (702, 34_075_712)])
def test_parameters(identities, total):
    with torch.device("meta"):
        model = HPM(resnet50(), 2048, identities)
    assert parameters(model.backbone) == 23_508_032
    assert parameters(model.head) == 7_872_000 + 3_840 * identities
    assert parameters(model) == total


def test_shapes_and_mult_adds_of_the_papers_network():
    with torch.device("meta"):
        model, image = HPM(resnet50(), 2048, 751), torch.empty(1, 3, 384, 128)
    assert model.backbone(image).shape == (1, 2048, 24, 8)
    assert [tuple(part.shape) for part in model(image.expand(2, -1, -1, -1)).unbind(0)] == [(2, 751)] * 15
    assert model.eval()(image).shape == (1, 3840)
    assert round(mult_adds(model.backbone, image) / 1e9, 4) == 6.0799

    class Training(nn.Module):
        def forward(self, x):
            return model.head.logits(model.descriptor(x))

    assert round(mult_adds(Training(), image) / 1e9, 4) == 6.0907


def test_stage_sizes_are_those_of_the_table():
    with torch.device("meta"):
        net, x, sizes = resnet50(), torch.empty(1, 3, 384, 128), {}
        for name, part in net.named_children():
            x = part(x)
            sizes[name] = tuple(x.shape[1:])
    assert sizes["conv1"] == (64, 192, 64)
    assert sizes["maxpool"] == (64, 96, 32)
    expected = {"layer1": (256, 96, 32), "layer2": (512, 48, 16), "layer3": (1024, 24, 8), "layer4": (2048, 24, 8)}
    assert {name: sizes[name] for name in expected} == expected
    dilated = [m for m in net.modules() if isinstance(m, nn.Conv2d) and m.dilation != (1, 1)]
    assert dilated == [], "stride 1 is not dilation"


def test_initial_deviations_of_the_new_layers():
    torch.manual_seed(0)
    head = PyramidHead(15, 2048, 256, 751)
    assert head.reduce.std().item() == pytest.approx(0.0884, rel=0.01)
    assert head.classify.std().item() == pytest.approx(0.001, rel=0.01)
    assert (head.norm.weight == 1).all()
    assert (head.norm.bias == 0).all()


# ------------------------------------------------------------------------------------------------ the head
def test_grouped_heads_are_separate_heads():
    """Against 15 convolutions, norms and linear layers with the same weights, in training and in evaluation, with gradients."""
    torch.manual_seed(0)
    head, pooled, labels = PyramidHead(15, 10, 4, 7).double(), torch.randn(15, 6, 10).double(), torch.arange(6)
    with torch.no_grad():
        head.norm.weight.normal_()
        head.norm.bias.normal_()
        head.classify.normal_()
    alone = []
    for k in range(15):
        parts = nn.Conv2d(10, 4, 1, bias=False), nn.BatchNorm2d(4), nn.Linear(4, 7, bias=False)
        conv, norm, line = nn.ModuleList(parts).double()
        own = slice(4 * k, 4 * k + 4)
        with torch.no_grad():
            conv.weight.copy_(head.reduce[k].T[..., None, None])
            norm.weight.copy_(head.norm.weight[own])
            norm.bias.copy_(head.norm.bias[own])
            line.weight.copy_(head.classify[k].T)
        alone.append(nn.ModuleList([conv, norm, line]))
    for train in (True, True, False):
        head.train(train)
        features = head(pooled)
        expected = []
        for k, parts in enumerate(alone):
            parts.train(train)
            expected.append(F.relu(parts[1](parts[0](pooled[k][..., None, None]))).flatten(1))
        assert torch.allclose(features, torch.cat(expected, 1), rtol=1e-10, atol=1e-12), "in the order of the bins"
        logits = torch.stack([parts[2](h) for parts, h in zip(alone, expected, strict=True)])
        assert torch.allclose(head.logits(features), logits, rtol=1e-10, atol=1e-12)
        (grad,) = torch.autograd.grad(pyramid_loss(head.logits(features), labels), head.reduce)
        loss = sum(F.cross_entropy(part, labels) for part in logits)
        for k, parts in enumerate(alone):
            (own,) = torch.autograd.grad(loss, parts[0].weight, retain_graph=True)
            assert torch.allclose(grad[k].T, own[..., 0, 0], rtol=1e-8, atol=1e-10)


def test_descriptor_is_the_heads_on_the_pooled_map():
    model, x = tiny().eval(), torch.randn(3, 3, 64, 24)
    pooled = reference(model.backbone(x), (1, 2, 4, 8))
    assert torch.allclose(model(x), model.head(pooled), atol=1e-6)
    assert model(x).shape == (3, 90)
    model = tiny(scales=(8,), pool="max").eval()
    assert torch.allclose(model(x), model.head(reference(model.backbone(x), (8,), "max")), atol=1e-6)


def test_nothing_is_detached():
    model = tiny(erasing=0.5)
    pyramid_loss(model(torch.randn(4, 3, 64, 24)), torch.arange(4)).backward()
    assert all(p.grad is not None and p.grad.abs().sum() > 0 for p in model.parameters())


def test_every_bin_has_weights_of_its_own():
    model = tiny()
    logits = model(torch.randn(4, 3, 64, 24))
    F.cross_entropy(logits[3], torch.arange(4)).backward()
    touched = model.head.reduce.grad.abs().sum((1, 2)).nonzero()[:, 0].tolist()
    assert touched == [3]
    assert model.head.classify.grad.abs().sum((1, 2)).nonzero()[:, 0].tolist() == [3]


# ------------------------------------------------------------------------------------------------ loss
def test_loss_is_the_sum_over_the_bins():
    torch.manual_seed(0)
    logits, labels = torch.randn(15, 4, 9), torch.tensor([0, 8, 3, 3])
    for smoothing in (0.0, 0.1):
        expected = 0
        for part in logits:
            p = part.log_softmax(1)
            hard = -p[torch.arange(4), labels].mean()
            expected = expected + (1 - smoothing) * hard - smoothing * p.mean()
        assert pyramid_loss(logits, labels, smoothing).item() == pytest.approx(expected.item(), rel=1e-5)
    uniform = pyramid_loss(torch.zeros(15, 4, 751), labels)
    assert uniform.item() == pytest.approx(15 * torch.tensor(751.0).log().item(), rel=1e-5)


# ------------------------------------------------------------------------------------------------ erasing
def test_erasing_is_the_identity_in_evaluation_and_at_p_0():
    x = torch.randn(4, 3, 24, 8)
    assert HorizontalErasing(1.0).eval()(x) is x
    assert HorizontalErasing(0.0)(x) is x


def test_erasing_zeroes_one_stripe_of_up_to_a_third():
    """Over many draws: probability, heights 1 to 8 of 24 alike, every place alike; the other rows as they were."""
    torch.manual_seed(0)
    erase, n = HorizontalErasing(0.5), 40_000
    x = torch.randn(64, 3, 24, 8)
    out = erase(x)
    gone = (out == 0).all(3).all(1)
    assert torch.equal(out[~gone[:, None].expand(-1, 3, -1)], x[~gone[:, None].expand(-1, 3, -1)])
    rows = erase.rows(n, 24)
    erased = rows.any(1)
    assert erased.float().mean().item() == pytest.approx(0.5, abs=0.01)
    rows = rows[erased]
    heights, tops = rows.sum(1), rows.int().argmax(1)
    assert (rows.int().diff(dim=1).abs().sum(1) <= 2).all(), "one stripe"
    shares = heights.bincount(minlength=9)[1:] / len(rows) * 8
    assert len(shares) == 8
    assert (shares - 1).abs().max() < 0.1
    for height in (1, 8):
        places = tops[heights == height].bincount(minlength=25 - height)
        assert len(places) == 25 - height
        assert (places / places.float().mean() - 1).abs().max() < 0.3
    with pytest.raises(ValueError, match="probability 1.5, expected 0 to 1"):
        HorizontalErasing(1.5)
    assert HorizontalErasing(1.0).rows(100, 2).sum(1).max() <= 1, "a map of two rows keeps one"


def test_erasing_stops_the_gradient_of_what_is_gone():
    torch.manual_seed(1)
    x = torch.randn(8, 2, 24, 3, requires_grad=True)
    out = HorizontalErasing(1.0)(x)
    out.sum().backward()
    assert torch.equal(x.grad == 0, out == 0)
    assert (x.grad == 0).any()


# ------------------------------------------------------------------------------------------------ the backbone's weights
def test_weights_of_torchvision_are_loaded_and_others_refused():
    import torchvision

    torch.manual_seed(0)
    net = torchvision.models.resnet50().eval()
    mine = resnet50(net.state_dict()).eval()
    x = torch.randn(1, 3, 64, 32)
    with torch.no_grad():
        before = mine.layer3(mine.layer2(mine.layer1(mine.maxpool(F.relu(mine.bn1(mine.conv1(x)))))))
        expected = net.layer3(net.layer2(net.layer1(net.maxpool(net.relu(net.bn1(net.conv1(x)))))))
        assert torch.equal(before, expected)
        # stage 4 with stride 1, read at every other place, is not stage 4 with stride 2 for its later 3x3 convolutions,
        # but its first block is
        assert torch.allclose(mine.layer4[0](before)[..., ::2, ::2], net.layer4[0](expected), atol=1e-5)
    with pytest.raises(ValueError, match="not the weights of torchvision's ResNet-50"):
        resnet50(torchvision.models.resnet18().state_dict())
    with pytest.raises(ValueError, match="conv1.weight is missing"):
        resnet50({})

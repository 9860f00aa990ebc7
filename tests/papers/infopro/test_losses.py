"""The contrastive loss against the formula written out, the reconstruction term, the lambdas between modules."""

import math

import pytest
import torch
import torch.nn.functional as F

from common.datasets.images import PUBLISHED
from papers.infopro import contrastive_loss, interpolated, reconstruction_loss, restore


def naive(features, labels, tau=0.07):
    """The formula, an anchor at a time."""
    f, total = [row / row.norm() for row in features], 0.0
    for i in range(len(f)):
        positives = [j for j in range(len(f)) if j != i and labels[j] == labels[i]]
        scores = {k: math.exp(f[i] @ f[k] / tau) for k in range(len(f)) if k != i}
        if positives:
            total -= sum(math.log(scores[j] / sum(scores.values())) for j in positives) / len(positives)
    return total / len(f)


@pytest.mark.parametrize("labels", [[0, 1, 0, 1, 2, 2, 0], [0, 0, 0, 0], [0, 1, 1], [0, 0]], ids=str)
@pytest.mark.parametrize("tau", [0.07, 1.0])
def test_contrastive_loss_is_the_formula(labels, tau):
    torch.manual_seed(0)
    features, labels = torch.randn(len(labels), 5, dtype=torch.double), torch.tensor(labels)
    assert contrastive_loss(features, labels, tau).item() == pytest.approx(naive(features, labels, tau), rel=1e-6)
    assert contrastive_loss(features.float(), labels, tau).item() == pytest.approx(
        naive(features, labels, tau), rel=1e-5
    )


def test_contrastive_loss_stays_finite():
    """A class that is there once adds nothing and stays in the mean; no class twice: 0, and no gradient; equal features."""
    torch.manual_seed(0)
    features = torch.randn(5, 8, dtype=torch.double, requires_grad=True)
    alone = torch.tensor([0, 0, 1, 1, 2])
    assert contrastive_loss(features, alone).item() == pytest.approx(naive(features.detach(), alone))
    nothing = contrastive_loss(features, torch.arange(5))
    nothing.backward()
    assert nothing.item() == 0
    assert not features.grad.any()
    same = torch.ones(6, 4, requires_grad=True)  # all similarities 1: log of a uniform choice among the five others
    loss = contrastive_loss(same, torch.zeros(6, dtype=torch.long))
    loss.backward()
    assert loss.item() == pytest.approx(math.log(5), rel=1e-6)
    assert same.grad.isfinite().all()


def test_contrastive_loss_knows_neither_length_nor_order():
    torch.manual_seed(0)
    features, labels = torch.randn(9, 6, dtype=torch.double), torch.arange(9) % 3
    found, order = contrastive_loss(features, labels), torch.randperm(9)
    torch.testing.assert_close(contrastive_loss(features * torch.rand(9, 1).double().add(0.1), labels), found)
    torch.testing.assert_close(contrastive_loss(features[order], labels[order]), found)
    torch.testing.assert_close(contrastive_loss(features, 2 - labels), found)
    features.requires_grad_()
    assert torch.autograd.gradcheck(lambda f: contrastive_loss(f, labels), features)


def test_contrastive_loss_is_in_float32_under_autocast():
    torch.manual_seed(0)
    features, labels = torch.randn(16, 128), torch.arange(16) % 4
    with torch.autocast("cpu", torch.bfloat16):
        found = contrastive_loss(features, labels)
    assert found.dtype == torch.float32
    assert torch.equal(found, contrastive_loss(features, labels))


@pytest.mark.parametrize(
    ("features", "labels"),
    [(torch.ones(1, 4), torch.zeros(1)), (torch.ones(3, 4), torch.zeros(2)), (torch.ones(3, 4, 1), torch.zeros(3))],
)
def test_contrastive_loss_of_too_little(features, labels):
    with pytest.raises(ValueError, match=r"expected \(B, d\) and \(B,\), B >= 2"):
        contrastive_loss(features, labels)


def test_reconstruction_is_the_mean_cross_entropy_of_all_elements():
    torch.manual_seed(0)
    logits, pixels = torch.randn(2, 3, 4, 4, dtype=torch.double), torch.rand(2, 3, 4, 4, dtype=torch.double)
    w = logits.sigmoid()
    expected = -(pixels * w.log() + (1 - pixels) * (1 - w).log()).sum() / pixels.numel()
    torch.testing.assert_close(reconstruction_loss(logits, pixels), expected)
    torch.testing.assert_close(reconstruction_loss(logits, pixels), F.binary_cross_entropy(w, pixels))
    entropy = -(pixels * pixels.log() + (1 - pixels) * (1 - pixels).log()).mean()
    torch.testing.assert_close(reconstruction_loss(pixels.logit(), pixels), entropy)  # its least value, not 0


def test_lambdas_between_the_modules():
    """value_k = v1 (1 - r) + v2 r, r = (k - 1) / (K - 2), of modules 1 .. K - 1; r = 0 where there is one."""
    for K in (3, 4, 8, 16):
        expected = [6 * (1 - (k - 1) / (K - 2)) + 1 * (k - 1) / (K - 2) for k in range(1, K)]
        assert interpolated(6, 1, K - 1) == pytest.approx(expected)
        assert interpolated(6, 1, K - 1)[0] == 6
        assert interpolated(6, 1, K - 1)[-1] == 1
    assert interpolated(5, 123, 1) == [5]
    assert interpolated(5, 1, 0) == []


@pytest.mark.parametrize("name", sorted({"cifar10", "cifar100", *PUBLISHED}))
def test_restored_images_are_the_pixels(name):
    """All 256 levels of each channel, normalised in float32 and back: in [0, 1], and the level again."""
    known = PUBLISHED[name]
    mean, std = (torch.tensor(values).view(-1, 1, 1) for values in (known.mean, known.std))
    levels = (torch.arange(256) / 255).view(256, 1, 1, 1).expand(256, len(known.mean), 1, 1)
    found = restore((levels - mean) / std, mean, std)
    assert found.min() >= 0
    assert found.max() <= 1
    assert ((found * 255).round() == levels * 255).all()
    torch.testing.assert_close(found, levels, rtol=0, atol=3e-7)

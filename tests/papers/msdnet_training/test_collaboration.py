"""Collaborative heads, the second stage, and the losses."""

import re
import warnings

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from common.metrics.compute import parameters
from papers.msdnet_training import (
    IMTA,
    CollaborativeHeads,
    LinearHeads,
    msdnet_cifar,
    msdnet_imagenet,
    one_for_all_loss,
    sum_of_cross_entropies,
)

DIMS, CLASSES, N = [6, 8, 5], 4, 7


@pytest.fixture
def heads() -> CollaborativeHeads:
    torch.manual_seed(0)
    return CollaborativeHeads(DIMS, CLASSES)


@pytest.fixture
def features() -> list[torch.Tensor]:
    return [torch.randn(N, d, generator=torch.Generator().manual_seed(d)) for d in DIMS]


def small(**changes) -> IMTA:
    torch.manual_seed(0)
    backbone = msdnet_cifar(3, base=2, step=2, channels=4, growth=2, classes=CLASSES)
    return IMTA(backbone, CollaborativeHeads(backbone.feature_dims, CLASSES), **changes)


def images() -> torch.Tensor:
    return torch.randn(N, 3, 16, 16, generator=torch.Generator().manual_seed(1))


# ------------------------------------------------------------------------------------------------ ISC
def test_heads_are_the_formula(heads, features):
    p = F.linear(features[0], heads.classifiers[0].weight, heads.classifiers[0].bias)
    found = heads(features)
    torch.testing.assert_close(found[0], p)
    for i in (1, 2):
        linear, norm, _ = heads.transfers[i - 1]
        t = F.linear(p, linear.weight, linear.bias)
        t = (t - t.mean(0)) / (t.var(0, unbiased=False) + norm.eps).sqrt()  # batch norm of the raw logits, as drawn
        t = t.clamp(min=0)
        p = F.linear(torch.cat([features[i], t], 1), heads.classifiers[i].weight, heads.classifiers[i].bias)
        torch.testing.assert_close(found[i], p)


@pytest.mark.parametrize("detach", [True, False])
def test_gradient_along_the_predictions(detach, features):
    heads = CollaborativeHeads(DIMS, CLASSES, detach)
    features = [f.requires_grad_() for f in features]
    F.cross_entropy(heads(features)[1], torch.arange(N) % CLASSES).backward()
    assert heads.transfers[0][0].weight.grad.abs().max() > 0
    assert heads.classifiers[1].weight.grad.abs().max() > 0
    assert features[1].grad.abs().max() > 0
    for tensor in (heads.classifiers[0].weight, features[0]):  # exit 1
        assert (tensor.grad is None) == detach
        assert detach or tensor.grad.abs().max() > 0
    assert heads.classifiers[2].weight.grad is None


def test_detaching_is_a_matter_of_gradients_alone(heads, features):
    attached = CollaborativeHeads(DIMS, CLASSES, detach=False)
    attached.load_state_dict(heads.state_dict())
    assert all(torch.equal(a, b) for a, b in zip(heads(features), attached(features), strict=True))


@pytest.mark.parametrize(
    ("make", "classifiers", "transfers", "total"),
    [
        (lambda: msdnet_imagenet(4), 3_589_000, 1_604_800, 29_152_240),
        (lambda: msdnet_cifar(7), 167_100, 79_104, 3_314_164),
        (lambda: msdnet_cifar(5, classes=10), 11_570, 6_656, 1_911_216),
    ],
)
def test_official_sizes(make, classifiers, transfers, total):
    with torch.device("meta"):
        backbone = make()
        heads = CollaborativeHeads(backbone.feature_dims, backbone.classes)
    model = IMTA(backbone, heads)
    assert (parameters(heads.classifiers), parameters(heads.transfers)) == (classifiers, transfers)
    assert parameters(model) == total
    assert parameters(model, trainable_only=True) == classifiers + transfers


def test_bad_heads(heads, features):
    with pytest.raises(ValueError, match="exit 1 has no previous_logits, expected those of exit 0"):
        heads.head(1, features[1])
    with pytest.raises(ValueError, match="features of 2 exits, expected 3"):
        heads(features[:2])
    for make in (CollaborativeHeads, LinearHeads):
        for dims, classes in (([], 4), ([0], 4), ([3], 0)):
            with pytest.raises(ValueError, match="expected at least one exit and sizes >= 1"):
                make(dims, classes)
    with pytest.raises(ValueError, match=re.escape("heads for features of [6, 8, 5], expected the backbone's [128")):
        IMTA(msdnet_cifar(3), heads)


# ------------------------------------------------------------------------------------------------ the second stage
@pytest.mark.parametrize("kind", [CollaborativeHeads, LinearHeads])
def test_exit_by_exit_is_the_forward_pass(kind):
    backbone = small().backbone
    model = IMTA(backbone, kind(backbone.feature_dims, CLASSES)).eval()
    expected = model(images())
    state, logits = images(), None
    for i in range(model.num_exits):
        state = model.run_block(i, state)
        logits = model.exit_logits(i, state, logits)
        torch.testing.assert_close(logits, expected[i], rtol=0, atol=0)


def test_teacher_is_the_last_exit_of_the_backbone():
    model = small(freeze_backbone=False)
    backbone_logits = model.backbone(images())
    teacher = model.teacher_logits(model.backbone.features(images()))
    torch.testing.assert_close(teacher, backbone_logits[-1], rtol=0, atol=0)
    assert not teacher.requires_grad


def changed_statistics(model: IMTA) -> tuple[int, int]:
    """(running means and variances that one pass in train mode changes, all of them)"""
    before = {n: b.clone() for n, b in model.backbone.named_buffers() if "running" in n}
    model.train()
    model(torch.randn(4, 3, 32, 32))
    after = dict(model.backbone.named_buffers())
    return sum(not torch.equal(after[n], b) for n, b in before.items()), len(before)


@pytest.mark.parametrize(("freeze_norm", "changed"), [(True, 0), (False, 184)])
def test_running_statistics_of_the_frozen_backbone(freeze_norm, changed):
    backbone = msdnet_cifar(5, classes=10)
    model = IMTA(backbone, CollaborativeHeads(backbone.feature_dims, 10), freeze_norm=freeze_norm)
    assert changed_statistics(model) == (changed, 184)


def test_a_frozen_backbone_is_one_function():
    model = small()
    assert model.training
    trained, used = (model.train(mode).backbone.features(images()) for mode in (True, False))
    assert all(torch.equal(a, b) for a, b in zip(trained, used, strict=True))
    assert model.heads.training is False
    assert model.train().heads.training is True
    drifting = small(freeze_norm=False).train()
    assert not torch.equal(drifting.backbone.features(images())[0], trained[0])


@pytest.mark.parametrize("freeze_backbone", [True, False])
def test_what_learns_in_the_second_stage(freeze_backbone):
    model, labels = small(freeze_backbone=freeze_backbone), torch.arange(N) % CLASSES
    features = model.backbone.features(images())
    one_for_all_loss(model.heads(features), model.teacher_logits(features), labels).backward()
    assert [n for n, p in model.heads.named_parameters() if p.grad is None] == []
    learns = [n for n, p in model.backbone.named_parameters() if p.grad is not None]
    own_linears = [n for n, _ in model.backbone.named_parameters() if ".linear." in n]
    everything = [n for n, _ in model.backbone.named_parameters() if n not in own_linears]
    assert learns == ([] if freeze_backbone else everything)


# ------------------------------------------------------------------------------------------------ losses
@pytest.fixture
def logits() -> list[torch.Tensor]:
    generator = torch.Generator().manual_seed(2)
    return [torch.randn(N, 100, dtype=torch.float64, generator=generator, requires_grad=True) for _ in range(3)]


@pytest.fixture
def labels() -> torch.Tensor:
    return torch.arange(N) * 9


def test_sum_of_cross_entropies(logits, labels):
    expected = -sum((p - p.logsumexp(1, keepdim=True))[torch.arange(N), labels].mean() for p in logits)
    torch.testing.assert_close(sum_of_cross_entropies(logits, labels), expected)


@pytest.mark.parametrize(("gamma", "T"), [(0.1, 1.0), (0.9, 3.0), (1.0, 0.5)])
def test_one_for_all_is_the_formula(gamma, T, logits, labels):
    z = torch.randn(N, 100, dtype=torch.float64)
    q = (z / T).exp() / (z / T).exp().sum(1, keepdim=True)
    expected = sum_of_cross_entropies(logits[-1:], labels)
    for p in logits[:-1]:
        s = (p / T).exp() / (p / T).exp().sum(1, keepdim=True)
        kl = (q * (q / s).log()).sum(1).mean()
        expected = expected + (1 - gamma) * sum_of_cross_entropies([p], labels) + gamma * T**2 * kl
    torch.testing.assert_close(one_for_all_loss(logits, z, labels, gamma, T), expected)


def test_mean_divides_the_distillation_by_the_classes(logits, labels):
    """As nn.KLDivLoss() of the official code does, by default: 1/100 of the formula here."""
    z = torch.randn(N, 100, dtype=torch.float64)
    rest = (1 - 0.1) * sum_of_cross_entropies(logits[:-1], labels) + sum_of_cross_entropies(logits[-1:], labels)
    kl = {r: one_for_all_loss(logits, z, labels, reduction=r) - rest for r in ("batchmean", "mean")}
    torch.testing.assert_close(kl["mean"] / kl["batchmean"], torch.tensor(0.01, dtype=torch.float64))
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # torch says that this default is not the divergence
        official = sum(nn.KLDivLoss()(p.log_softmax(1), z.softmax(1)) for p in logits[:-1])
    torch.testing.assert_close(kl["mean"], 0.1 * official)


def test_one_for_all_at_its_ends(logits, labels):
    z = torch.randn(N, 100, dtype=torch.float64, requires_grad=True)
    torch.testing.assert_close(one_for_all_loss(logits, z, labels, gamma=0), sum_of_cross_entropies(logits, labels))
    one_exit = one_for_all_loss(logits[:1], z, labels)
    torch.testing.assert_close(one_exit, sum_of_cross_entropies(logits[:1], labels))
    agreed = one_for_all_loss([z, logits[-1]], z, labels, gamma=1)  # the student says what the teacher says
    torch.testing.assert_close(agreed, sum_of_cross_entropies(logits[-1:], labels))
    one_for_all_loss(logits, z, labels).backward()
    assert z.grad is None
    assert all(p.grad.abs().max() > 0 for p in logits)


def test_bad_losses(logits, labels):
    for settings in ({"gamma": 1.1}, {"gamma": -0.1}, {"temperature": 0}):
        with pytest.raises(ValueError, match="expected 0 <= gamma <= 1 and temperature > 0"):
            one_for_all_loss(logits, logits[-1], labels, **settings)
    with pytest.raises(ValueError, match="unknown reduction 'sum', expected 'batchmean' or 'mean'"):
        one_for_all_loss(logits, logits[-1], labels, reduction="sum")
    with pytest.raises(ValueError, match="teacher logits"):
        one_for_all_loss(logits, logits[-1][:1], labels)

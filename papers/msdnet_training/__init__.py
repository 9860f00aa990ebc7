"""Improved Techniques for Training Adaptive Deep Networks (Li et al., ICCV 2019): GE, ISC and OFA on MSDNet."""

from .collaboration import IMTA, CollaborativeHeads, LinearHeads
from .cost import exit_costs
from .distillation import one_for_all_loss, sum_of_cross_entropies
from .engine import AdaptiveEngine
from .gradient_equilibrium import scale_gradient
from .model import MSDNet, msdnet_cifar, msdnet_imagenet

__all__ = [
    "IMTA",
    "AdaptiveEngine",
    "CollaborativeHeads",
    "LinearHeads",
    "MSDNet",
    "exit_costs",
    "msdnet_cifar",
    "msdnet_imagenet",
    "one_for_all_loss",
    "scale_gradient",
    "sum_of_cross_entropies",
]

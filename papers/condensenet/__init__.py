"""CondenseNet: learned group convolutions (Huang, Liu, van der Maaten and Weinberger, CVPR 2018)."""

from .conversion import condense, condensed_like, load_condensed
from .engine import FastCondenseNet
from .layers import CondensedConv, CondensedLinear, LearnedGroupConv, stage_of
from .model import CondenseNet, condensenet, condensenet_imagenet, condensenet_light, densenet_bc

__all__ = [
    "CondenseNet",
    "CondensedConv",
    "CondensedLinear",
    "FastCondenseNet",
    "LearnedGroupConv",
    "condense",
    "condensed_like",
    "condensenet",
    "condensenet_imagenet",
    "condensenet_light",
    "densenet_bc",
    "load_condensed",
    "stage_of",
]

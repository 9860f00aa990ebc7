"""Glance and Focus Networks (Wang et al., NeurIPS 2020): one look at the whole image, then small crops where it matters."""

from .cost import step_costs
from .crop import crop
from .encoders import Encoder, encoder
from .engine import GlanceFocusEngine
from .losses import sequence_loss
from .model import GFNet, Step
from .policy import Locator, Policy, centre, uniform
from .ppo import ppo_loss, replay, returns, rewards, standardised

__all__ = [
    "Encoder",
    "GFNet",
    "GlanceFocusEngine",
    "Locator",
    "Policy",
    "Step",
    "centre",
    "crop",
    "encoder",
    "ppo_loss",
    "replay",
    "returns",
    "rewards",
    "sequence_loss",
    "standardised",
    "step_costs",
    "uniform",
]

"""BlockDrop (Wu et al., CVPR 2018): a policy network looks at the image once and says which residual blocks to run."""

from .cost import Cost, costs, mult_adds
from .engine import SkippingEngine
from .model import Block, DroppableResNet, from_torchvision, load_torchvision, resnet101, resnet_cifar
from .policy import PolicyNet, load_resnet18, policy_cifar, policy_imagenet
from .reinforce import bounded, curriculum_loss, forced, greedy, policy_loss, rewards, sample
from .subsets import best_subset, correct_table, first_k, random_k, spread_k

__all__ = [
    "Block",
    "Cost",
    "DroppableResNet",
    "PolicyNet",
    "SkippingEngine",
    "best_subset",
    "bounded",
    "correct_table",
    "costs",
    "curriculum_loss",
    "first_k",
    "forced",
    "from_torchvision",
    "greedy",
    "load_resnet18",
    "load_torchvision",
    "mult_adds",
    "policy_cifar",
    "policy_imagenet",
    "policy_loss",
    "random_k",
    "resnet101",
    "resnet_cifar",
    "rewards",
    "sample",
    "spread_k",
]

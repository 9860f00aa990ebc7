"""The policy network: looks at an image once and says of every block how likely it is to be kept (section 3.2)."""

import re
from collections.abc import Mapping, Sequence

import torch.nn.functional as F
import torchvision
from torch import Tensor, nn
from torchvision.models.resnet import BasicBlock

from .model import DroppableResNet, from_torchvision, load_torchvision, resnet_cifar


class PolicyNet(nn.Module):
    """Images (B, 3, H, W) -> s (B, K) in (0, 1): s_k is the probability that block k is kept, one Bernoulli each.

    net: a classifier with K outputs; shrink: it sees the image averaged over shrink x shrink pixels.
    """

    def __init__(self, net: DroppableResNet, shrink: int = 1):
        super().__init__()
        self.net, self.shrink, self.num_blocks = net, shrink, net.classes

    def forward(self, images: Tensor) -> Tensor:
        if self.shrink > 1:
            images = F.avg_pool2d(images, self.shrink)
        return self.net(images).sigmoid()


def policy_cifar(num_blocks: int, widths: Sequence[int] = (16, 32, 64)) -> PolicyNet:
    """The CIFAR policy network for K = num_blocks: the ResNet of depth 8, one block a stage."""
    return PolicyNet(resnet_cifar(8, num_blocks, widths))


def policy_imagenet(num_blocks: int) -> PolicyNet:
    """The ImageNet policy network: ResNet-10 (one block a stage) on the image at half its size, 112 for 224.

    Convolutions start as in `resnet_cifar`; the paper starts from a trained ResNet-18: see `load_resnet18`.
    """
    net = torchvision.models.ResNet(BasicBlock, [1, 1, 1, 1], num_classes=num_blocks)
    return PolicyNet(from_torchvision(net), shrink=2)


def load_resnet18(policy: PolicyNet, state_dict: Mapping[str, Tensor]) -> None:
    """Start an ImageNet policy network from torchvision's ResNet-18: its stem and the first block of each stage.

    The other blocks and the classifier are not used. ValueError for a state dict that is not a ResNet-18's.
    """
    linear = policy.net.head[-1]
    chosen = {name: value for name, value in state_dict.items() if not re.match(r"layer\d\.1\.|fc\.", name)}
    load_torchvision(policy.net, {**chosen, "fc.weight": linear.weight, "fc.bias": linear.bias})

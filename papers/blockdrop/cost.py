"""What a policy costs, in multiply-adds. Counted on the meta device: no data, no arithmetic, whatever the size."""

import copy
from math import prod
from typing import NamedTuple

import torch
from torch import Tensor, nn

from .model import DroppableResNet
from .policy import PolicyNet


class Cost(NamedTuple):
    """Multiply-adds of one image, of convolutions and linear layers. The paper's FLOPs are twice as many."""

    fixed: int  # always run: stem, convolutions in shortcuts, classifier
    blocks: tuple[int, ...]  # the residual branch of each block
    policy: int = 0  # the policy network


def costs(model: DroppableResNet, policy_net: PolicyNet | None = None, size: int = 32) -> Cost:
    """The parts of the cost of a size x size image. Both networks are left as they are."""
    model = copy.deepcopy(model).to("meta")
    layers = _layers(model, size)
    blocks = tuple(sum(layers.get(m, 0) for m in block.residual.modules()) for block in model.blocks)
    policy = 0 if policy_net is None else sum(_layers(copy.deepcopy(policy_net).to("meta"), size).values())
    return Cost(sum(layers.values()) - sum(blocks), blocks, policy)


def mult_adds(cost: Cost, policies: Tensor) -> Tensor:
    """Policies (..., K), 1 keep / 0 drop -> multiply-adds (...) of an image under each, float64; affine in the policy.

    The policy network is in it, if it is in `cost`.
    """
    if policies.shape[-1:] != (len(cost.blocks),):
        raise ValueError(f"policies {tuple(policies.shape)}, expected (..., {len(cost.blocks)})")
    blocks = torch.tensor(cost.blocks, dtype=torch.float64, device=policies.device)
    return cost.fixed + cost.policy + policies.double() @ blocks


def _layers(net: nn.Module, size: int) -> dict[nn.Module, int]:
    """Multiply-adds of every convolution and linear layer in one forward pass of one image."""
    counted = {}

    def count(layer: nn.Module, _inputs: tuple[Tensor], out: Tensor) -> None:
        inputs = layer.in_features if isinstance(layer, nn.Linear) else layer.in_channels // layer.groups
        counted[layer] = out.numel() * inputs * prod(getattr(layer, "kernel_size", ()))

    for layer in net.eval().modules():
        if isinstance(layer, nn.Conv2d | nn.Linear):
            layer.register_forward_hook(count)
    with torch.inference_mode():
        net(torch.empty(1, 3, size, size, device="meta"))
    return counted

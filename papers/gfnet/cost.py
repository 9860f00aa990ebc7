"""What it costs to stop after each step. Counted on the meta device: no data, no arithmetic, whatever the networks."""

import copy
from math import prod

import torch
from torch import Tensor, nn

from .model import GFNet
from .policy import Policy


def step_costs(model: GFNet, policy: Policy | None = None) -> list[int]:
    """Multiply-adds of one image that stops after step t = 1..T; model and policy are left as they are.

    As the authors count: t (encoder + classifier) + (t - 1) policy, convolutions, linear layers and both matrices of a
    GRU. Resizing and cropping count nothing, so the size of the image does not matter. An encoder's own head counts only
    where it is the classifier (type B, step 1). Without a policy the crops are free (random ones, the middle).
    """
    total = 0

    def add(layer: nn.Module, inputs: tuple[Tensor, ...], output: Tensor) -> None:
        nonlocal total
        if isinstance(layer, nn.Conv2d):
            total += output.numel() * layer.in_channels // layer.groups * prod(layer.kernel_size)
        elif isinstance(layer, nn.Linear):
            total += layer.weight.numel()
        elif isinstance(layer, nn.GRUCell):
            total += layer.weight_ih.numel() + layer.weight_hh.numel()

    def on_meta(network: nn.Module) -> nn.Module:
        network = copy.deepcopy(network).to("meta").eval()
        for layer in network.modules():
            layer.register_forward_hook(add)
        return network

    model, policy = on_meta(model), None if policy is None else on_meta(policy)
    costs, state, h = [], None, None
    x = torch.empty(1, 3, model.patch, model.patch, device="meta")
    with torch.inference_mode():
        for t in range(1, model.steps + 1):
            step, state = model.step(t, x, state, own=False)
            costs.append(total)
            if policy is not None:  # also after step T, when it no longer counts
                _, _, h = policy(step.e, h)
    return costs

"""What the paper calls FLOPs and parameters, as its official utils.py counts them."""

import copy

import torch
from torch import nn

from .layers import LearnedGroupConv
from .model import CondenseNet


def counted_parameters(model: CondenseNet) -> float:
    """Parameters, a learned group convolution's weight counted at 1/C: what will be left of it."""
    masked = {layer.weight: layer.condense_factor for layer in model.learned()}
    return sum(p.numel() / masked.get(p, 1) for p in model.parameters())


def authors_mult_adds(model: CondenseNet, size: int) -> float:
    """The paper's FLOPs for one image of size x size pixels, in the training form or condensed.

    Multiply-adds of convolutions (learned ones at 1/C) and of the classifier with its bias, plus one for each input
    of a ReLU and of an average pool. Batch norms count nothing. Runs on the meta device: no weights are touched.
    """
    total = 0.0

    def count(module, inputs, out):
        nonlocal total
        x = inputs[0]
        if isinstance(module, LearnedGroupConv):
            total += module.weight.numel() / module.condense_factor * out[0, 0].numel()
        elif isinstance(module, nn.Conv2d):
            total += module.weight.numel() * out[0, 0].numel()
        elif isinstance(module, nn.Linear):
            total += module.weight.numel() + module.bias.numel()
        elif isinstance(module, nn.BatchNorm2d):  # a ReLU follows every one
            total += x.numel()
        elif isinstance(module, nn.AvgPool2d):
            total += out.numel() * module.kernel_size**2
        elif isinstance(module, nn.AdaptiveAvgPool2d):
            total += x.numel()

    model = copy.deepcopy(model).to("meta").eval()
    for module in model.modules():
        module.register_forward_hook(count)
    with torch.no_grad():
        model(torch.empty(1, 3, size, size, device="meta"))
    return total

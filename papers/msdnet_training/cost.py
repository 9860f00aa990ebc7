"""What it costs to stop at each exit. Counted on the meta device: no data, no arithmetic, whatever the size."""

import copy
from math import prod

import torch
from torch import Tensor, nn

COUNTS = ("mult_adds", "ops", "parameters")


def exit_costs(model: nn.Module, size: int, count: str = "mult_adds") -> list[int]:
    """Cost of one size x size image that leaves at exit 1, .., k; the classifiers of all exits up to there are run.

    model: MSDNet or IMTA (anything with num_exits, run_block, exit_logits), left as it is.
    count: "mult_adds": multiply-adds of convolutions and linear layers. "ops": the authors' figure (op_counter.py of
    kalviny/MSDNet-PyTorch), which adds biases of linear layers, one a ReLU element and one an element that a pooling
    window reads. "parameters": weights of the layers that have run.
    """
    if count not in COUNTS:
        raise ValueError(f"unknown count {count!r}, expected one of {', '.join(COUNTS)}")
    total, seen = 0, set()

    def add(layer: nn.Module, inputs: tuple[Tensor], output: Tensor) -> None:
        nonlocal total
        if count != "parameters":
            total += _operations(layer, inputs[0], output, count == "ops")
        elif layer not in seen:
            seen.add(layer)
            total += sum(p.numel() for p in layer.parameters())

    model = copy.deepcopy(model).to("meta").eval()
    for layer in model.modules():
        if not any(layer.children()):
            layer.register_forward_hook(add)
    costs, state, logits = [], torch.empty(1, 3, size, size, device="meta"), None
    with torch.inference_mode():
        for i in range(model.num_exits):
            state = model.run_block(i, state)
            logits = model.exit_logits(i, state, logits)
            costs.append(total)
    return costs


def _operations(layer: nn.Module, x: Tensor, out: Tensor, all_ops: bool) -> int:
    if isinstance(layer, nn.Conv2d):
        return out.numel() * layer.in_channels // layer.groups * prod(layer.kernel_size)
    if isinstance(layer, nn.Linear):
        return layer.weight.numel() + (layer.bias.numel() if all_ops and layer.bias is not None else 0)
    if not all_ops:
        return 0
    if isinstance(layer, nn.ReLU | nn.AdaptiveAvgPool2d):
        return x.numel()
    if isinstance(layer, nn.MaxPool2d):
        return out.numel() * layer.kernel_size**2
    return 0

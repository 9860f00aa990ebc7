"""From the trained network to the one that is fast: every masked 1x1 convolution becomes a group convolution."""

import copy

import torch
from torch import nn

from .layers import CondensedConv, CondensedLinear, LearnedGroupConv
from .model import CondenseNet


def condense(model: CondenseNet, classifier: bool = True) -> CondenseNet:
    """New network, in eval mode, with CondensedConv for LearnedGroupConv; `model` is left alone and shares nothing.

    The convolutions compute the same function up to rounding. With `classifier` its less important half of the
    features is dropped too, as in the paper: that changes the logits, and nothing is tuned afterwards.
    Raises ValueError for a layer that has stages to come, and for a network that is condensed already.
    """
    for name, layer in model.named_modules():
        if not isinstance(layer, LearnedGroupConv):
            continue
        kept = layer.kept().sum(1)  # each group on its own: the density alone could hide groups of different sizes
        if (kept * layer.condense_factor != layer.in_channels).any():
            raise ValueError(
                f"{name}: density {layer.density:.3g}, expected 1/C = {1 / layer.condense_factor:.3g} in every group; "
                "finish the condensing stages first: model.prune(0.5) ends them"
            )
    return _replaced(model, classifier, _condense_conv, _condense_linear)


def condensed_like(model: CondenseNet, classifier: bool = True) -> CondenseNet:
    """The network `condense` would make of `model`, untrained: load the state dict of a condensed network into it.

    `model` may be fresh, e.g. condensenet(86); its weights and stage do not matter.
    """
    return _replaced(model, classifier, _empty_conv, _empty_linear)


def load_condensed(path) -> CondenseNet:
    """The network that convert.py wrote: {"arguments" of CondenseNet, "classifier", "weights"}; in eval mode, on the CPU."""
    content = torch.load(path, map_location="cpu", weights_only=True)
    model = condensed_like(CondenseNet(**content["arguments"]), content["classifier"])
    model.load_state_dict(content["weights"])
    return model


def _replaced(model, classifier, new_conv, new_linear):
    if classifier and not isinstance(model.classifier, nn.Linear):
        raise ValueError("this network is condensed already: expected the training form, or classifier=False")
    with torch.random.fork_rng(devices=[]):  # new layers draw weights: the caller's stream of numbers stays as it was
        replaced = {id(m): new_conv(m) for m in model.modules() if isinstance(m, LearnedGroupConv)}
        if classifier:
            replaced[id(model.classifier)] = new_linear(model.classifier)
    return copy.deepcopy(model, replaced).eval()  # what the memo holds is taken in place of a copy


def _empty_conv(layer: LearnedGroupConv) -> CondensedConv:
    shape = layer.in_channels, layer.out_channels, layer.groups, layer.condense_factor
    return CondensedConv(*shape).to(layer.weight)


@torch.no_grad()
def _condense_conv(layer: LearnedGroupConv) -> CondensedConv:
    new = _empty_conv(layer)
    index = layer.kept().nonzero()[:, 1]  # inputs of group 0 in order, then of group 1, ...
    new.index.copy_(index)
    for name, tensor in layer.norm.state_dict().items():
        new.norm.state_dict()[name].copy_(tensor if tensor.dim() == 0 else tensor[index])
    new.norm.eps = layer.norm.eps
    index = index.view(layer.groups, 1, -1)
    # rows g, g + G, ... of F are group g: (O/G, G, R) -> (G, O/G, R), then the columns that the group keeps
    weight = layer.weight.view(-1, layer.groups, layer.in_channels).transpose(0, 1)
    new.conv.weight.copy_(weight.take_along_dim(index, 2).reshape(new.conv.weight.shape))
    return new


def _empty_linear(layer: nn.Linear) -> CondensedLinear:
    return CondensedLinear(layer.in_features, layer.out_features, max(1, layer.in_features // 2)).to(layer.weight)


@torch.no_grad()
def _condense_linear(layer: nn.Linear) -> CondensedLinear:
    new = _empty_linear(layer)
    index = layer.weight.abs().sum(0).topk(len(new.index)).indices.sort().values
    new.index.copy_(index)
    new.linear.weight.copy_(layer.weight[:, index])
    new.linear.bias.copy_(layer.bias)
    return new

"""The convolutional networks f_G and f_L can be: torchvision's, cut where the paper reads them, and a tiny one."""

import copy
import re
from collections import OrderedDict
from collections.abc import Mapping

import torch
from torch import Tensor, nn
from torchvision import models
from torchvision.models.mobilenetv3 import InvertedResidualConfig, MobileNetV3
from torchvision.models.regnet import BlockParams, RegNet


class Encoder(nn.Module):
    """Images (B, 3, P, P) -> the last feature map e (B, C, h, w) and the feature (B, F) that classifiers read.

    The feature is the mean of e; MobileNetV3 has a linear layer of 1280 and a hard-swish after the mean, so F is not C
    there. Type B drops part of the feature out in training, before both f_C and the own head, as the official code does.

    net: a torchvision network. Attributes: channels (C), feature_dim (F), smallest (of P), and fc, the network's own
    linear head: `fc(feature)` are its logits.
    """

    def __init__(self, net: nn.Module, smallest: int = 32):
        super().__init__()
        parts = dict(net.named_children())
        head = parts.pop("fc") if "fc" in parts else parts.pop("classifier")
        parts.pop("avgpool", None)
        *neck, fc = head if isinstance(head, nn.Sequential) else [head]
        if isinstance(net, models.DenseNet):  # a function there, not a layer
            parts["relu5"] = nn.ReLU(inplace=True)
        self.trunk = nn.Sequential(OrderedDict(parts))
        self.neck = nn.Sequential(nn.AdaptiveAvgPool2d(1), nn.Flatten(1), *neck)
        self.fc = fc
        self.channels = [m for m in self.trunk.modules() if isinstance(m, nn.BatchNorm2d)][-1].num_features
        self.feature_dim, self.smallest = fc.in_features, smallest
        names = {id(tensor): name for name, tensor in self.state_dict(keep_vars=True).items()}
        self.torchvision_names = {key: names[id(tensor)] for key, tensor in net.state_dict(keep_vars=True).items()}

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        e = self.trunk(x)
        return e, self.neck(e)

    def map_size(self, size: int) -> int:
        """Side of e for images of size x size: ceil(size / 32), but DenseNet rounds down at its transitions."""
        meta = copy.deepcopy(self).to("meta").eval()
        return meta(torch.empty(1, 3, size, size, device="meta"))[0].shape[-1]

    def load_torchvision(self, state_dict: Mapping[str, Tensor]) -> None:
        """Takes the weights of a torchvision file of the same network and number of classes; all or none are loaded.

        Old DenseNet files (`norm.1` for `norm1`) are taken too. Raises ValueError that names what does not fit.
        """
        given = {re.sub(r"\.(norm|conv)\.(\d)\.", r".\1\2.", key): tensor for key, tensor in state_dict.items()}
        own = self.state_dict()
        expected = {key: tuple(own[name].shape) for key, name in self.torchvision_names.items()}
        shapes = {key: tuple(getattr(tensor, "shape", ())) for key, tensor in given.items()}
        wrong = [key for key in expected if key in given and shapes[key] != expected[key]]
        problems = [f"{key} is {shapes[key]}, expected {expected[key]}" for key in wrong]
        # old files do not count batches, and load_state_dict lets that pass
        missing = [key for key in expected if key not in given and not key.endswith("num_batches_tracked")]
        problems += [f"{key} is missing" for key in missing]
        problems += [f"{key} is unknown" for key in given if key not in expected]
        if problems:
            rest = f" and {len(problems) - 3} more" if len(problems) > 3 else ""
            raise ValueError(f"weights do not fit this encoder: {'; '.join(problems[:3])}{rest}")
        self.load_state_dict({self.torchvision_names[key]: tensor for key, tensor in given.items()})


class Tiny(nn.Module):
    """Four 3x3 convolutions with batch norm and ReLU, a 2x2 max pool after the first three: (B, 3, P, P), P >= 8."""

    def __init__(self, num_classes: int):
        super().__init__()
        layers, widths = [], (3, 16, 32, 64, 64)
        for i in range(4):
            conv = nn.Conv2d(widths[i], widths[i + 1], 3, padding=1, bias=False)
            layers += [conv, nn.BatchNorm2d(widths[i + 1]), nn.ReLU(inplace=True)]
            if i < 3:
                layers.append(nn.MaxPool2d(2))
        self.features = nn.Sequential(*layers)
        self.fc = nn.Linear(widths[-1], num_classes)


def mobilenet_v3_large(width: float, num_classes: int) -> MobileNetV3:
    """MobileNetV3-Large, channels times `width`, as the official code scales it (models/mobilenetv3.py).

    At 1.25 that is not what torchvision's own multiplier makes: an expansion is a ratio of the rounded channels, and the
    linear layer of 1280 stays. At 1.0 it is torchvision's network. At both, batch norms are torchvision's (eps 1e-3,
    momentum 0.01; the authors' 1e-5 and 0.1), and no block is dropped in training (theirs with up to 0.2).
    """

    def scaled(channels: float) -> int:
        return InvertedResidualConfig.adjust_channels(channels, width)

    def multiple_of_8(channels: float) -> int:
        return InvertedResidualConfig.adjust_channels(channels, 1.0)

    # kernel, expansion ratio, channels, squeeze-and-excitation, activation, stride (MobileNetV3 paper, table 1)
    rows = [
        (3, 1, 16, False, "RE", 1),
        (3, 4, 24, False, "RE", 2),
        (3, 3, 24, False, "RE", 1),
        (5, 3, 40, True, "RE", 2),
        (5, 3, 40, True, "RE", 1),
        (5, 3, 40, True, "RE", 1),
        (3, 6, 80, False, "HS", 2),
        (3, 2.5, 80, False, "HS", 1),
        (3, 2.3, 80, False, "HS", 1),
        (3, 2.3, 80, False, "HS", 1),
        (3, 6, 112, True, "HS", 1),
        (3, 6, 112, True, "HS", 1),
        (5, 6, 160, True, "HS", 2),
        (5, 6, 160, True, "HS", 1),
        (5, 6, 160, True, "HS", 1),
    ]
    blocks, c_in = [], scaled(16)
    for kernel, ratio, channels, excite, activation, stride in rows:
        inner, c_out = multiple_of_8(c_in * ratio), scaled(channels)
        blocks.append(InvertedResidualConfig(c_in, kernel, inner, c_out, excite, activation, stride, 1, 1.0))
        c_in = c_out
    return MobileNetV3(blocks, last_channel=1280, num_classes=num_classes)


def regnet_y_600mf(num_classes: int) -> RegNet:
    """The smallest RegNet of the paper, which torchvision does not have (official file: RegNetY-600MF_dds_8gpu.yaml)."""
    blocks = BlockParams.from_init_params(depth=15, w_0=48, w_a=32.54, w_m=2.32, group_width=16, se_ratio=0.25)
    return RegNet(blocks, num_classes=num_classes)


# torchvision's RegNetY-800MF is 784 channels wide at the end where the authors' is 768: it rounds a half up, theirs to even.
NETWORKS = {
    "resnet50": models.resnet50,
    "densenet121": models.densenet121,
    "densenet169": models.densenet169,
    "densenet201": models.densenet201,
    "regnet_y_400mf": models.regnet_y_400mf,  # not in the paper; its own three are the next
    "regnet_y_600mf": regnet_y_600mf,
    "regnet_y_800mf": models.regnet_y_800mf,
    "regnet_y_1_6gf": models.regnet_y_1_6gf,
    "mobilenet_v3_large": lambda num_classes: mobilenet_v3_large(1.0, num_classes),
    "mobilenet_v3_large_1.25": lambda num_classes: mobilenet_v3_large(1.25, num_classes),
    "efficientnet_b2": models.efficientnet_b2,
    "efficientnet_b3": models.efficientnet_b3,
    "tiny": Tiny,
}
# How f_C joins the steps (paper, section 3.2): type A a GRU, type B a linear layer a step on all features so far.
FAMILY = {name: "concat" if name.startswith(("mobilenet", "efficientnet")) else "recurrent" for name in NETWORKS}


def encoder(name: str, classes: int = 1000) -> Encoder:
    """The encoder of this name in NETWORKS, with fresh weights; raises ValueError for other names."""
    if name not in NETWORKS:
        raise ValueError(f"unknown encoder {name!r}, expected one of {', '.join(NETWORKS)}")
    if classes < 1:
        raise ValueError(f"classes {classes}: expected at least 1")
    return Encoder(NETWORKS[name](num_classes=classes), smallest=8 if name == "tiny" else 32)

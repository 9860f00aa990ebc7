"""InfoPro (Wang et al., ICLR 2021): networks trained in gradient-isolated modules with local losses."""

from .auxiliary import HEADS, Decoder, ImageNetDecoder, head, imagenet_head
from .checkpointing import checkpointed
from .cuts import EQUAL_LAYERS, EQUAL_MEMORY, cut_points
from .local import InfoPro
from .losses import contrastive_loss, interpolated, reconstruction_loss, restore
from .memory import SavedMemory
from .model import ResNet, from_torchvision, network, resnet_cifar

__all__ = [
    "EQUAL_LAYERS",
    "EQUAL_MEMORY",
    "HEADS",
    "Decoder",
    "ImageNetDecoder",
    "InfoPro",
    "ResNet",
    "SavedMemory",
    "checkpointed",
    "contrastive_loss",
    "cut_points",
    "from_torchvision",
    "head",
    "imagenet_head",
    "interpolated",
    "network",
    "reconstruction_loss",
    "resnet_cifar",
    "restore",
]

"""Horizontal Pyramid Matching (Fu et al., AAAI 2019): person re-identification by stripes of four heights at once."""

from .backbones import resnet50, small
from .erasing import HorizontalErasing
from .kernels import pyramid_pool
from .model import HPM, PyramidHead, pyramid_loss

__all__ = ["HPM", "HorizontalErasing", "PyramidHead", "pyramid_loss", "pyramid_pool", "resnet50", "small"]

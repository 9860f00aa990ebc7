"""CenterNet: Keypoint Triplets for Object Detection (Duan et al., ICCV 2019)."""

from .decode import central_region, pair, peaks, require_center
from .detector import Detections, Settings, candidates, detect_objects, select
from .hourglass import Hourglass
from .kernels import center_pool, corner_pool
from .losses import detection_loss, focal_loss, offset_loss, pull_push
from .model import CenterNet, Output, centernet
from .pooling import CascadeCornerPooling, CenterPooling, CornerPooling
from .soft_nms import soft_nms
from .targets import Targets, gaussian_radius, render_targets

__all__ = [
    "CascadeCornerPooling",
    "CenterNet",
    "CenterPooling",
    "CornerPooling",
    "Detections",
    "Hourglass",
    "Output",
    "Settings",
    "Targets",
    "candidates",
    "center_pool",
    "centernet",
    "central_region",
    "corner_pool",
    "detect_objects",
    "detection_loss",
    "focal_loss",
    "gaussian_radius",
    "offset_loss",
    "pair",
    "peaks",
    "pull_push",
    "render_targets",
    "require_center",
    "select",
    "soft_nms",
]

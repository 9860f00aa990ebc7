"""CornerNet's augmentation: a random crop at a random scale, mirroring, colour and lighting.

Crops are taken image by image where images are read. Colour is one linear map an image: its coefficients are drawn with
the crop, and it is applied to whole batches on the device, together with the normalisation.
"""

from collections.abc import Sequence

import torch
from torch import Tensor
from torchvision.transforms.v2 import functional as tvf

# Of COCO's training images, in RGB (the official code keeps them in BGR): mean, deviation, and the principal components
# of colour, a column each.
MEAN = (0.47026115, 0.44719302, 0.40789654)
STD = (0.27809835, 0.27408164, 0.28863828)
EIGENVALUES = (0.2141788, 0.01817699, 0.00341571)
EIGENVECTORS = (
    (-0.56089297, 0.71832671, 0.41158938),
    (-0.5832747, 0.00994535, -0.81221408),
    (-0.58752847, -0.69563484, 0.41340352),
)
GREY = (0.299, 0.587, 0.114)
JITTER, LIGHTING = 0.4, 0.1


def _border(border: int, side: int) -> int:
    """How far from the edge a crop's middle stays: `border`, halved until that leaves room."""
    i = 1
    while side - border // i <= border // i:
        i *= 2
    return border // i


def random_crop(
    image: Tensor, boxes: Tensor, side: int, scales: Sequence[float], border: int = 128
) -> tuple[Tensor, Tensor]:
    """A square view of the image around a random middle, `side` times a random scale large, resized to `side`.

    image (3, H, W) uint8, boxes (M, 4): both for the view; what lies outside the image is black. Boxes are not clipped.
    """
    scale = scales[int(torch.randint(len(scales), ()))]
    view = max(2, int(side * scale))
    _, h, w = image.shape
    middle = [int(torch.randint(b, s - b, ())) for s, b in ((w, _border(border, w)), (h, _border(border, h)))]
    left, top = (m - view // 2 for m in middle)
    cut = tvf.crop(image, top, left, view, view)  # pads with black
    ratio = side / view
    moved = (boxes - boxes.new_tensor([left, top, left, top])) * ratio
    return (cut if view == side else tvf.resize(cut, [side, side], antialias=False)), moved


def mirror(image: Tensor, boxes: Tensor) -> tuple[Tensor, Tensor]:
    """Left becomes right: pixel x becomes W - 1 - x."""
    x1, y1, x2, y2 = boxes.unbind(1)
    last = image.shape[2] - 1
    return image.flip(2), torch.stack([last - x2, y1, last - x1, y2], 1)


def clip(boxes: Tensor, side: int) -> tuple[Tensor, Tensor]:
    """Boxes cut to pixels 0 .. side - 1, and which of them are still there."""
    boxes = boxes.clamp(0, side - 1)
    return boxes, (boxes[:, 2:] > boxes[:, :2]).all(1)


def colour_draw() -> Tensor:
    """(6,): a, b, c of a x + b grey(x) + c mean(grey(x)), and what lighting adds to red, green and blue.

    Brightness, contrast and saturation, each by up to 40 %, in random order. The three blend an image with black, with its mean
    grey and with its grey, all taken before the first: together they are linear.
    """
    a, b, c = 1.0, 0.0, 0.0
    for which in torch.randperm(3).tolist():
        alpha = 1 + JITTER * (2 * float(torch.rand(())) - 1)
        a, b, c = alpha * a, alpha * b, alpha * c
        b, c = b + (1 - alpha) * (which == 2), c + (1 - alpha) * (which == 1)
    light = torch.tensor(EIGENVECTORS) @ (torch.tensor(EIGENVALUES) * torch.randn(3) * LIGHTING)
    return torch.cat([torch.tensor([a, b, c]), light])


def _standardised(x: Tensor) -> Tensor:
    mean, std = (x.new_tensor(v).view(3, 1, 1) for v in (MEAN, STD))
    return (x - mean) / std


def normalised(images: Tensor) -> Tensor:
    """(B, 3, H, W) in 0..255 to float, less the mean, over the deviation."""
    return _standardised(images.float() / 255)


def coloured(images: Tensor, draws: Tensor) -> Tensor:
    """(B, 3, H, W) uint8, draws (B, 6) of `colour_draw`: jittered, lit and normalised, float32."""
    x = images.float() / 255
    grey = torch.einsum("bchw,c->bhw", x, x.new_tensor(GREY))[:, None]
    a, b, c = draws[:, :3, None, None, None].unbind(1)
    return _standardised(a * x + b * grey + c * grey.mean((2, 3), keepdim=True) + draws[:, 3:, None, None])

"""The modules that gather what a keypoint's own neighbourhood does not show (section 3.3, figures 4 and 5).

All take the features of the backbone (B, c, h, w) and give features of the same shape. The pools reduce c to c/2.
"""

import torch.nn.functional as F
from torch import Tensor, nn

from .hourglass import conv_bn, conv_bn_relu
from .kernels import center_pool, corner_pool

CORNERS = {"top_left": ("top", "left"), "bottom_right": ("bottom", "right")}


class _Tail(nn.Module):
    """How every module ends: what was pooled comes back to c channels and is added to a shortcut of x."""

    def __init__(self, c: int):
        super().__init__()
        self.widen, self.shortcut, self.last = conv_bn(3, c // 2, c), conv_bn(1, c, c), conv_bn_relu(3, c, c)

    def forward(self, pooled: Tensor, x: Tensor) -> Tensor:
        return self.last(F.relu(self.widen(pooled) + self.shortcut(x), inplace=True))


class CornerPooling(nn.Module):
    """CornerNet's: the maximum along the boundary in each of the corner's two directions, added."""

    def __init__(self, c: int, corner: str):
        super().__init__()
        self.directions = CORNERS[corner]
        self.p1, self.p2, self.tail = conv_bn_relu(3, c, c // 2), conv_bn_relu(3, c, c // 2), _Tail(c)

    def forward(self, x: Tensor) -> Tensor:
        first, second = self.directions
        return self.tail(corner_pool(self.p1(x), first) + corner_pool(self.p2(x), second), x)


class CascadeCornerPooling(nn.Module):
    """First look inside the box, from the boundary inwards, add that to the boundary's own features, and then take the
    maximum along the boundary. The paper's prose has the order the other way round; its figure 5 and the code agree.
    """

    def __init__(self, c: int, corner: str):
        super().__init__()
        self.directions, half = CORNERS[corner], c // 2
        self.a1, self.l1, self.a2, self.l2 = (conv_bn_relu(3, c, half) for _ in range(4))
        self.b1, self.b2 = (nn.Conv2d(half, half, 3, padding=1, bias=False) for _ in range(2))
        self.tail = _Tail(c)

    def forward(self, x: Tensor) -> Tensor:
        P1, P2 = self.directions
        b1 = corner_pool(self.b1(self.a1(x) + corner_pool(self.l1(x), P2)), P1)
        b2 = corner_pool(self.b2(self.a2(x) + corner_pool(self.l2(x), P1)), P2)
        return self.tail(b1 + b2, x)


class CenterPooling(nn.Module):
    """The maximum of a cell's column plus the maximum of its row.

    pool=False leaves the maxima out and adds the two maps as they are: the same weights, for the ablation.
    """

    def __init__(self, c: int, pool: bool = True):
        super().__init__()
        self.pool = pool
        self.columns, self.rows, self.tail = conv_bn_relu(3, c, c // 2), conv_bn_relu(3, c, c // 2), _Tail(c)

    def forward(self, x: Tensor) -> Tensor:
        columns, rows = self.columns(x), self.rows(x)
        return self.tail(center_pool(columns, rows) if self.pool else columns + rows, x)

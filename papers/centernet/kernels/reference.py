"""Corner pooling and center pooling by definition (sections 3.2 and 3.3), in plain torch."""

import torch
from torch import Tensor

AXIS = {"top": 2, "bottom": 2, "left": 3, "right": 3}
REVERSE = {"top": True, "bottom": False, "left": True, "right": False}  # scanned from the far end of the axis


def corner_pool(x: Tensor, direction: str) -> Tensor:
    """Running maximum of x (B, C, H, W) along one axis, the same shape.

    top: y[i] = max_{j >= i} x[j] along H; bottom: j <= i; left: along W, k >= j; right: k <= j. A NaN stays.
    Of equal maxima the one met first in the scan takes the gradient, as in the official extension, whose comparison
    is strict: ones sent back through the column [0, 2, 2, 1] become [0, 0, 3, 1] for top, [1, 3, 0, 0] for bottom.
    """
    if not x.numel():
        return x.clone()
    step = -1 if REVERSE[direction] else 1
    rows = x.unbind(AXIS[direction])[::step]
    maxima = [rows[0]]
    for row in rows[1:]:
        maxima.append(torch.where((row > maxima[-1]) | row.isnan(), row, maxima[-1]))
    return torch.stack(maxima[::step], AXIS[direction])


def center_pool(columns: Tensor, rows: Tensor) -> Tensor:
    """Maximum over its column of `columns` plus maximum over its row of `rows`, at every position; all (B, C, H, W).

    Written as the paper has it, by corner pools. So the gradient of a whole column goes to the last of its maxima: top,
    scanned upwards, meets that one first, and bottom finds the column's maximum in the first row already.
    """
    vertical = corner_pool(corner_pool(columns, "top"), "bottom")
    return vertical + corner_pool(corner_pool(rows, "left"), "right")

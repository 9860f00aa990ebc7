"""The focus step's input: from every image its own P x P patch, at an integer place, without a loop.

The official code (blackfeather-wang/GFNet-Pytorch @ 8a6775c8267c, utils.py, get_patch) slices image by image and asks
the device for four integers each time. The pixels are the same here: integer crops, no resampling.
"""

import torch
from torch import Tensor


def crop(images: Tensor, locations: Tensor, size: int, rows: Tensor | None = None) -> Tensor:
    """P x P patches: images (B, C, H, W), locations (B, 2) in [0, 1], size P -> (B, C, P, P), a copy.

    rows (n,) int64 in 0..B-1 takes images[rows] instead, without copying whole images; locations are (n, 2) then.

    Rows start at floor(l_0 (H - P)), columns at floor(l_1 (W - P)): (0, 0) is the top left corner, (1, 1) the bottom
    right one. Any dtype, bit-equal to slicing; channels_last images give channels_last patches. Nothing waits for the
    device, so there the range of the locations is not checked (on the CPU it is). No gradient goes through: none exists
    for the locations, and images are data (ValueError if they ask for one). Locations are best float32: the product is
    taken in their precision.
    """
    if rows is None:
        rows = torch.arange(len(images), device=images.device)
    if images.ndim != 4 or locations.shape != (len(rows), 2) or not locations.is_floating_point():
        raise ValueError(
            f"images {tuple(images.shape)} with locations {tuple(locations.shape)} ({locations.dtype}), expected "
            "(B, C, H, W) and (B, 2) of a floating-point type"
        )
    n, (B, C, H, W) = len(rows), images.shape
    P = size
    if not 1 <= P <= min(H, W):
        raise ValueError(f"patches of {P} pixels from images of {H} x {W}, expected 1 to {min(H, W)}")
    if images.requires_grad:
        raise ValueError("images require a gradient, but a crop passes none; detach them")
    if locations.device.type == "cpu" and not ((locations >= 0) & (locations <= 1)).all():
        raise ValueError("a location outside [0, 1] or NaN; expected 0 (first row, column) to 1 (last place that fits)")
    if rows.device.type == "cpu" and not ((rows >= 0) & (rows < B)).all():
        raise ValueError(f"rows {rows.tolist()}, expected 0..{B - 1}")
    if not n:
        return images.new_empty(0, C, P, P)

    # A row of a patch is one run of memory: P values of one channel, or P pixels of all channels (channels_last). All runs
    # of that length are a view; the patches are n * C * P (or n * P) of them.
    top = (locations[:, 0] * (H - P)).floor().long()[:, None, None]
    left = (locations[:, 1] * (W - P)).floor().long()[:, None, None]
    channels_last = images.is_contiguous(memory_format=torch.channels_last)
    values, planes, depth = (images.permute(0, 2, 3, 1), 1, C) if channels_last else (images, C, 1)
    runs = values.flatten().unfold(0, P * depth, 1)
    plane = (rows[:, None] * planes + torch.arange(planes, device=images.device))[:, :, None]
    start = ((plane * H + top + torch.arange(P, device=images.device)) * W + left) * depth
    patches = runs.index_select(0, start.flatten())
    return patches.view(n, P, P, C).permute(0, 3, 1, 2) if channels_last else patches.view(n, C, P, P)

"""pyramid_pool by definition: every scale by torch's adaptive pools, in plain torch."""

import torch
import torch.nn.functional as F
from torch import Tensor


def reference(x: Tensor, scales: tuple[int, ...], pool: str = "avg+max") -> Tensor:
    """Horizontal pyramid pooling: (N, C, H, W) -> (bins, N, C), the bins of each scale from top to bottom, scale by scale.

    Bin j of scale B is rows j H/B to (j + 1) H/B over the full width; pool is "avg+max" (the paper's sum), "avg" or "max".
    Computed in float32 at least, returned in the dtype of x.
    """
    dtype = torch.promote_types(x.dtype, torch.float32)
    bins = []
    for scale in scales:
        found = torch.zeros((), dtype=dtype, device=x.device)
        if "avg" in pool:
            found = found + F.adaptive_avg_pool2d(x.to(dtype), (scale, 1))
        if "max" in pool:
            found = found + F.adaptive_max_pool2d(x.to(dtype), (scale, 1))
        bins += found[..., 0].unbind(2)
    return torch.stack(bins).to(x.dtype)

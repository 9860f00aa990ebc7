"""mix_bypass_shuffle by definition: what one node of the search cell is (eq. 3), in plain torch."""

import torch
from torch import Tensor


def reference(mixed: list[Tensor], bypass: list[Tensor], beta: Tensor) -> Tensor:
    """sum_s shuffle(cat(mixed_s, beta_s * bypass_s)) over the S edges entering a node, computed in float32 at least.

    mixed[s] (N, c, H, W): the mixture of edge s on the first c channels, its weights beta_s * alpha_so included.
    bypass[s] (N, (K-1) c, H, W): the other channels. beta (S,). -> (N, K c, H, W) in the dtype of mixed.
    Channel i of the result is channel (i mod K) * c + floor(i / K) of the concatenation.
    """
    dtype = torch.promote_types(mixed[0].dtype, torch.float32)
    out = 0
    for s, (m, b) in enumerate(zip(mixed, bypass, strict=True)):
        edge = torch.cat([m.to(dtype), beta[s].to(dtype) * b.to(dtype)], dim=1)
        n, channels, h, w = edge.shape
        k = channels // m.shape[1]
        out = out + edge.view(n, k, channels // k, h, w).transpose(1, 2).reshape(n, channels, h, w)
    return out.to(mixed[0].dtype)

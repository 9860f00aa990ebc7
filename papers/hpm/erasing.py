"""Horizontal random erasing (HRE) of the feature map. The authors never released its definition; this one is ours."""

import torch
from torch import Tensor, nn


class HorizontalErasing(nn.Module):
    """In training, with probability p a sample loses a horizontal stripe of its map; in evaluation the identity.

    The stripe is 1 to R/3 of the R rows high (uniform; 8 of the paper's 24), its top row uniform over the places where it
    fits; it is set to 0, over the full width and all channels, and nothing is rescaled. ValueError unless 0 <= p <= 1.
    """

    def __init__(self, p: float = 0.5):
        super().__init__()
        if not 0 <= p <= 1:
            raise ValueError(f"erasing with probability {p}, expected 0 to 1")
        self.p = p

    def forward(self, x: Tensor) -> Tensor:
        """(N, C, R, W) -> the same shape."""
        if not self.training or self.p == 0:
            return x
        return x * ~self.rows(len(x), x.shape[2], x.device)[:, None, :, None]

    def rows(self, n: int, rows: int, device: torch.device | str = "cpu") -> Tensor:
        """(n, rows) bool: what is erased of each sample; three draws each from the device's generator."""
        chosen, height, top = torch.rand(3, n, 1, device=device).unbind(0)
        height = 1 + (height * (rows // 3)).long().clamp(max=rows // 3 - 1)
        top = (top * (rows - height + 1)).long().clamp(max=rows - 1)
        row = torch.arange(rows, device=device)
        return (chosen < self.p) & (row >= top) & (row < top + height)

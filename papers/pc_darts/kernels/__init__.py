"""mix_bypass_shuffle: one node of the search cell, the operation that PC-DARTS adds to DARTS.

It moves full-width maps and computes almost nothing; naively every edge concatenates, shuffles, scales and adds maps of
all C channels. Summing first and shuffling once reads every input once and writes the node once.
"""

import torch
from torch import Tensor

from .reference import reference

__all__ = ["mix_bypass_shuffle", "reference"]


def mix_bypass_shuffle(mixed: list[Tensor], bypass: list[Tensor], beta: Tensor, impl: str = "auto") -> Tensor:
    """Node = sum_s shuffle(cat(mixed_s, beta_s * bypass_s)), S edges; see `reference` for the definition.

    mixed: S tensors (N, c, H, W); bypass: S tensors (N, (K-1) c, H, W) of the same dtype; beta (S,). -> (N, K c, H, W).
    impl: "auto" takes Triton for CUDA tensors and torch elsewhere. ValueError for shapes that do not fit.
    """
    _check(mixed, bypass, beta, impl)
    if impl == "triton" or (impl == "auto" and mixed[0].is_cuda):
        from .triton_mix_bypass_shuffle import mix_bypass_shuffle as triton_op  # triton is only needed here

        return triton_op(mixed, bypass, beta)
    return _torch(mixed, bypass, beta)


def _torch(mixed: list[Tensor], bypass: list[Tensor], beta: Tensor) -> Tensor:
    """The shuffle is the same permutation on every edge, so sum first and permute once, as one concatenation."""
    n, c, h, w = mixed[0].shape
    k = 1 + bypass[0].shape[1] // c
    dtype = torch.promote_types(mixed[0].dtype, torch.float32)
    node = sum((m.to(dtype) for m in mixed[1:]), start=mixed[0].to(dtype))
    if k > 1:
        rest = sum(b.to(dtype) * beta[s] for s, b in enumerate(bypass))
        node = torch.cat([node.unsqueeze(2), rest.view(n, k - 1, c, h, w).transpose(1, 2)], dim=2)
    return node.reshape(n, k * c, h, w).to(mixed[0].dtype)


def _check(mixed: list[Tensor], bypass: list[Tensor], beta: Tensor, impl: str) -> None:
    if impl not in ("auto", "torch", "triton"):
        raise ValueError(f"unknown impl {impl!r}, expected auto, torch or triton")
    if not mixed or len(mixed) != len(bypass) or beta.shape != (len(mixed),):
        raise ValueError(
            f"{len(mixed)} mixed and {len(bypass)} bypass tensors, beta {tuple(beta.shape)}: expected as many of each"
        )
    n, c, h, w = mixed[0].shape
    rest = bypass[0].shape[1]
    if c < 1 or rest % c:
        raise ValueError(f"{rest} bypass channels beside {c} mixed ones, expected a multiple")
    for m, b in zip(mixed, bypass, strict=True):
        if m.shape != (n, c, h, w) or b.shape != (n, rest, h, w) or not m.dtype == b.dtype == mixed[0].dtype:
            raise ValueError(
                f"an edge has mixed {tuple(m.shape)} {m.dtype} and bypass {tuple(b.shape)} {b.dtype}, "
                f"expected {(n, c, h, w)} and {(n, rest, h, w)} of {mixed[0].dtype}"
            )

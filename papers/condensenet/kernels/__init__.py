"""condensed_conv: the convolution that CondenseNet is made of at test time, in one pass over memory.

Written as layers it makes five passes over maps of G R/C channels (gather, batch norm, ReLU, group convolution,
shuffle) and computes little on each. The kernel reads the kept channels where they lie and writes the result shuffled.
"""

import torch
from torch import Tensor, nn
from torch.utils.flop_counter import register_flop_formula

from .reference import memory_format, reference

__all__ = ["condensed_conv", "reference", "scale_shift"]

TRITON_DTYPES = (torch.float32, torch.bfloat16, torch.float16)


def condensed_conv(
    x: Tensor, index: Tensor, scale: Tensor, shift: Tensor, weight: Tensor, groups: int, impl: str = "auto"
) -> Tensor:
    """(N, R, H, W) -> (N, O, H, W), see `reference` for the definition and `scale_shift` for scale and shift.

    index (G K,) int64; scale, shift (G K,) floating; weight (O, K) or, as a Conv2d has it, (O, K, 1, 1).
    impl: "auto" takes Triton for CUDA tensors of float32, bfloat16 or float16 when no gradient is wanted, and torch
    otherwise; "triton" has no backward pass (this is the test-time form; the training form is a dense convolution).
    ValueError for shapes that do not fit. The values of `index` are not looked at, since on a GPU that would wait for
    the device: torch stops at one outside 0 .. R-1, the kernel reads whatever lies there.
    """
    if weight.dim() == 4 and weight.shape[2:] == (1, 1):
        weight = weight.flatten(1)
    _check(x, index, scale, shift, weight, groups, impl)
    differentiate = torch.is_grad_enabled() and any(t.requires_grad for t in (x, scale, shift, weight))
    if impl == "triton":
        if differentiate:
            raise ValueError("impl='triton' has no gradient; call it under torch.no_grad(), or take impl='torch'")
        if x.dtype not in TRITON_DTYPES:
            raise ValueError(f"impl='triton' of {x.dtype}, expected float32, bfloat16 or float16; take impl='torch'")
    if impl == "triton" or (impl == "auto" and x.is_cuda and x.dtype in TRITON_DTYPES and not differentiate):
        return _OPERATOR(x, index, scale, shift, weight, groups)
    return reference(x, index, scale, shift, weight, groups)


def scale_shift(norm: nn.BatchNorm2d, dtype: torch.dtype | None = None) -> tuple[Tensor, Tensor]:
    """(scale, shift), each (channels,), with norm(x) = x * scale + shift in eval mode; in `dtype`, or the norm's own."""
    weight, bias, mean, var = (v.to(dtype) for v in (norm.weight, norm.bias, norm.running_mean, norm.running_var))
    scale = weight * torch.rsqrt(var + norm.eps)
    return scale, bias - mean * scale


def _empty(x: Tensor, channels: int) -> Tensor:
    n, _, h, w = x.shape
    return torch.empty(n, channels, h, w, dtype=x.dtype, device=x.device, memory_format=memory_format(x))


def _triton(x: Tensor, index: Tensor, scale: Tensor, shift: Tensor, weight: Tensor, groups: int) -> Tensor:
    from .triton_condensed_conv import launch  # triton is only needed here

    y = _empty(x, weight.shape[0])
    launch(x, index, scale, shift, weight, groups, y)
    return y


def _define():
    """Register the operator and its FLOPs once per process: two copies of this folder may be imported together.

    Here and not beside the kernel, which is imported late: a FLOP counter knows the formulas that are there when it
    starts, and would count nothing for one that comes with the first call.
    """
    namespace = "repro_condensenet"
    known = getattr(torch.ops, namespace)
    if hasattr(known, "condensed_conv"):
        return known.condensed_conv.default
    operator = torch.library.custom_op(f"{namespace}::condensed_conv", _triton, mutates_args=())

    @operator.register_fake
    def _(x, index, scale, shift, weight, groups):
        return _empty(x, weight.shape[0])

    @register_flop_formula(known.condensed_conv)
    def _(x_shape, index_shape, scale_shape, shift_shape, weight_shape, groups, *args, **kwargs) -> int:
        n, _, h, w = x_shape
        return 2 * n * h * w * weight_shape[0] * weight_shape[1]

    return known.condensed_conv.default


_OPERATOR = _define()


def _check(x: Tensor, index: Tensor, scale: Tensor, shift: Tensor, weight: Tensor, groups: int, impl: str) -> None:
    if impl not in ("auto", "torch", "triton"):
        raise ValueError(f"unknown impl {impl!r}, expected auto, torch or triton")
    if x.dim() != 4 or not x.dtype.is_floating_point:
        raise ValueError(f"x is {tuple(x.shape)} {x.dtype}, expected (N, R, H, W) of a floating dtype")
    if weight.dim() != 2 or groups < 1 or not len(weight) or len(weight) % groups or not weight.shape[1]:
        raise ValueError(f"weight {tuple(weight.shape)} in {groups} groups, expected (O, K) with O divisible by groups")
    gathered = (groups * weight.shape[1],)
    if index.dtype != torch.int64 or not index.shape == scale.shape == shift.shape == gathered:
        raise ValueError(
            f"index {tuple(index.shape)} {index.dtype}, scale {tuple(scale.shape)}, shift {tuple(shift.shape)}: "
            f"expected {gathered} each, groups x K of the weight, and an int64 index"
        )
    if not x.device == index.device == scale.device == shift.device == weight.device:
        raise ValueError(
            f"x on {x.device}, index on {index.device}, scale on {scale.device}, shift on {shift.device}, weight on "
            f"{weight.device}: expected one device"
        )

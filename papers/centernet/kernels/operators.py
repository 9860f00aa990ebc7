"""The two poolings as operators of torch, each with its backward pass, over the implementations "torch" and "triton".

Operators, so that torch.compile takes a scan as one step. They know maps in the order of their memory only: (n, L, m)
with the scan along L, and (p, H, W, q).
"""

import torch
from torch import Tensor

from . import torch_pools


def _corner(x: Tensor, reverse: bool, train: bool, impl: str) -> tuple[Tensor, Tensor]:
    """(y, marks): for Triton in training one bit an element, set where the running maximum changed, else empty."""
    if not x.numel():
        return _corner_shapes(x, reverse, train, impl)
    if impl == "torch":
        return torch_pools.corner_pool(x, reverse), x.new_empty(0, dtype=torch.int16)
    from . import triton_corner_pool  # triton is only needed here

    return triton_corner_pool.forward(x, reverse, train)


def _corner_shapes(x: Tensor, reverse: bool, train: bool, impl: str) -> tuple[Tensor, Tensor]:
    n, length, m = x.shape
    marks = (n, (length + 15) // 16, m) if train and impl == "triton" else (0,)
    return torch.empty_like(x), x.new_empty(marks, dtype=torch.int16)


def _corner_backward(grad: Tensor, kept: Tensor, reverse: bool, impl: str) -> Tensor:
    """kept: the output of the torch implementation, the marks of the Triton one."""
    grad = grad.contiguous()
    if not grad.numel():
        return torch.empty_like(grad)
    if impl == "torch":
        return torch_pools.corner_pool_backward(grad, kept, reverse)
    from . import triton_corner_pool

    return triton_corner_pool.backward(grad, kept, reverse)


def _center(columns: Tensor, rows: Tensor, train: bool, impl: str) -> tuple[Tensor, Tensor, Tensor]:
    """(y, last_row (p, 1, W, q), last_column (p, H, 1, q)): the places that get the gradient, empty unless in training."""
    if not columns.numel():
        return _center_shapes(columns, rows, train, impl)
    if impl == "torch":
        return torch_pools.center_pool(columns, rows, train)
    from . import triton_center_pool

    return triton_center_pool.forward(columns, rows, train)


def _center_shapes(columns: Tensor, rows: Tensor, train: bool, impl: str) -> tuple[Tensor, Tensor, Tensor]:
    p, h, w, q = columns.shape
    shapes = ((p, 1, w, q), (p, h, 1, q)) if train else ((0,), (0,))
    return torch.empty_like(columns), *(columns.new_empty(shape, dtype=torch.int32) for shape in shapes)


def _center_backward(grad: Tensor, last_row: Tensor, last_column: Tensor, impl: str) -> tuple[Tensor, Tensor]:
    grad = grad.contiguous()
    if not grad.numel():
        return torch.empty_like(grad), torch.empty_like(grad)
    if impl == "torch":
        sums = grad.sum(1, keepdim=True), grad.sum(2, keepdim=True)
    else:
        from . import triton_center_pool

        sums = triton_center_pool.sums(grad)
    return torch_pools.spread(grad, *sums, last_row, last_column)


def _define() -> tuple:
    """Register the operators once per process: two copies of this folder may be imported together."""
    namespace = "repro_centernet"
    known = getattr(torch.ops, namespace)
    if not hasattr(known, "corner_pool"):
        corner, corner_backward, center, center_backward = (
            torch.library.custom_op(f"{namespace}::{name}", function, mutates_args=())
            for name, function in (
                ("corner_pool", _corner),
                ("corner_pool_backward", _corner_backward),
                ("center_pool", _center),
                ("center_pool_backward", _center_backward),
            )
        )
        corner.register_fake(_corner_shapes)
        corner_backward.register_fake(lambda grad, kept, reverse, impl: torch.empty_like(grad.contiguous()))
        center.register_fake(_center_shapes)
        # two tensors, not one twice: torch.compile would give both maps the same gradient
        center_backward.register_fake(lambda grad, *_: tuple(torch.empty_like(grad.contiguous()) for _ in range(2)))

        def keep_corner(ctx, inputs, output):
            _, ctx.reverse, _, ctx.impl = inputs
            ctx.save_for_backward(output[0] if ctx.impl == "torch" else output[1])

        def corner_gradient(ctx, grad, _):
            return corner_backward(grad, *ctx.saved_tensors, ctx.reverse, ctx.impl), None, None, None

        def keep_center(ctx, inputs, output):
            ctx.impl = inputs[3]
            ctx.save_for_backward(*output[1:])

        def center_gradient(ctx, grad, *_):
            return *center_backward(grad, *ctx.saved_tensors, ctx.impl), None, None

        corner.register_autograd(corner_gradient, setup_context=keep_corner)
        center.register_autograd(center_gradient, setup_context=keep_center)
    return known.corner_pool.default, known.center_pool.default


corner_pool, center_pool = _define()

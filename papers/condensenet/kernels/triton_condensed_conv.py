"""condensed_conv in Triton: gather, batch norm, ReLU, 1x1 group convolution and shuffle, one read and one write.

One program computes BLOCK_O outputs of one group at BLOCK_P pixels, counted through the whole batch so that small maps
fill a tile too. Programs of all groups at the same pixels run side by side: a channel that several groups keep comes
from memory once and from the cache after that. Sums are in float32, and float32 inputs are multiplied as such.

NCHW is the fast layout (neighbouring threads read neighbouring pixels); any strides are correct, channels_last too.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

DOT = {torch.float32: tl.float32, torch.bfloat16: tl.bfloat16, torch.float16: tl.float16}


@triton.jit
def _kernel(x, x_n, x_c, x_p, index, scale, shift, weight, y, y_n, y_c, y_p, pixels, image, K, outputs, G,
            DOT: tl.constexpr, STEPS: tl.constexpr, BLOCK_O: tl.constexpr, BLOCK_K: tl.constexpr,
            BLOCK_P: tl.constexpr):  # fmt: skip
    # pixels = N H W, image = H W, outputs = O / G; the strides are those of image, channel and pixel
    program, blocks = tl.program_id(0), tl.cdiv(outputs, BLOCK_O)
    g = program % G
    o = program // G % blocks * BLOCK_O + tl.arange(0, BLOCK_O)
    pixel = program // (G * blocks) * BLOCK_P + tl.arange(0, BLOCK_P)
    inside = pixel < pixels
    n, p = (pixel // image).to(tl.int64), (pixel % image).to(tl.int64)
    source = x + n * x_n + p * x_p
    acc = tl.zeros((BLOCK_O, BLOCK_P), tl.float32)
    for step in range(STEPS):
        k = step * BLOCK_K + tl.arange(0, BLOCK_K)
        kept = k < K
        at = g * K + k
        j = tl.load(index + at, kept, 0)
        a = tl.load(source[None, :] + j[:, None] * x_c, kept[:, None] & inside[None, :], 0.0).to(tl.float32)
        a = a * tl.load(scale + at, kept, 0.0)[:, None] + tl.load(shift + at, kept, 0.0)[:, None]
        a = tl.where(a < 0, 0.0, a)  # not maximum: it would turn NaN into 0
        row = weight + (g * outputs + o)[:, None] * K + k[None, :]
        w = tl.load(row, (o < outputs)[:, None] & kept[None, :], 0.0)
        acc = tl.dot(w.to(DOT), a.to(DOT), acc, input_precision="ieee")
    target = y + (n * y_n + p * y_p)[None, :] + (o * G + g).to(tl.int64)[:, None] * y_c
    tl.store(target, acc.to(y.dtype.element_ty), (o < outputs)[:, None] & inside[None, :])


def _blocks(outputs: int, k: int, pixels: int, groups: int, half: bool) -> dict[str, int]:
    """Tiles as a function of the shape: the largest that ptxas fits into the registers of sm_90 without spilling more
    than a few bytes (float32 stays outside the tensor cores and needs more of them), and smaller ones where there
    would be too few programs to fill a GPU. Not tuned by timing."""
    block_o = min(128, max(16, triton.next_power_of_2(outputs)))
    block_p = min(256, (8192 if half else 4096) // block_o, max(16, triton.next_power_of_2(pixels)))
    while block_p > 32 and groups * triton.cdiv(outputs, block_o) * triton.cdiv(pixels, block_p) < 256:
        block_p //= 2
    block_k = 32 if half and k > 16 else 16
    warps = 8 if block_o * block_p >= 4096 else 4
    steps = triton.cdiv(k, block_k)
    return {"STEPS": steps, "BLOCK_O": block_o, "BLOCK_K": block_k, "BLOCK_P": block_p, "num_warps": warps}


def launch(x: Tensor, index: Tensor, scale: Tensor, shift: Tensor, weight: Tensor, groups: int, y: Tensor) -> None:
    """Fill y (N, O, H, W), contiguous in some memory format. Arguments as in `reference`; x may have any strides."""
    interpreted = not isinstance(_kernel, triton.JITFunction)
    if not x.is_cuda and not interpreted:
        raise ValueError(f"impl='triton' on {x.device}, expected CUDA tensors; take impl='auto' or impl='torch'")
    n, _, h, w = x.shape
    pixels, (channels, k) = n * h * w, weight.shape
    if pixels >= 2**31 - 256:
        raise ValueError(f"{pixels} pixels in the batch, expected fewer than 2^31; use smaller batches")
    if not pixels:
        return
    flat, out = x.flatten(2), y.view(n, channels, h * w)  # flatten copies only where a map has no single pixel stride
    meta = _blocks(channels // groups, k, pixels, groups, x.dtype.itemsize < 4)
    grid = (groups * triton.cdiv(channels // groups, meta["BLOCK_O"]) * triton.cdiv(pixels, meta["BLOCK_P"]),)
    dot = tl.float32 if interpreted else DOT[x.dtype]  # the interpreter cannot multiply bfloat16
    with torch.cuda.device_of(x):
        _kernel[grid](
            flat, *flat.stride(), index.contiguous(), scale.float().contiguous(), shift.float().contiguous(),
            weight.contiguous(), out, *out.stride(), pixels, h * w, k, channels // groups, groups, DOT=dot, **meta,
        )  # fmt: skip

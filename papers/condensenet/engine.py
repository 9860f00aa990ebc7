"""Inference on a CPU at the speed that the mult-adds promise: the condensed network, folded and laid out anew.

    fast = FastCondenseNet(model)      # a snapshot of the weights; eval mode, float32
    logits = fast(images)              # what condense(model, classifier=False) computes, up to rounding

The released form (gather, BN, ReLU, group convolution, shuffle, BN, ReLU, 3x3 group convolution, concatenation) is
slower than the dense network it came from: convolutions with 2 to 32 channels a group run at a fraction of the speed
of dense ones, and all the rest only moves memory. Here a layer is ten calls on long contiguous rows:

1. Layout. Features are (channels, height, width, images): a channel is one row. A block has one buffer, and a layer
   writes its k new rows behind the others: no concatenation. The gather copies whole rows.
2. BN and ReLU before the 1x1. With BN as a x + b and t = -b/a,
       ReLU(a x + b) = a max(x, t) + b  if a > 0,    a min(x, t) + b  if a < 0.
   One maximum is left to do (and one minimum, if some a < 0), as F (a u + b) = (F a) u + F b: new weight, new bias.
3. The groups of the 1x1 are one batched matrix product. The BN after it scales its rows: only that ReLU is left.
4. The shuffle is the order in which that ReLU writes its result, into a buffer with a border of zeros.
5. The 3x3 is three accumulated batched products, one for each kernel row, and a sum of three shifted rows:
       y[h, w] = sum_dx z_dx[h, w + dx],    z_dx[h, w] = sum_dy K[dy, dx] x[h + dy, w]    for dx, dy in -1, 0, 1.
   The products have 3k/G3 outputs instead of k/G3. A shift is another start in the same flat row; one column of zeros
   is the border on both sides, since the end of a line is next to the start of the following one.
6. The batch is cut into chunks that stay in cache; every thread computes chunks of its own.
"""

import collections
import math
import threading
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from .conversion import condense
from .kernels import scale_shift
from .layers import CondensedConv, CondensedLinear
from .model import CondenseNet, DenseLayer

CHUNK_PIXELS = 8192  # of an image times images in a chunk, e.g. 8 of 32 x 32: long rows, and features in cache


class Folded(NamedTuple):
    """BN - ReLU - linear map in groups as bias + weight @ u, u = min(max(x[index], lower), upper)."""

    index: Tensor | None  # (G R/C,); None for 0, 1, 2, ...
    lower: Tensor  # (G R/C, 1)
    upper: Tensor | None  # (G R/C, 1); None if no scale is negative
    weight: Tensor  # (G, O/G, R/C)
    bias: Tensor  # (G, O/G, 1)


class FoldedLayer(NamedTuple):
    pointwise: Folded
    rows: Tensor  # the 3x3 by kernel row: (3, G3, 3 k/G3, inputs/G3), outputs ordered (dx, k/G3)
    growth: int


def fold(a: Tensor, b: Tensor, weight: Tensor, index: Tensor | None = None, bias: Tensor | float = 0.0) -> Folded:
    """Folded form of bias (G, O/G, 1) + weight (G, O/G, R/C) @ ReLU(a x[index] + b); a, b float64."""
    # A scale too small for a x to change b, zero among them, makes a constant; t would not be finite.
    constant = a.abs() <= 1e-20 * b.abs()
    t = (-b / a).masked_fill(constant, 0)
    a, b = a.masked_fill(constant, 0), torch.where(constant, b.relu(), b)
    bias = bias + weight.double() @ b.view(len(weight), -1, 1)
    weight = weight.double() * a.view(len(weight), 1, -1)
    lower = t.masked_fill(a <= 0, -math.inf).float()[:, None]
    upper = t.masked_fill(a >= 0, math.inf).float()[:, None] if (a < 0).any() else None
    if index is not None and index.equal(torch.arange(len(index))):
        index = None
    return Folded(index, lower, upper, weight.float(), bias.float())


def fold_pointwise(conv: CondensedConv) -> Folded:
    weight = conv.conv.weight.view(conv.groups, conv.out_channels // conv.groups, -1)
    return fold(*scale_shift(conv.norm, torch.float64), weight, conv.index)


def fold_layer(layer: DenseLayer) -> FoldedLayer:
    pointwise, conv = fold_pointwise(layer.conv1), layer.conv3x3
    # Output o of group g is channel o G + g for the BN that follows.
    G, outputs, _ = pointwise.weight.shape
    scale, shift = (v.view(outputs, G).T[:, :, None] for v in scale_shift(layer.norm2, torch.float64))
    weight, bias = (scale * pointwise.weight).float(), (scale * pointwise.bias + shift).float()
    k, inputs, G3 = conv.out_channels, conv.weight.shape[1], conv.groups
    rows = conv.weight.view(G3, k // G3, inputs, 3, 3).permute(3, 0, 4, 1, 2).reshape(3, G3, 3 * k // G3, inputs)
    return FoldedLayer(pointwise._replace(weight=weight, bias=bias), rows, k)


def clamp(folded: Folded, x: Tensor, out: Tensor) -> None:
    """out = min(max(x[index], lower), upper), all of them rows of pixels."""
    if folded.index is not None:
        x = torch.index_select(x, 0, folded.index, out=out)
    torch.maximum(x, folded.lower, out=out)
    if folded.upper is not None:
        torch.minimum(out, folded.upper, out=out)


def pointwise_step(folded: Folded, x: Tensor, out: Tensor, gathered: Tensor) -> Callable[[], None]:
    """x (R, pixels) -> out (G, O/G, pixels), through the buffer gathered (G R/C, pixels)."""
    grouped = gathered.view(len(folded.weight), -1, x.shape[1])

    def step() -> None:
        clamp(folded, x, gathered)
        torch.baddbmm(folded.bias, folded.weight, grouped, out=out)

    return step


def layer_step(layer: FoldedLayer, features: Tensor, channels: int, buffers: tuple[Tensor, ...]) -> Callable[[], None]:
    """Rows 0 .. channels - 1 of features (C, H, W, n) -> the k rows behind them."""
    _, H, W, n = features.shape
    G, outputs, inputs = layer.pointwise.weight.shape
    k, line, G3 = layer.growth, (W + 1) * n, layer.rows.shape[1]
    gathered, z, padded, sums = buffers
    z = z.view(G, outputs, -1)
    pointwise = pointwise_step(layer.pointwise, features.flatten(1)[:channels], z, gathered[: G * inputs])
    z = z.view(G, outputs, H, W * n)
    shuffled = padded.view(outputs, G, H + 2, line)[:, :, 1:-1, : W * n].transpose(0, 1)
    grouped = padded.view(G3, G * outputs // G3, -1)
    above, here, below = (grouped[:, :, dy * line : (dy + H) * line] for dy in range(3))
    first, second, third = layer.rows
    sums_shape, size = (G3, 3, k // G3, H, line), 3 * k * H * line
    products = sums[n : n + size].view(G3, -1, H * line)
    left, middle, right = (sums[dx * n : dx * n + size].view(sums_shape)[:, dx, ..., : W * n] for dx in range(3))
    new = features[channels : channels + k].view(G3, k // G3, H, W * n)

    def step() -> None:
        pointwise()
        torch.clamp_min(z, 0, out=shuffled)
        torch.bmm(first, above, out=products)
        products.baddbmm_(second, here)
        products.baddbmm_(third, below)
        torch.add(left, middle, out=new)
        new.add_(right)

    return step


def pool_step(x: Tensor, out: Tensor) -> Callable[[], None]:
    """2x2 average: x (..., H, W, n) -> out (..., H // 2, W // 2, n)."""
    h, w = out.shape[-3:-1]
    rows = torch.empty(*x.shape[:-3], h, *x.shape[-2:])
    top, bottom = x[..., 0 : 2 * h : 2, :, :], x[..., 1 : 2 * h : 2, :, :]
    left, right = rows[..., 0 : 2 * w : 2, :], rows[..., 1 : 2 * w : 2, :]

    def step() -> None:
        torch.lerp(top, bottom, 0.5, out=rows)
        torch.lerp(left, right, 0.5, out=out)

    return step


class Plan:
    """All calls for n images of height x width, with the buffers and views that they need."""

    def __init__(self, net: "FastCondenseNet", n: int, height: int, width: int):
        self.net, self.steps = net, []
        H, W = (height - 1) // net.stride + 1, (width - 1) // net.stride + 1
        channels, features = len(net.stem), None
        for m, block in enumerate(net.blocks):
            if m > 0:
                x, channels = self.transition(net.transitions[m - 1], features)
                H, W = H // 2, W // 2
            features = torch.empty(channels + sum(layer.growth for layer in block), H, W, n)
            if m == 0:
                self.first = features[:channels]
            else:
                self.steps.append(pool_step(x, features[:channels].view(-1, x.shape[0], H, W, n).transpose(0, 1)))
            width_1x1 = block[0].pointwise.bias.numel()
            buffers = (
                torch.empty(max(len(layer.pointwise.lower) for layer in block), H * W * n),
                torch.empty(width_1x1, H * W * n),
                torch.zeros(width_1x1, H + 2, (W + 1) * n),  # what is not written stays zero
                torch.zeros(3 * block[0].growth * H * (W + 1) * n + 2 * n),  # n at both ends, for the shifts
            )
            for layer in block:
                self.steps.append(layer_step(layer, features, channels, buffers))
                channels += layer.growth
        self.last = features.flatten(1)
        self.gathered = torch.empty(len(net.head.lower), H * W * n)
        self.pixels = self.gathered.view(-1, H * W, n)

    def transition(self, folded: Folded | None, x: Tensor) -> tuple[Tensor, int]:
        """What the pool reads, (G, O/G, H, W, n): the features, or the 1x1 convolution of DenseNet-BC on them."""
        if folded is None:
            return x[None], len(x)
        out, gathered = torch.empty(*folded.bias.shape[:2], *x.shape[1:]), torch.empty(len(folded.lower), x[0].numel())
        self.steps.append(pointwise_step(folded, x.flatten(1), out.flatten(2), gathered))
        return out, folded.bias.numel()

    def run(self, images: Tensor) -> Tensor:
        """(n, 3, height, width) -> (n, classes)."""
        stem = F.conv2d(images, self.net.stem, None, self.net.stride, 1)
        self.first.copy_(stem.permute(1, 2, 3, 0))
        for step in self.steps:
            step()
        clamp(self.net.head, self.last, self.gathered)
        return torch.addmm(self.net.head.bias[0], self.net.head.weight[0], self.pixels.mean(1)).T


class FastCondenseNet:
    """A CondenseNet for inference on the CPU: images (N, 3, H, W) -> logits (N, classes), float32.

    model: condensed, or in training form with all condensing stages done (then converted here, the classifier whole);
    static and dense 1x1 convolutions are taken, too. The weights are copied. threads: torch.get_num_threads() now,
    unless given; they are the engine's own, started here, and do not survive os.fork. Calls may come from several
    threads. Buffers are kept for the next images of a size. ValueError for a model or images that do not fit.
    """

    @torch.inference_mode()
    def __init__(self, model: CondenseNet, threads: int | None = None):
        if any(p.device.type != "cpu" or p.dtype != torch.float32 for p in model.parameters()):
            raise ValueError("expected a float32 model on the CPU; move it there with model.cpu().float()")
        self.threads = torch.get_num_threads() if threads is None else threads
        if self.threads < 1:
            raise ValueError(f"threads={threads}: expected at least 1")
        model = condense(model, classifier=False)
        self.stem, self.stride = model.stem.weight, model.stem_stride
        self.blocks = [[fold_layer(layer) for layer in block] for block in model.blocks]
        self.transitions = [fold_pointwise(t[0]) if len(t) > 1 else None for t in model.transitions]
        (a, b), index, linear = scale_shift(model.norm, torch.float64), None, model.classifier
        if isinstance(linear, CondensedLinear):
            index, linear = linear.index, linear.linear
            a, b = a[index], b[index]
        self.head = fold(a, b, linear.weight[None], index, linear.bias[None, :, None])
        self.plans = collections.defaultdict(list)  # (n, height, width): plans that are not in use
        self.pool = started_pool(self.threads)

    def __call__(self, images: Tensor) -> Tensor:
        smallest = self.stride * (2 ** len(self.transitions) - 1) + 1  # the stem rounds up, each pool down
        if images.dim() != 4 or images.shape[1] != 3 or not len(images) or min(images.shape[2:]) < smallest:
            sizes = f"(N, 3, H, W), N at least 1, H and W at least {smallest}"
            raise ValueError(f"images {tuple(images.shape)}: expected {sizes}")
        if images.device.type != "cpu" or images.dtype != torch.float32:
            raise ValueError(f"images of {images.dtype} on {images.device}: expected float32 on the CPU")
        if images.requires_grad and torch.is_grad_enabled():
            raise ValueError("this engine has no backward: call it under torch.no_grad(), or differentiate the model")
        N, _, H, W = images.shape
        chunks = math.ceil(N / max(1, CHUNK_PIXELS // (H * W)))
        chunks = min(N, self.threads * math.ceil(chunks / self.threads))  # as many for every thread
        logits = torch.empty(N, self.head.bias.shape[1])
        list(self.pool.map(self.run, images.tensor_split(chunks), logits.tensor_split(chunks)))
        return logits

    @torch.inference_mode()
    def run(self, images: Tensor, logits: Tensor) -> None:
        """One chunk, on the calling thread. A plan belongs to one caller at a time."""
        shape = len(images), *images.shape[2:]
        if len(self.plans) > 8:  # images of many sizes: do not keep buffers for all
            self.plans.clear()
        free = self.plans[shape]
        try:
            plan = free.pop()
        except IndexError:
            plan = Plan(self, *shape)
        logits.copy_(plan.run(images))
        free.append(plan)


def started_pool(threads: int) -> ThreadPoolExecutor:
    """Threads that compute on one thread each; the caller's setting stays as it is.

    torch.set_num_threads is for the calling thread, and for those that have not yet asked for their number: on their
    first operation they take the last one set. So each thread here asks, then sets; then the caller sets its own again.
    """

    def start() -> None:
        torch.get_num_threads()
        torch.set_num_threads(1)
        started.wait()

    before, started = torch.get_num_threads(), threading.Barrier(threads + 1)
    pool = ThreadPoolExecutor(threads, "condensenet", initializer=start)
    for _ in range(threads):
        pool.submit(int)  # one thread starts with each, as none is idle before all have started
    started.wait()
    torch.set_num_threads(before)
    return pool

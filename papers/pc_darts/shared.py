"""The search cell with all shared work done once: the same function and gradients as `reference.PlainCell`.

Four facts make it cheap. (1) All edges leaving a state read the same C/K channels: ReLU and pools (and their affine-free
BN) are evaluated once per state, the first depthwise convolutions of its edges are one call. (2) An affine-free BN after
a pointwise convolution W only needs the mean and covariance of its input d: BN(W d) = A d + b with
A = W / sqrt(diag(W cov W^T) + eps), b = -A mean. Nothing of W d is stored. (3) Whatever ends a branch is then linear in
its input, and the mixture over operations is one small matrix per edge. (4) The shuffle is the same permutation on
every edge: a node sums first and is shuffled once.
"""

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from .genotypes import EDGES, NODES, PRIMITIVES
from .kernels import mix_bypass_shuffle
from .operations import FactorizedReduce
from .reference import PlainCell

EPS, MOMENTUM = 1e-5, 0.1  # of nn.BatchNorm2d
MAX, AVG, SKIP, SEP3, SEP5, DIL3, DIL5 = (PRIMITIVES.index(o) for o in PRIMITIVES[1:])


class FoldedNorm(nn.Module):
    """Affine-free batch norm as numbers, not maps: given the statistics of a batch, its scale; keeps running ones."""

    def __init__(self, *shape: int):
        super().__init__()
        self.register_buffer("running_mean", torch.zeros(shape))
        self.register_buffer("running_var", torch.ones(shape))

    def scale(self, mean: Tensor, var: Tensor, n: int) -> Tensor:
        """1 / sigma for the mean and biased variance over n values; records the running statistics."""
        with torch.no_grad():
            self.running_mean.lerp_(mean.to(self.running_mean.dtype), MOMENTUM)
            self.running_var.lerp_((var * (n / max(n - 1, 1))).to(self.running_var.dtype), MOMENTUM)
        return (var.clamp_min(0) + EPS).rsqrt()  # a variance from a covariance may round below zero


class PointwiseNorm(FoldedNorm):
    """Parallel 1x1 convolutions W (*G, c_out, c_in), each followed by BN, as affine maps: BN(W d) = A d + b."""

    def __init__(self, *shape: int):
        super().__init__(*shape[:-1])
        bound = shape[-1] ** -0.5  # what nn.Conv2d draws from for this fan-in
        self.weight = nn.Parameter(torch.empty(shape).uniform_(-bound, bound))

    def matrix(self) -> Tensor:
        return self.weight

    def forward(self, moments: tuple[Tensor, Tensor, int] | None) -> tuple[Tensor, Tensor]:
        """moments of the input (training; None: running statistics) -> A (*G, c_out, c_in), b (*G, c_out, 1)."""
        weight = self.matrix()
        if moments is None:
            mean, scale = self.running_mean[..., None], (self.running_var + EPS).rsqrt()
        else:
            d_mean, cov, n = moments
            mean = weight @ d_mean[..., None]
            var = ((weight @ cov) * weight).sum(-1)
            scale = self.scale(mean[..., 0], var, n)
        return weight * scale[..., None], -mean * scale[..., None]


class ReduceNorm(PointwiseNorm):
    """FactorizedReduce of E edges on the stacked even and odd pixels (2c): two c -> c/2 blocks per edge."""

    def __init__(self, edges: int, c: int):
        super().__init__(edges, 2, c // 2, c)
        self.running_mean, self.running_var = torch.zeros(edges, c), torch.ones(edges, c)

    def matrix(self) -> Tensor:
        even, odd = self.weight.unbind(1)
        return torch.cat([F.pad(even, (0, even.shape[-1])), F.pad(odd, (odd.shape[-1], 0))], dim=1)


def moments(total: Tensor, gram: Tensor, n: int) -> tuple[Tensor, Tensor, int]:
    """Mean (*G, c), covariance (*G, c, c) and count n of maps whose columns sum to `total`, their squares to `gram`."""
    mean = total / n
    return mean, gram / n - mean[..., None] * mean[..., None, :], n


class FoldedConv(nn.Module):
    """Pointwise convolution and affine-free BN of a rectified map, (N, c_in, H, W) -> (N, c_out, H, W).

    What it keeps for backward is its input alone. Computed in float32 (float64), as in `Source`.
    """

    def __init__(self, c_in: int, c_out: int):
        super().__init__()
        self.norm = PointwiseNorm(c_out, c_in)

    def forward(self, x: Tensor) -> Tensor:
        n, _, height, width = x.shape
        with torch.autocast(x.device.type, enabled=False):
            d = x.to(torch.promote_types(x.dtype, torch.float32)).flatten(2)
            if self.training:
                total, gram = _Sums.apply(d)
                a, b = self.norm(moments(total.sum(0), gram.sum(0), n * height * width))
            else:
                a, b = self.norm(None)
            out = torch.baddbmm(b.expand(n, -1, -1), a.expand(n, -1, -1), d)
        return out.view(n, -1, height, width).to(x.dtype)


class _Sums(torch.autograd.Function):
    """d (*G, c, n) -> sum of its columns (*G, c), d d^T (*G, c, c). Backward is one product: t + (g + g^T) d."""

    @staticmethod
    def forward(ctx, d: Tensor) -> tuple[Tensor, Tensor]:
        ctx.save_for_backward(d)
        return d.sum(-1), d @ d.mT

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx, t: Tensor, g: Tensor) -> Tensor:
        (d,) = ctx.saved_tensors
        c, n = d.shape[-2:]
        product = torch.baddbmm(t.reshape(-1, c, 1), (g + g.mT).reshape(-1, c, c), d.reshape(-1, c, n))
        return product.view(d.shape)


class Source(nn.Module):
    """Every operation on the E edges leaving one state, on its first c channels."""

    def __init__(self, c: int, edges: int, stride: int):
        super().__init__()
        self.c, self.edges, self.stride = c, edges, stride

        def depthwise(kernel: int, dilation: int, inputs: int, stride: int) -> nn.Conv2d:
            padding = dilation * (kernel - 1) // 2
            return nn.Conv2d(inputs, edges * c, kernel, stride, padding, dilation, groups=inputs, bias=False)

        # First depthwise convolutions: the c inputs are shared, output channel i * E + e belongs to edge e.
        self.sep = nn.ModuleList(depthwise(k, 1, c, stride) for k in (3, 5))
        self.dil = nn.ModuleList(depthwise(k, 2, c, stride) for k in (3, 5))
        self.sep_point = PointwiseNorm(2, edges, c, c)
        self.sep_again = nn.ModuleList(depthwise(k, 1, edges * c, 1) for k in (3, 5))
        self.point = PointwiseNorm(edges, 4, c, c)  # sep3, sep5, dil3, dil5
        self.pool_norm = FoldedNorm(2, c)  # max, avg
        self.skip = ReduceNorm(edges, c) if stride == 2 else None

    def forward(self, x: Tensor, w: Tensor) -> Tensor:
        """x (N, c, H, W), weights (E, 8) of the operations -> the mixtures (E, N, c, H/s, W/s) in the dtype of x.

        Computed in float32 (float64 for float64), under autocast too: covariances do not survive half precision.
        """
        with torch.autocast(x.device.type, enabled=False):
            return self.mixtures(x.to(torch.promote_types(x.dtype, torch.float32)), w).to(x.dtype)

    def mixtures(self, x: Tensor, w: Tensor) -> Tensor:
        # Maps are laid out (edge, channel, image, pixel): one matrix product an edge then covers the whole batch.
        n, c, edges = x.shape[0], self.c, self.edges
        height, width = x.shape[2] // self.stride, x.shape[3] // self.stride
        relu = x.relu()

        def by_edge(conv: nn.Conv2d) -> Tensor:
            return conv(relu).view(n, c, edges, height * width).permute(2, 1, 0, 3)

        first = torch.stack([by_edge(conv) for conv in self.sep]).flatten(3)  # (2, E, c, N P)
        a, b = self.sep_point(moments(*_Sums.apply(first), first.shape[-1]) if self.training else None)
        first = torch.baddbmm(b.flatten(0, 1), a.flatten(0, 1), first.flatten(0, 1)).relu_()
        first = first.view(2, edges * c, n, height, width).transpose(1, 2)
        last = torch.stack(
            [
                conv(h).view(n, edges, c, height * width).permute(1, 2, 0, 3)
                for conv, h in zip(self.sep_again, first.unbind(), strict=True)
            ]
            + [by_edge(conv) for conv in self.dil],
            dim=1,
        ).flatten(3)  # (E, 4, c, N P)
        a, b = self.point(moments(*_Sums.apply(last), last.shape[-1]) if self.training else None)
        w_conv = w[:, SEP3:, None, None]
        a, b = (a * w_conv).transpose(1, 2).flatten(2), (b * w_conv).sum(1)  # (E, c, 4c), (E, c, 1)

        common, a_common, b_common = self.common(x, relu, w)
        mixed = torch.addmm((b + b_common).view(-1, 1), a_common.flatten(0, 1), common)
        mixed = torch.baddbmm(mixed.view(edges, c, -1), a, last.flatten(1, 2))
        return mixed.view(edges, c, n, height, width).transpose(1, 2)

    def common(self, x: Tensor, relu: Tensor, w: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Skip and pools: what the edges share (i, N P), and how edge e reads it: A (E, c, i), b (E, c, 1)."""
        max_pool = F.max_pool2d(x, 3, self.stride, padding=1)
        avg_pool = F.avg_pool2d(x, 3, self.stride, padding=1, count_include_pad=False)
        skip = [x] if self.skip is None else [relu[:, :, ::2, ::2], relu[:, :, 1::2, 1::2]]
        maps = torch.cat([m.transpose(0, 1) for m in (max_pool, avg_pool, *skip)]).flatten(1)
        pools, skip = maps.split([2 * self.c, len(skip) * self.c])
        pools = pools.unflatten(0, (2, self.c))
        norm = self.pool_norm
        if self.training:
            var, mean = torch.var_mean(pools, -1, correction=0)
            scale = norm.scale(mean, var, pools.shape[-1])
        else:
            mean, scale = norm.running_mean, (norm.running_var + EPS).rsqrt()
        w_pool = w[:, MAX : AVG + 1, None] * scale  # (E, 2, c)
        a = torch.diag_embed(w_pool).transpose(1, 2).flatten(2)
        b = -(w_pool * mean).sum(1)[..., None]
        w_skip = w[:, SKIP, None, None]
        if self.skip is None:
            a_skip = w_skip * torch.eye(self.c, device=x.device, dtype=w.dtype)
        else:
            a_skip, b_skip = self.skip(moments(*_Sums.apply(skip), skip.shape[-1]) if self.training else None)
            a_skip, b = w_skip * a_skip, b + w_skip * b_skip
        return maps, torch.cat([a, a_skip], dim=2), b


class SharedCell(nn.Module):
    """Same result as `PlainCell` from inputs that went through ReLU already: the two cells reading a map share that too.

    `load_plain` takes the weights of a plain cell.
    """

    def __init__(self, c_pp: int, c_p: int, C: int, K: int, reduction: bool, reduction_prev: bool):
        super().__init__()
        self.c, self.reduction = C // K, reduction
        self.preprocess0 = FactorizedReduce(c_pp, C, affine=False) if reduction_prev else FoldedConv(c_pp, C)
        self.preprocess1 = FoldedConv(c_p, C)
        if reduction_prev:
            self.preprocess0.relu = nn.Identity()
        # State s feeds the nodes max(s - 1, 0)..3; the output of the last node goes nowhere inside the cell.
        self.sources = nn.ModuleList(
            Source(self.c, NODES - max(s - 1, 0), 2 if reduction and s < 2 else 1) for s in range(NODES + 1)
        )

    def forward(self, s0: Tensor, s1: Tensor, alphas: Tensor, betas: Tensor | None) -> Tensor:
        states = [self.preprocess0(s0), self.preprocess1(s1)]
        betas = torch.ones_like(alphas[:, 0]) if betas is None else betas
        weights = alphas * betas[:, None]
        mixed, bypass = [], []
        for node in range(NODES):
            for s in range(len(mixed), node + 2):
                edges = [e for e, edge in enumerate(EDGES) if edge[0] == s]
                x = states[s]
                mixed.append(self.sources[s](x[:, : self.c], weights[edges]).unbind())
                x = x[:, self.c :]
                if self.reduction and s < 2:  # with K=1 there is nothing to pool, which max_pool2d refuses
                    x = F.max_pool2d(x, 2, 2) if x.shape[1] else x[:, :, ::2, ::2]
                bypass.append(x)
            ins = [mixed[s][node - max(s - 1, 0)] for s in range(node + 2)]
            first = node * (node + 3) // 2  # number of the node's first edge
            states.append(mix_bypass_shuffle(ins, bypass, betas[first : first + node + 2]))
        return torch.cat(states[2:], dim=1)

    @torch.no_grad()
    def load_plain(self, plain: PlainCell) -> None:
        """Copy weights and running statistics of a plain cell of the same shape.

        Pools of edges with one source have seen the same maps: any of their equal statistics stands for all.
        """
        for mine, theirs in ((self.preprocess0, plain.preprocess0), (self.preprocess1, plain.preprocess1)):
            if isinstance(mine, FoldedConv):
                _copy(mine.norm, (), theirs.conv.weight, theirs.bn)
            else:
                mine.load_state_dict(theirs.state_dict())
        for s, source in enumerate(self.sources):
            for e, edge in enumerate(i for i, pair in enumerate(EDGES) if pair[0] == s):
                ops = plain.edges[edge].ops
                for k in range(2):
                    sep, dil = ops[SEP3 + k], ops[DIL3 + k]
                    source.sep[k].weight[e :: source.edges].copy_(sep[1].weight)
                    source.dil[k].weight[e :: source.edges].copy_(dil[1].weight)
                    source.sep_again[k].weight[e * self.c : (e + 1) * self.c].copy_(sep[5].weight)
                    _copy(source.sep_point, (k, e), sep[2].weight, sep[3])
                    _copy(source.point, (e, k), sep[6].weight, sep[7])
                    _copy(source.point, (e, 2 + k), dil[2].weight, dil[3])
                    _copy(source.pool_norm, (k,), None, ops[MAX + k][1])
                if source.skip is not None:
                    skip = ops[SKIP]
                    _copy(source.skip, (e,), torch.stack([skip.conv_1.weight, skip.conv_2.weight]), skip.bn)


def _copy(to: FoldedNorm, index: tuple, weight: Tensor | None, norm: nn.BatchNorm2d) -> None:
    if weight is not None:
        to.weight[index].copy_(weight[..., 0, 0])
    to.running_mean[index].copy_(norm.running_mean)
    to.running_var[index].copy_(norm.running_var)

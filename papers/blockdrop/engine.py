"""Inference that really skips: a block runs on the images that keep it, and on no others.

    engine = SkippingEngine(model, policy_net)
    logits, policies = engine(images)

Copying the rows that a block keeps out of the batch, and its results back, takes time that multiply-adds do not count.
Here a block finds its rows side by side and works on that slice in place: before every two blocks, rows are put in the
order

    kept by the first (1, 0) | by both (1, 1) | by the second (0, 1) | by none (0, 0)

which leaves one slice to each of the two. That is half a copy of the features a block, none where policies are equal.
"""

import copy

import torch
from torch import Tensor, nn
from torch.nn.utils.fusion import fuse_conv_bn_eval

from .model import DroppableResNet, check_policy, kept_counts
from .policy import PolicyNet

CHUNK_PIXELS = 64 * 32 * 32  # of images computed at a time on CPU: of more, the features leave the cache;
SMALLEST_CHUNK = 4  # but as many images at least: a convolution reads its weights once a chunk


def for_inference(model: nn.Module) -> nn.Module:
    """A copy that computes what `model` does in eval mode, faster: batch norms folded, weights channels_last."""
    model = copy.deepcopy(model).eval().requires_grad_(False)
    for layers in [m for m in model.modules() if isinstance(m, nn.Sequential)]:
        for i in reversed(range(len(layers) - 1)):
            if isinstance(layers[i + 1], nn.BatchNorm2d):
                layers[i] = fuse_conv_bn_eval(layers[i], layers[i + 1])
                del layers[i + 1]
    return model.to(memory_format=torch.channels_last)


def chunk_for(images: Tensor) -> int:
    """How many of these images (B, 3, H, W) to compute at a time: on a GPU, all."""
    B, _, H, W = images.shape
    return max(SMALLEST_CHUNK, CHUNK_PIXELS // max(1, H * W) if images.device.type == "cpu" else B)


@torch.inference_mode()
def in_chunks(model: nn.Module, images: Tensor, chunk: int | None = None) -> Tensor:
    """model(images), `chunk` images at a time, by default as many as `chunk_for` says."""
    images = images.contiguous(memory_format=torch.channels_last)
    return torch.cat([model(x) for x in images.split(chunk or chunk_for(images))])


class SkippingEngine:
    """images (B, 3, H, W) -> logits (B, classes) under each image's policy, and the policies (B, K) bool.

    Copies of both networks are made for inference: later changes to them do not reach the engine. policy_net can be
    left out where policies are given. chunk: images at a time, by default as many as `chunk_for` says.
    Logits are those of the masked form in eval mode, `model(images, policies)`, to rounding.
    """

    def __init__(self, model: DroppableResNet, policy_net: PolicyNet | None = None, chunk: int | None = None):
        if policy_net is not None and policy_net.num_blocks != model.num_blocks:
            raise ValueError(f"a policy of {policy_net.num_blocks} bits for {model.num_blocks} blocks")
        if chunk is not None and chunk < 1:
            raise ValueError(f"chunk={chunk}, expected at least 1")
        self.model, self.chunk = for_inference(model), chunk
        self.policy_net = None if policy_net is None else for_inference(policy_net)

    def policies(self, images: Tensor) -> Tensor:
        """u = 1[s >= 0.5], (B, K) bool."""
        if self.policy_net is None:
            raise ValueError("an engine without a policy network: give it one, or the policy of each image")
        return in_chunks(self.policy_net, images, self.chunk) >= 0.5

    @torch.inference_mode()
    def __call__(self, images: Tensor, policy: Tensor | None = None) -> tuple[Tensor, Tensor]:
        """policy (B, K), 1 keep / 0 drop; None: asks the policy network. ValueError as of the model."""
        if images.ndim != 4 or images.shape[1] != 3:
            raise ValueError(f"images {tuple(images.shape)}, expected (B, 3, H, W)")
        images = images.contiguous(memory_format=torch.channels_last)
        policy = self.policies(images) if policy is None else policy
        check_policy(policy, len(images), self.model.num_blocks)
        bits = policy.cpu()  # on a GPU, where this batch waits
        if bits.dtype != torch.bool:
            kept_counts(bits)  # are all 0 or 1?
        bits, chunk = bits.bool(), self.chunk or chunk_for(images)
        if len(images) <= chunk:
            return self._run(images, bits), policy.bool()
        order = bits.unique(dim=0, return_inverse=True)[1].argsort()  # equal policies in one chunk
        parts = zip(take(images, order).split(chunk), bits[order].split(chunk), strict=True)
        return take(torch.cat([self._run(*part) for part in parts]), order.argsort()), policy.bool()

    def _run(self, images: Tensor, policies: Tensor) -> Tensor:
        """Logits of one chunk; policies (B, K) bool, on the CPU."""
        orders, moved, slices = plan(policies)
        orders = orders.to(images.device)
        x, spare = self.model.stem(images), None
        for k, (block, rows) in enumerate(zip(self.model.blocks, slices, strict=True)):
            if k % 2 == 0 and moved[k // 2]:
                if spare is None or spare.shape != x.shape:
                    spare = torch.empty_like(x)
                x, spare = take(x, orders[k // 2], out=spare), x  # memory that is in the cache
            if rows.stop - rows.start == len(x):
                x = block(x)
                continue
            y = block.shortcut(x)  # x itself, but where a stage begins
            if rows.stop > rows.start:
                y[rows].add_(block.residual(x[rows])).relu_()
            x = y
        logits = self.model.head(x)
        return take(logits, orders[-1]) if moved[-1] else logits


def plan(policies: Tensor) -> tuple[Tensor, list[bool], list[slice]]:
    """Policies (B, K) bool -> P + 1 orders (P + 1, B), which of them move rows, and K slices; P = ceil(K / 2).

    orders[t] is what to take ahead of blocks 2t and 2t + 1 (from 0), in terms of the order before; the last one puts rows
    back as they were. Each block runs on its slice.
    """
    B, K = policies.shape
    P, numbers = (K + 1) // 2, torch.arange(B, device=policies.device)
    if (policies == policies[:1]).all():
        return numbers.expand(P + 1, B), [False] * (P + 1), [slice(0, B * kept) for kept in policies.all(0).tolist()]
    pairs = torch.cat([policies, policies.new_zeros(B, K % 2)], dim=1).view(B, P, 2).long()
    first, second = pairs.unbind(2)
    places = 3 - 3 * first - second + 2 * first * second  # 0, 1, 2, 3 for 10, 11, 01, 00
    rows = torch.cat([places.T.argsort(dim=1, stable=True), numbers[None]])
    places_before = torch.cat([numbers[None], rows[:-1].argsort(dim=1)])
    orders = places_before.gather(1, rows)
    moved = (orders != numbers).any(dim=1).tolist()
    counts = torch.stack([first.sum(0), (first * (1 - second)).sum(0), second.sum(0)], dim=1).tolist()
    slices = [s for n, alone, m in counts for s in (slice(0, n), slice(alone, alone + m))]
    return orders, moved, slices[:K]


def take(x: Tensor, rows: Tensor, out: Tensor | None = None) -> Tensor:
    """x[rows], of a channels_last x (N, C, ...) channels_last: index_select alone would change the layout, slowly."""
    last = None if out is None else out.movedim(1, -1)
    taken = torch.index_select(x.movedim(1, -1), 0, rows.to(x.device), out=last).movedim(-1, 1)
    return taken if out is None else out

"""Inference that really stops: an image that is confident enough leaves the batch (section 3 of the paper).

    engine = GlanceFocusEngine(model, policy, thresholds)  # thresholds of common/metrics/early_exit.py
    logits, steps = engine(images)

Without thresholds all images take all T steps: the whole sequence in the same fast form, to compare with.
"""

import copy

import torch
from torch import Tensor, fx, nn
from torch.nn.utils.fusion import fuse_conv_bn_eval

from .crop import crop
from .encoders import Encoder
from .model import GFNet
from .policy import Policy

CHUNK = 32  # images at a time on the CPU: the first maps of a larger batch leave the cache between two layers


def for_inference(module: nn.Module) -> nn.Module:
    """A copy that computes what `module` does in eval mode, faster; it is not for training.

    Batch norms of the encoders are folded into the convolution before them, where there is one (not in all of DenseNet:
    many of its norms read a concatenation). Weights are channels_last.
    """
    module = copy.deepcopy(module).eval().requires_grad_(False)
    for encoder in [m for m in module.modules() if isinstance(m, Encoder)]:
        _fold(encoder.trunk)
    return module.to(memory_format=torch.channels_last)


def _fold(trunk: nn.Module) -> None:
    """In place. Who reads whose output is traced, since torchvision's networks do not all say it by their layout."""
    layers = dict(trunk.named_modules())
    for node in fx.symbolic_trace(trunk).graph.nodes:
        if isinstance(layers.get(node.target), nn.BatchNorm2d):
            (source,) = node.args
            if isinstance(layers.get(source.target), nn.Conv2d) and len(source.users) == 1:
                folded = fuse_conv_bn_eval(layers[source.target], layers[node.target])
                trunk.set_submodule(source.target, folded)
                trunk.set_submodule(node.target, nn.Identity())


class GlanceFocusEngine:
    """images (B, 3, H, W) -> logits (B, classes) of the step that each image stopped at, and that step (B,) int64 in 1..T.

    model, policy: copies are made for inference; later changes to them do not reach the engine.
    thresholds: (T,) confidence for stopping after each step, as `early_exit.thresholds` gives them; the last step takes
        the rest, whatever its own. None: all images take all steps.
    chunk: images at a time; None is 32 on the CPU and the whole batch elsewhere.

    Images that stay are gathered from the whole batch before they go on in chunks, so give it large batches: what is
    carried from step to step is small. Logits and steps are those of running all T steps and choosing by `exits_taken`,
    to rounding (which can also move a crop by a pixel). `samples_run`: how many images each step has encoded since the
    engine was made. Images are on the model's device and of its dtype, best contiguous; H and W at least P, else ValueError.
    """

    def __init__(self, model: GFNet, policy: Policy, thresholds: Tensor | None = None, chunk: int | None = None):
        if thresholds is None:
            thresholds = torch.full((model.steps,), torch.inf)
        if thresholds.shape != (model.steps,) or thresholds.isnan().any():
            expected = f"one number for each of {model.steps} steps"
            raise ValueError(
                f"thresholds {thresholds.tolist()}, expected {expected}: see common.metrics.early_exit.thresholds"
            )
        if chunk is not None and chunk < 1:
            raise ValueError(f"chunk={chunk}, expected at least 1")
        self.model, self.policy = for_inference(model), for_inference(policy)
        self.thresholds, self.chunk = thresholds.tolist(), chunk
        self.samples_run = [0] * model.steps

    @torch.inference_mode()
    def __call__(self, images: Tensor) -> tuple[Tensor, Tensor]:
        if not images.is_contiguous(memory_format=torch.channels_last):
            images = images.contiguous()  # once, not for every crop
        rows = torch.arange(len(images), device=images.device)  # of the images still there
        steps, answers = torch.empty_like(rows), None
        locations = state = h = None
        for t, threshold in enumerate(self.thresholds, 1):
            self.samples_run[t - 1] += len(rows)
            logits, state, e = self._step(t, images, rows, locations, state)
            answers = torch.empty_like(logits) if answers is None else answers
            answers[rows] = logits  # a later step writes over it
            steps.index_fill_(0, rows, t)
            if t == len(self.thresholds):
                break
            confidence = logits.softmax(1).amax(1)
            stay = (~(confidence >= threshold)).nonzero()[:, 0]  # NaN stays; the step's one wait for the device
            if not len(stay):
                break
            if len(stay) < len(rows):
                rows, state, e, h = (x if x is None else x[stay] for x in (rows, state, e, h))
            locations, _, h = self.policy(e, h)
        return answers, steps

    def _step(
        self, t: int, images: Tensor, rows: Tensor, locations: Tensor | None, state: Tensor | None
    ) -> list[Tensor]:
        """Step t of the images `rows`, chunk by chunk: logits, state and e; locations and state have a row for each."""
        model, parts = self.model, []
        chunk = self.chunk or (CHUNK if images.device.type == "cpu" else max(len(rows), 1))
        for part in (slice(i, i + chunk) for i in range(0, max(len(rows), 1), chunk)):
            if t == 1:
                x = model.glance(images[part])
            else:
                where = locations[part].nan_to_num(0.5)  # images that are NaN have no location
                x = crop(images, where, model.patch, rows[part])
            x = x.contiguous(memory_format=torch.channels_last)
            step, after = model.step(t, x, None if state is None else state[part], own=False)
            parts.append((step.logits, after, step.e))
        return [torch.cat(tensors) for tensors in zip(*parts, strict=True)]

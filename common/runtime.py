"""What every training loop needs and no loop should write twice: keyed randomness, devices and ranks, stopping.

Nothing here owns a loop. A script reads top to bottom; it calls these functions where it needs them.
"""

import atexit
import hashlib
import os
import random
import signal
from dataclasses import dataclass

import numpy as np
import torch
import torch.distributed as dist

from common.errors import UserError

EXIT_BAD_INPUT = 2
EXIT_STOPPED = 75  # EX_TEMPFAIL: stopped by SIGTERM after saving; start the same command again to go on
EXIT_DIVERGED = 3  # a loss that is not finite, a policy that collapsed


# ------------------------------------------------------------------------------------------------ keyed randomness
def keyed_seed(seed: int, *key: int | str) -> int:
    """A 63-bit seed that is a pure function of (seed, *key): nothing to save, nothing to forget on resume."""
    digest = hashlib.sha256(repr((int(seed), *key)).encode()).digest()
    return int.from_bytes(digest[:8], "little") >> 1


def keyed_generator(seed: int, *key: int | str) -> torch.Generator:
    """A CPU generator seeded by `keyed_seed`. CPU even on CUDA runs, so that draws do not depend on the device."""
    return torch.Generator().manual_seed(keyed_seed(seed, *key))


def keyed_order(n: int, seed: int, epoch: int) -> torch.Tensor:
    """The data order of one epoch: a permutation of range(n), a pure function of (seed, epoch)."""
    return torch.randperm(n, generator=keyed_generator(seed, "order", epoch))


def seed_everything(seed: int, deterministic: bool = False) -> None:
    """Seed Python, numpy and torch; `deterministic` also makes CUDA kernels repeatable (slower)."""
    random.seed(keyed_seed(seed, "python"))
    np.random.seed(keyed_seed(seed, "numpy") % 2**32)  # noqa: NPY002 - libraries that use the global state
    torch.manual_seed(keyed_seed(seed, "torch"))
    if deterministic:
        os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")
        torch.use_deterministic_algorithms(True, warn_only=True)
        torch.backends.cudnn.benchmark = False


# ------------------------------------------------------------------------------------------------ devices and ranks
@dataclass(frozen=True)
class World:
    """Where this process runs. One process: rank 0 of 1."""

    rank: int
    size: int
    device: torch.device

    @property
    def is_main(self) -> bool:
        return self.rank == 0


def select_device(name: str = "auto") -> torch.device:
    """`auto` is CUDA when there is one. Asking for a CUDA that is not there is an error, never a silent CPU run."""
    if name not in ("auto", "cpu", "cuda"):
        raise UserError(f"unknown device {name!r}; expected auto, cpu or cuda")
    if name == "cuda" and not torch.cuda.is_available():
        raise UserError("device cuda was asked for, but torch sees no CUDA device; use --device cpu (DEVICE=cpu)")
    return torch.device("cuda" if name != "cpu" and torch.cuda.is_available() else "cpu")


def set_up_world(device: str = "auto") -> World:
    """Join the process group when torchrun started us (RANK and WORLD_SIZE are set); else a world of one."""
    chosen = select_device(device)
    if "WORLD_SIZE" not in os.environ:
        return World(0, 1, chosen)
    if chosen.type == "cuda":
        chosen = torch.device("cuda", int(os.environ.get("LOCAL_RANK", 0)))
        torch.cuda.set_device(chosen)
    if not dist.is_initialized():
        dist.init_process_group("nccl" if chosen.type == "cuda" else "gloo")
        atexit.register(_leave_world)
    return World(dist.get_rank(), dist.get_world_size(), chosen)


def require_one_process(world: World, script: str) -> None:
    if world.size > 1:
        raise UserError(f"{script} runs in one process; start it without torchrun")


def _leave_world() -> None:
    """At exit: gloo's threads hold the tensors of the last call for a while, and abort once the interpreter is gone."""
    if dist.is_initialized():
        dist.destroy_process_group()


def average_gradients(gradients) -> None:
    """Average tensors over all ranks, in place, with one flat all_reduce a dtype.

    Takes gradients (`p.grad`s, or what `torch.autograd.grad` returned); None entries are passed over. DDP does not
    see `autograd.grad` and `.module` calls, so searches, RL and local losses call this instead. No-op in one process.
    """
    if not dist.is_initialized() or dist.get_world_size() == 1:
        return
    by_dtype: dict[torch.dtype, list[torch.Tensor]] = {}
    for gradient in gradients:
        if gradient is not None:
            by_dtype.setdefault(gradient.dtype, []).append(gradient)
    for tensors in by_dtype.values():
        flat = torch.cat([t.reshape(-1) for t in tensors])
        dist.all_reduce(flat)
        flat /= dist.get_world_size()
        for tensor, part in zip(tensors, flat.split([t.numel() for t in tensors]), strict=True):
            tensor.copy_(part.view_as(tensor))


def sum_over_ranks(tensor: torch.Tensor) -> torch.Tensor:
    """Sum in place over all ranks (counts of correct answers, for one). No-op in one process."""
    if dist.is_initialized() and dist.get_world_size() > 1:
        dist.all_reduce(tensor)
    return tensor


def gather_rows(tensor: torch.Tensor) -> torch.Tensor:
    """The rows of all ranks, rank 0's first, on the CPU; ranks may differ in how many. In one process: its own."""
    parts = [tensor.cpu()]
    if dist.is_initialized() and dist.get_world_size() > 1:
        parts = [None] * dist.get_world_size()
        dist.all_gather_object(parts, tensor.cpu())
    return torch.cat(parts)


def broadcast_from_main(tensors) -> None:
    """Give every rank rank 0's values, in place (parameters at the start, batch-norm buffers before evaluation)."""
    if dist.is_initialized() and dist.get_world_size() > 1:
        for tensor in tensors:
            dist.broadcast(tensor.data, 0)


# ------------------------------------------------------------------------------------------------ stopping
class Stopped(Exception):
    """Raised after a SIGTERM once the checkpoint is safe; `common.cli.main` exits with 75."""


class StopFlag:
    """Remembers that SIGTERM or SIGUSR1 arrived."""

    def __init__(self, world: World):
        self.world, self.seen = world, False
        for number in (signal.SIGTERM, signal.SIGUSR1):
            signal.signal(number, self._set)

    def _set(self, *_):
        self.seen = True

    def at(self, step: int, every: int = 16) -> bool:
        """Whether to save and leave after this step. With several ranks they agree every 16 steps (one all_reduce)."""
        if self.world.size == 1:
            return self.seen
        if step % every:
            return False
        flag = torch.tensor(int(self.seen), device=self.world.device)
        dist.all_reduce(flag, dist.ReduceOp.MAX)
        return bool(flag.item())


class NotFinite(Exception):
    """The loss became NaN or infinite; the last good checkpoint is kept."""


class Collapsed(Exception):
    """A policy stopped deciding (the same answer for every input); the last checkpoint is kept."""


def require_finite(loss: torch.Tensor | float, step: int, lr: float, what: str = "loss") -> float:
    """The value as a float (this waits for the device: call it every k steps, not each). Raises NotFinite."""
    value = float(loss.detach() if isinstance(loss, torch.Tensor) else loss)
    if not np.isfinite(value):
        raise NotFinite(
            f"{what} is {value} at step {step}, learning rate {lr:g}; the last good checkpoint is kept: "
            "lower the learning rate, or clip harder, and start again"
        )
    return value


def weights_sha256(*modules: torch.nn.Module) -> str:
    """Digest of all parameters and buffers, in state-dict order: equal digests mean bit-identical weights."""
    digest = hashlib.sha256()
    for module in modules:
        for name, tensor in module.state_dict().items():
            if isinstance(tensor, torch.Tensor):
                digest.update(name.encode())
                digest.update(tensor.detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy().tobytes())
    return digest.hexdigest()


def require_finite_weights(module: torch.nn.Module, step: int, lr: float) -> None:
    """Before a checkpoint: a NaN must never replace the last good one. Waits for the device once."""
    total = sum(p.detach().double().sum() for p in module.parameters())
    require_finite(total, step, lr, "sum of the weights")

"""Crash-safe files, and `Progress`: where a training loop is, kept so that a killed run ends with the same weights."""

import contextlib
import json
import os
import random
import re
import time
from pathlib import Path

import numpy as np
import torch
import torch.distributed as dist

from common.errors import UserError
from common.runtime import World, require_finite_weights


def rng_state() -> dict:
    """The global generators of this process as tensors, so that `torch.load(weights_only=True)` opens them."""
    name, keys, position, has_gauss, gauss = np.random.get_state()  # noqa: NPY002
    python = random.getstate()
    return {
        "torch": torch.get_rng_state(),
        "cuda": torch.cuda.get_rng_state_all() if torch.cuda.is_available() else [],
        "numpy": [name, torch.from_numpy(keys.astype(np.int64)), position, has_gauss, gauss],
        "python": [python[0], torch.tensor(python[1]), python[2]],
    }


def set_rng_state(state: dict) -> None:
    torch.set_rng_state(state["torch"])
    if state["cuda"] and torch.cuda.is_available():
        torch.cuda.set_rng_state_all(state["cuda"])
    name, keys, position, has_gauss, gauss = state["numpy"]
    np.random.set_state((name, keys.numpy().astype(np.uint32), position, has_gauss, gauss))  # noqa: NPY002
    version, internal, gauss = state["python"]
    random.setstate((version, tuple(internal.tolist()), gauss))


def write_atomic(path: Path, write) -> None:
    """Call `write(binary file)` on a temporary name, fsync, rename to `path`, fsync the folder: all or nothing."""
    path = Path(path)
    temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with open(temporary, "wb") as file:
            write(file)
            file.flush()
            os.fsync(file.fileno())
        os.replace(temporary, path)
        folder = os.open(path.parent, os.O_RDONLY)
        try:
            os.fsync(folder)
        finally:
            os.close(folder)
    except OSError as error:
        raise UserError(
            f"cannot write {path}: {error.strerror or error}; free some space or choose another "
            "--work-dir (the last good checkpoint is untouched)"
        ) from error
    finally:
        with contextlib.suppress(OSError):
            temporary.unlink()


def write_json(path: Path, value) -> None:
    """Indented, but a list or mapping of plain values stays on one line: a record is read in a diff."""
    text = json.dumps(value, indent=1) + "\n"
    text = re.sub(r"([\[{])\n\s+([^\[\]{}]*?)\n\s+([\]}])", lambda m: m[1] + re.sub(r"\n\s+", " ", m[2]) + m[3], text)
    write_atomic(path, lambda file: file.write(text.encode()))


def save_checkpoint(work_dir: Path, position: int, state: dict, identity: dict, world: World, keep: int = 2) -> None:
    """Write `checkpoint-<position>.pt`; older ones go only after it is safely there.

    `state` holds all that moves. `identity` is what a resume must agree on (the resolved config and the seed).
    Every rank calls it: the RNG state of each is gathered, rank 0 writes.
    """
    states = [rng_state()]
    if world.size > 1:
        states = [None] * world.size
        dist.all_gather_object(states, rng_state())
    if world.is_main:
        payload = {"position": position, "state": state, "identity": identity, "rng": states}
        write_atomic(Path(work_dir) / f"checkpoint-{position:09d}.pt", lambda file: torch.save(payload, file))
        for old in checkpoints(work_dir)[keep:]:
            old.unlink(missing_ok=True)
    if world.size > 1:
        dist.barrier()


def checkpoints(work_dir: Path) -> list[Path]:
    """Newest first."""
    return sorted(Path(work_dir).glob("checkpoint-*.pt"), reverse=True)


def load_checkpoint(work_dir: Path, identity: dict, world: World, resume: str = "auto") -> dict | None:
    """State of the newest checkpoint that opens, with the RNG restored; None when there is none to go on from.

    A truncated file is passed over with a message. One of another config is refused: its differing keys are named.
    """
    if resume == "never":
        for old in checkpoints(work_dir) if world.is_main else []:
            old.unlink()
        return None
    for path in checkpoints(work_dir):
        try:
            payload = torch.load(path, map_location="cpu", weights_only=True)
        except Exception as error:  # whatever a damaged file raises: zip, pickle, EOF, key errors
            print(f"{path} does not open ({type(error).__name__}); trying the one before", flush=True)
            continue
        differing = sorted(
            k for k in {*identity, *payload["identity"]} if identity.get(k) != payload["identity"].get(k)
        )
        if differing:
            told = ", ".join(f"{k}: {payload['identity'].get(k)!r} there, {identity.get(k)!r} here" for k in differing)
            raise UserError(
                f"{path} belongs to another configuration ({told}); use another --work-dir, the same "
                "settings, or --resume never to start over"
            )
        if len(payload["rng"]) != world.size:
            raise UserError(
                f"{path} was written by {len(payload['rng'])} processes, this run has {world.size}; "
                "start the same number, or --resume never to start over"
            )
        set_rng_state(payload["rng"][world.rank])
        print(f"resumed from {path}", flush=True)
        return payload["state"]
    return None


def read_checkpoint(name: str, *scripts: str) -> dict:
    """The checkpoint at `name` (a file, or a work dir: the newest there) that one of `scripts` (its identity) wrote.

    For another script to go on from: {"identity", "position", "state": {"parts": {name: state dict}}}. UserError when
    there is none, when it does not open, or when another script wrote it.
    """
    path = Path(name)
    if path.is_dir():
        path = max(path.glob("checkpoint-*.pt"), default=path / "checkpoint-*.pt")
    if not name or not path.is_file():
        raise UserError(f"no checkpoint at {name or '(empty)'!r}; give a work dir of papers.{scripts[0]}")
    try:
        payload = torch.load(path, map_location="cpu", weights_only=True)
    except Exception as error:  # whatever a damaged file raises
        raise UserError(f"{path} does not open ({type(error).__name__}); use another checkpoint of that run") from None
    if not isinstance(payload, dict) or payload.get("identity", {}).get("script") not in scripts:
        raise UserError(f"{path} was not written by papers.{' or papers.'.join(scripts)}")
    return payload


class Progress:
    """Where a training loop is (`step`), what it has seen (`curve`, `loss_sum` of this epoch), and its checkpoints.

    parts: all else that moves (models, optimisers, schedulers), by name; anything with a state_dict. When the work dir
    holds a checkpoint of this `identity` (and `job.resume` allows), everything is restored here, generators included.
    """

    def __init__(self, job, identity: dict, **parts):
        self.job, self.identity, self.parts = job, identity, parts
        self.step, self.curve, self.spent, self.clock = 0, [], 0.0, time.perf_counter()
        self.loss_sum = torch.zeros((), device=job.device)  # a tensor: adding a step's loss does not wait for it
        if saved := load_checkpoint(job.work_dir, identity, job.world, job.resume):
            for name, part in parts.items():
                part.load_state_dict(saved["parts"][name])
            self.step, self.curve, self.spent = saved["step"], saved["curve"], saved["seconds"]
            self.loss_sum.fill_(saved["loss_sum"])

    @property
    def seconds(self) -> float:
        """Spent so far, over all starts of the run (what was lost with a kill is not counted)."""
        return self.spent + time.perf_counter() - self.clock

    def save(self, lr: float) -> None:
        """Write a checkpoint of everything, unless a weight is not finite (NotFinite, and the last good one stays)."""
        for part in self.parts.values():
            if isinstance(part, torch.nn.Module):
                require_finite_weights(part, self.step, lr)
        state = {"step": self.step, "curve": self.curve, "seconds": self.seconds, "loss_sum": self.loss_sum.item()}
        state["parts"] = {name: part.state_dict() for name, part in self.parts.items()}
        save_checkpoint(self.job.work_dir, self.step, state, self.identity, self.job.world)

    def log(self, title: str, **line: float) -> None:
        """One line of the curve: printed, and kept in metrics.jsonl (rewritten whole, so that a resume leaves no twin)."""
        self.curve.append(line)
        self.loss_sum.zero_()
        if self.job.world.is_main:
            print(f"{title}: " + ", ".join(f"{k} {v:.5g}" for k, v in line.items() if k != "epoch"), flush=True)
            text = "".join(json.dumps(line) + "\n" for line in self.curve)
            write_atomic(self.job.work_dir / "metrics.jsonl", lambda file: file.write(text.encode()))

"""Checkpoints: all that a step needs, complete or not there at all.

    checkpoints/step_00000050/
        model/                torch_dist: weights, optimizer, schedule; loads under any layout
        rng_rank_<r>.pt       random generators of each rank
        state.json            step, prompt cursor, and what else the run keeps as plain data
        manifest.json         size and digest of every file above; written last

A checkpoint is written as ``step_00000050.tmp`` and renamed once its manifest is on disk: under the final name stands a
complete checkpoint, unless somebody has damaged it, which the digests show.
"""

from __future__ import annotations

import hashlib
import json
import os
import random
import re
import shutil
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy
import torch
import torch.distributed as dist
from megatron.core import dist_checkpointing
from megatron.core.tensor_parallel.random import get_cuda_rng_tracker
from torch.distributed.checkpoint.api import CheckpointException

from megatron_rl.errors import UserError
from megatron_rl.metrics import progress
from megatron_rl.model.step import Policy
from megatron_rl.parallel.agree import all_ranks_agree
from megatron_rl.parallel.groups import Groups

_NAME = re.compile(r"step_(\d{8})")


class Checkpoints:
    """The checkpoint directory of one run. Every method is a collective."""

    def __init__(self, directory: Path, *, keep_last: int, groups: Groups, say: Callable[[str], None]) -> None:
        """Args: the directory; how many to keep; process groups; where one-line messages for the user go."""
        self.directory, self.keep_last, self.groups, self.say = directory, keep_last, groups, say

    # ------------------------------------------------------------------------------------------------ write

    def save(self, step: int, policy: Policy, state: dict[str, Any]) -> Path:
        """Write one checkpoint, then remove the oldest beyond ``keep_last``.

        Args:
            step: steps done.
            policy: weights, optimizer and schedule.
            state: plain data beside it, as JSON.

        Raises:
            UserError: on all ranks, when it cannot be written; what was there before is untouched.
        """
        final = self.directory / f"step_{step:08d}"
        temporary = final.with_suffix(".tmp")
        try:
            with all_ranks_agree(self.groups.cpu_group), _as_user_error(final):
                if self.groups.rank == 0:
                    shutil.rmtree(temporary, ignore_errors=True)
                    (temporary / "model").mkdir(parents=True)
                    _check_space(self.directory, _bytes_to_write(policy))
            with all_ranks_agree(self.groups.cpu_group), _as_user_error(final):
                dist_checkpointing.save(_sharded_state(policy), str(temporary / "model"))
                torch.save(_random_state(), temporary / f"rng_rank_{self.groups.rank}.pt")
                if self.groups.rank == 0:
                    (temporary / "state.json").write_text(json.dumps(state, indent=1))
            digests = self._digests(temporary, final)
            with all_ranks_agree(self.groups.cpu_group), _as_user_error(final):
                if self.groups.rank == 0:
                    self._complete(temporary, final, digests)
        except UserError:
            if self.groups.rank == 0:
                shutil.rmtree(temporary, ignore_errors=True)
            raise
        if self.groups.rank == 0:
            for old in self._steps()[: -self.keep_last]:
                shutil.rmtree(old, ignore_errors=True)
        return final

    def _digests(self, directory: Path, final: Path) -> dict[str, dict[str, Any]]:
        """Size and digest of every file; the files are shared out over the ranks."""
        dist.barrier(self.groups.cpu_group)
        mine: dict[str, dict[str, Any]] = {}
        with all_ranks_agree(self.groups.cpu_group), _as_user_error(final):
            names = sorted(str(p.relative_to(directory)) for p in directory.rglob("*") if p.is_file())
            for name in progress(names[self.groups.rank :: self.groups.world_size], "checkpoint digests"):
                mine[name] = {"bytes": (directory / name).stat().st_size, "blake2b": _digest(directory / name)}
        parts: list[Any] = [None] * self.groups.world_size
        dist.all_gather_object(parts, mine, group=self.groups.cpu_group)
        return {name: entry for part in parts for name, entry in sorted(part.items())}

    def _complete(self, temporary: Path, final: Path, digests: dict[str, dict[str, Any]]) -> None:
        (temporary / "manifest.json").write_text(json.dumps({"files": digests}, indent=1))
        for path in [*temporary.rglob("*"), temporary]:
            _fsync(path)
        shutil.rmtree(final, ignore_errors=True)  # only ever an older save of the same step
        os.replace(temporary, final)
        _fsync(self.directory)

    # ------------------------------------------------------------------------------------------------ read

    def find(self, explicit: str | None) -> Path | None:
        """The checkpoint to start from: the given one, else the last complete one of the directory, else None.

        Raises:
            UserError: the given one is missing, half-written or damaged.
        """
        if explicit is not None:
            path = Path(explicit)
            if problem := self._problem(path):
                raise UserError(
                    "exp_manager.resume_from_checkpoint",
                    explicit,
                    problem,
                    "give a complete checkpoint, or leave it out to take the last complete one of the run",
                )
            return path
        unfinished = sorted(self.directory.glob("step_*.tmp"))
        if unfinished:
            self.say(f"skipping {', '.join(p.name for p in unfinished)}: never completed")
        for path in reversed(self._steps()):
            problem = self._problem(path)
            if problem is None:
                return path
            self.say(f"skipping {path.name}: {problem}")
        return None

    def load(self, path: Path, policy: Policy) -> dict[str, Any]:
        """Restore weights, optimizer, schedule and generators; returns the plain data saved beside them."""
        sharded = _sharded_state(policy, is_loading=True)
        loaded = dist_checkpointing.load(sharded, str(path / "model"))
        policy.stage.load_state_dict(loaded["model"])
        policy.optimizer.load_state_dict(loaded["optimizer"])
        policy.scheduler.load_state_dict(loaded["scheduler"])
        policy.num_updates = loaded["num_updates"]
        generators = path / f"rng_rank_{self.groups.rank}.pt"
        if len(list(path.glob("rng_rank_*.pt"))) == self.groups.world_size:
            _restore_random_state(torch.load(generators, weights_only=False))
        else:
            self.say("another number of ranks than before: random generators start from the seed")
        return json.loads((path / "state.json").read_text())

    def _steps(self) -> list[Path]:
        return sorted(p for p in self.directory.glob("step_*") if _NAME.fullmatch(p.name))

    def _problem(self, path: Path) -> str | None:
        """What is wrong with a checkpoint, or None; the same answer on every rank."""
        found: list[str | None] = [None] * self.groups.world_size
        dist.all_gather_object(found, self._problem_here(path), group=self.groups.cpu_group)
        return next((problem for problem in found if problem is not None), None)

    def _problem_here(self, path: Path) -> str | None:
        if not path.is_dir():
            return "is not a directory"
        try:
            files = json.loads((path / "manifest.json").read_text())["files"]
        except (OSError, ValueError, KeyError):
            return "is incomplete: it has no readable manifest.json"
        for index, (name, entry) in enumerate(sorted(files.items())):
            file = path / name
            if not file.is_file() or file.stat().st_size != entry["bytes"]:
                return f"is incomplete: {name} is missing or cut short"
            if index % self.groups.world_size == self.groups.rank and _digest(file) != entry["blake2b"]:
                return f"is damaged: {name} has another digest than when it was written"
        return None


def _sharded_state(policy: Policy, *, is_loading: bool = False) -> dict[str, Any]:
    metadata = {
        "distrib_optim_sharding_type": "fully_reshardable",
        "dp_cp_group": policy.groups.dp_group,
        "singleton_local_shards": False,
        "chained_optim_avoid_prefix": True,
    }
    model = policy.stage.sharded_state_dict(metadata=metadata)
    return {
        "model": model,
        "optimizer": policy.optimizer.sharded_state_dict(model, is_loading=is_loading, metadata=metadata),
        "scheduler": policy.scheduler.state_dict(),
        "num_updates": policy.num_updates,
    }


def _random_state() -> dict[str, Any]:
    return {
        "torch": torch.get_rng_state(),
        "cuda": torch.cuda.get_rng_state_all() if torch.cuda.is_available() else [],
        "numpy": numpy.random.get_state(),
        "python": random.getstate(),
        "megatron": get_cuda_rng_tracker().get_states(),
    }


def _restore_random_state(state: dict[str, Any]) -> None:
    torch.set_rng_state(state["torch"])
    if state["cuda"]:
        torch.cuda.set_rng_state_all(state["cuda"])
    numpy.random.set_state(state["numpy"])
    random.setstate(state["python"])
    get_cuda_rng_tracker().set_states(state["megatron"])


def _bytes_to_write(policy: Policy) -> int:
    """Weights of the whole model, and 12 bytes a parameter of optimizer state; a little less than what is written."""
    parameters = sum(p.numel() for p in policy.stage.parameters()) * policy.groups.tp_size * policy.groups.pp_size
    return parameters * (policy.megatron_config.params_dtype.itemsize + 12)


def _check_space(directory: Path, needed: int) -> None:
    free = shutil.disk_usage(directory).free
    if free < needed:
        raise OSError(28, f"{needed / 1e9:.2f} GB are needed, {free / 1e9:.2f} GB are free")


@contextmanager
def _as_user_error(path: Path) -> Iterator[None]:
    """Failures to write a checkpoint, as one sentence."""
    try:
        yield
    except UserError:
        raise
    except (OSError, RuntimeError, CheckpointException) as error:
        cause: BaseException = error
        if isinstance(error, CheckpointException) and error.failures:  # what went wrong on the rank where it did
            cause = next(iter(error.failures.values()))[0]
        raise UserError(
            "exp_manager.exp_dir",
            str(path),
            f"the checkpoint could not be written ({cause})",
            "free some disk space or choose another exp_dir; earlier checkpoints are intact, and the same command resumes",
        ) from error


def _digest(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, lambda: hashlib.blake2b(digest_size=16)).hexdigest()


def _fsync(path: Path) -> None:
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)

"""Checkpoints: everything that a step needs, complete or absent.

    checkpoints/step_00000050/
        model/                torch_dist: weights, optimizer, schedule; loads under any layout
        rng_rank_<r>.json     random generators of each rank
        state.json            step, number of ranks, prompt cursor, origin, and what else the run keeps as plain data
        manifest.json         size and digest of every file above; written last

A checkpoint is written as ``step_00000050.tmp`` and renamed once its manifest is on disk: under the final name stands a
complete checkpoint, unless somebody has damaged it, which the digests show.

All of it is data: to load it executes nothing that it says (plain_load.py).

A run that goes back (to an earlier checkpoint, or past damaged ones) leaves a branch behind. Its checkpoints have higher
numbers than the next ones to be written, so they are moved away before the first of those: under ``step_<n>`` stands one line
of descent only, and the highest number is the newest.
"""

from __future__ import annotations

import json
import re
import shutil
import socket
import time
from collections.abc import Callable, Collection, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from safetensors.torch import load_file

from megatron_rl.config import Config
from megatron_rl.convert.architecture.shape import ModelShape
from megatron_rl.errors import UserError, described
from megatron_rl.files import content_digest
from megatron_rl.model.generators import restore_generators
from megatron_rl.model.manifest import (
    damage,
    generators_file,
    incompleteness,
    read_state,
)
from megatron_rl.model.plain_load import load_plain
from megatron_rl.model.saving import (
    TENSORS,
    PendingSave,
    as_user_error,
    bytes_to_write,
    check_space,
    sharded_state,
)
from megatron_rl.model.trainable import Trainable
from megatron_rl.parallel.agree import all_ranks_agree, are_all_here, broadcast_json, gather_json
from megatron_rl.parallel.groups import Groups
from megatron_rl.process import activity
from megatron_rl.process.heap import trim_heap
from megatron_rl.tasks.rows.content import rows_digest

TOGETHER_S = 10.0
"""Most seconds between ranks that end by the same error."""
_NAME = re.compile(r"step_(\d{8})")
_WEIGHTS = "digest of the weights"
_NOT_SHAPE = {"max_position_embeddings", "initializer_range", "dtype", "bos_token_id", "eos_token_ids", "pad_token_id"}
"""Fields of ``ModelShape`` that change neither the parameters nor what the model computes from them."""


class Checkpoints:
    """The checkpoint directory of one run. Every method is a collective."""

    def __init__(
        self,
        directory: Path,
        *,
        keep_last: int,
        groups: Groups,
        say: Callable[[str], None],
        check_owner: Callable[[], None] = lambda: None,
    ) -> None:
        """Take the directory, which need not be there.

        Args:
            directory: of the checkpoints.
            keep_last: how many to keep.
            groups: process groups.
            say: takes one-line messages for the user.
            check_owner: raises ``UserError`` where the directory is another run's by now; asked before each rename.
        """
        self._check_owner = check_owner
        self.directory, self.keep_last, self.groups, self.say = directory, keep_last, groups, say
        self.origin: str | None = None
        """The explicit checkpoint that this run descends from, set by ``find`` and saved with every checkpoint. By it a
        restart with the same ``resume_from_checkpoint`` knows its own later checkpoints."""
        self.protected: Collection[int] = ()
        """Steps whose checkpoints are never removed."""
        self._pending: PendingSave | None = None
        self._metrics: dict[str, float] = {}

    # ------------------------------------------------------------------------------------------------ write

    def save(
        self, step: int, trainable: Trainable, state: dict[str, Any], tensors: Mapping[str, torch.Tensor] | None = None
    ) -> Path:
        """Write one checkpoint, then remove those that are older than the ``keep_last`` last complete ones.

        Args:
            step: steps done.
            trainable: weights, optimizer and schedule.
            state: plain data beside it, as JSON.
            tensors: the same in every rank; what the algorithm keeps.

        Raises:
            UserError: on all ranks, when it cannot be written; what was there before is untouched.
        """
        self.start(step, trainable, state, tensors, is_background=False)
        path = self.complete()
        assert path is not None
        return path

    def start(
        self,
        step: int,
        trainable: Trainable,
        state: Mapping[str, Any],
        tensors: Mapping[str, torch.Tensor] | None = None,
        *,
        is_background: bool = True,
    ) -> None:
        """Begin to write one checkpoint; ``poll`` or ``complete`` end it. Arguments and errors are those of ``save``.

        Args: is_background: copy what is written, so that training may go on meanwhile.
        """
        assert self._pending is None, "one checkpoint at a time"
        state = {**state, "origin": self.origin, "num_ranks": self.groups.world_size}
        final = self.directory / f"step_{step:08d}"
        with self._timed():
            self._pending = PendingSave(
                final, trainable, self.groups, state, tensors or {}, is_background=is_background
            )

    def poll(self) -> Path | None:
        """Complete the checkpoint that is being written, if all ranks have written it by now."""
        return self.complete() if self._pending is not None and self._pending.is_written_by_all() else None

    def complete(self) -> Path | None:
        """Wait for the checkpoint that is being written, if there is one; its errors are those of ``save``."""
        if self._pending is None:
            return None
        pending, self._pending = self._pending, None
        with self._timed():
            pending.wait()
            with all_ranks_agree(self.groups.cpu_group):
                self._check_owner()
            path = pending.complete()
            with all_ranks_agree(self.groups.cpu_group):
                if self.groups.rank == 0:
                    self._prune(path)
            trim_heap()  # a fraction of a second, for several times the size of the checkpoint
        self._metrics["checkpoint/write_s"] = pending.age_s
        self.say(f"checkpoint {path} ({pending.age_s:.1f} s)")
        return path

    def complete_at_error(self) -> None:
        """Complete the checkpoint that is being written, if there is one, where a ``UserError`` ends the run on all ranks.

        Should this rank be alone with the error, or should it fail again, the checkpoint is lost, and that is said.
        """
        if self._pending is None:
            return
        assert dist.group.WORLD is not None
        if not are_all_here(dist.group.WORLD, TOGETHER_S):
            self.say("the checkpoint that was being written is lost: not all ranks have ended alike")
            return
        try:
            self.complete()
        except UserError as error:
            self.say(f"the checkpoint that was being written is lost: {error}")

    def take_metrics(self) -> dict[str, float]:
        """Return what the checkpoints since the last call took: seconds that the run waited, and until one was complete."""
        metrics, self._metrics = self._metrics, {}
        return metrics

    @contextmanager
    def _timed(self) -> Iterator[None]:
        started = time.monotonic()
        with activity.phase("checkpoint"):
            yield
        key = "time/checkpoint_s"
        self._metrics[key] = self._metrics.get(key, 0.0) + time.monotonic() - started

    def check_space(self, trainable: Trainable) -> None:
        """Check that the disk has room for one checkpoint, so that this is known before any training.

        Raises:
            UserError: on all ranks: it has not, or the directory cannot be made.
        """
        with all_ranks_agree(self.groups.cpu_group), as_user_error(self.directory):
            if self.groups.rank == 0:
                self.directory.mkdir(parents=True, exist_ok=True)
                check_space(self.directory, bytes_to_write(trainable))

    def _prune(self, saved: Path) -> None:
        # A higher number than the one just saved is no reason to remove anything: it belongs to another branch. And an
        # incomplete one does not count: a run whose last files are damaged would keep nothing to resume from.
        branch = [path for path in self._steps() if path.name <= saved.name]
        kept = [path for path in branch if incompleteness(path) is None][-self.keep_last :]
        for old in branch[: branch.index(kept[0])]:
            if int(old.name.removeprefix("step_")) not in self.protected:
                shutil.rmtree(old, ignore_errors=True)

    # ------------------------------------------------------------------------------------------------ read

    def find(self, explicit: str | None, *, is_resuming: bool = True) -> Path | None:
        """Find the checkpoint to start from, or None.

        The run's own last complete one, if it is resuming and, where an explicit one is given, that own one descends from
        it: so the same command starts from the explicit checkpoint and, killed, resumes. Else the explicit one.

        Raises:
            UserError: on all ranks: the run has checkpoints and none can be used; the explicit one is to be used and is
                missing, half-written or damaged; one cannot be read, or not by all ranks alike.
        """
        origin = None if explicit is None else str(Path(explicit).resolve())
        problems: dict[str, str] = {}
        for path in self._own(origin) if is_resuming else ():
            problem = self._problem(path)
            if problem is None:
                if explicit is not None:
                    self.say(
                        f"taking {path.name} of this run, which descends from {explicit} "
                        "(exp_manager.resume_if_exists=false goes back to that one)"
                    )
                self.origin = read_state(path).get("origin")
                return path
            self.say(f"skipping {path.name}: {problem}")
            problems[path.name] = problem
        is_itself_own = explicit is not None and Path(explicit).resolve().parent == self.directory.resolve()
        if problems and not (is_itself_own and Path(explicit or "").name in problems):
            found = "; ".join(f"{name} {problem}" for name, problem in problems.items())
            fix = "mend one of them, or start anew: set another exp_manager.name"
            if explicit is not None:
                fix += ", or exp_manager.resume_if_exists=false to go back to the explicit checkpoint"
            raise UserError(
                "exp_manager.exp_dir", str(self.directory), f"has no checkpoint to resume from: {found}", fix
            )
        if explicit is None:
            return None
        path = Path(explicit)
        if problem := self._problem(path):
            raise UserError(
                "exp_manager.resume_from_checkpoint",
                explicit,
                problem,
                "give a complete checkpoint, or leave it out to take the last complete one of the run",
            )
        self.say(f"taking the explicit checkpoint {explicit}: this run has no later one that descends from it")
        self.origin = origin
        return path

    def load(self, path: Path, trainable: Trainable, fixed: Mapping[str, Any] | None = None) -> dict[str, Any]:
        """Restore weights, optimizer, schedule and generators; returns the plain data saved beside them.

        Args:
            path: a complete checkpoint.
            trainable: to restore; settings of its config win over those of the checkpoint, and it is said which.
            fixed: ``fixed_settings`` of this run; None skips the comparison.

        Raises:
            UserError: on all ranks, before anything is loaded: a fixed setting is another one than the checkpoint's.
        """
        with all_ranks_agree(self.groups.cpu_group):
            state = read_state(path)
            _check_fixed(state.get("fixed", {}), fixed or {})
        with all_ranks_agree(self.groups.cpu_group):
            loaded = load_plain(sharded_state(trainable, is_loading=True), path / "model")
        changed = trainable.load_state(loaded)
        if changed:
            self.say(f"settings changed since the checkpoint was written, new ones apply: {', '.join(changed)}")
        if state["num_ranks"] == self.groups.world_size:
            with all_ranks_agree(self.groups.cpu_group):
                _load_generators(path / generators_file(self.groups.rank))
        else:
            self.say("another number of ranks than before: random generators start from the seed")
        return state

    def load_tensors(self, path: Path) -> dict[str, torch.Tensor]:
        """Return the tensors that ``save`` got."""
        return load_file(path / TENSORS) if (path / TENSORS).is_file() else {}

    def others(self, start: Path | None) -> list[Path]:
        """Return the checkpoints that do not lead to the one this run starts from (None: it starts anew). For one rank."""
        steps = self._steps()
        own = next((index for index, path in enumerate(steps) if start and path.samefile(start)), -1)
        return steps[own + 1 :]

    def _own(self, origin: str | None) -> list[Path]:
        """Return the run's checkpoints, newest first; with an origin, up to the first that does not descend from it."""
        own: list[str] = []
        with all_ranks_agree(self.groups.cpu_group):
            if self.groups.rank == 0:  # one rank looks: the others could see the directory before or after a change
                unfinished = sorted(path.name for path in self.directory.glob("step_*.tmp"))
                if unfinished:
                    self.say(f"skipping {', '.join(unfinished)}: never completed")
                for path in reversed(self._steps()):
                    if origin is not None and incompleteness(path) is None and read_state(path).get("origin") != origin:
                        break
                    own.append(str(path))
        return [Path(path) for path in broadcast_json(own, self.groups.cpu_group)]

    def _steps(self) -> list[Path]:
        """Return the folders of checkpoints, oldest first.

        Raises:
            UserError: the directory cannot be read; that does not mean that it is empty.
        """
        try:
            return sorted(path for path in self.directory.iterdir() if _NAME.fullmatch(path.name))
        except FileNotFoundError:
            return []
        except OSError as error:
            rule, fix = f"cannot be read ({error.strerror})", "mend its rights or the file system: nothing was changed"
            raise UserError(str(self.directory), None, rule, fix) from error

    def _problem(self, path: Path) -> str | None:
        """Return what is wrong with a checkpoint, or None; the same answer on every rank.

        Raises:
            UserError: it cannot be read, or is there for some ranks and not for others.
        """
        rank, size, group = self.groups.rank, self.groups.world_size, self.groups.cpu_group
        with all_ranks_agree(group):
            mine = incompleteness(path)
        seen = gather_json([mine, socket.gethostname()], group)
        lacking = [(number, *each) for number, each in enumerate(seen) if each[0] is not None]
        if len(lacking) == size:
            return lacking[0][1]
        if lacking:
            number, problem, host = lacking[0]
            rule = f"{problem}, as rank {number} on {host} sees it, but other ranks see it whole"
            raise UserError(str(path), None, rule, "give all nodes the same, mounted folder and the same command again")
        with all_ranks_agree(group):
            mine = damage(path, rank=rank, world_size=size)
        return next((problem for problem in gather_json(mine, group) if problem is not None), None)


def fixed_settings(
    config: Config, shape: ModelShape, contents: Mapping[str, tuple[str, str]] | None = None
) -> dict[str, dict[str, Any]]:
    """Return the settings that may not change during a run: weights, optimizer state and prompt cursor depend on them.

    Args:
        config: of the run.
        shape: of the model.
        contents: other things on disk, by the field that names them: its value, and a digest of what is there.

    Returns:
        JSON by dotted field: ``value`` as the user gave it, and ``compared``, which has to be equal. A model or a data
        file may move; its shape or its content may not change.
    """
    data, policy = config.data, config.policy
    model = {name: value for name, value in asdict(shape).items() if name not in _NOT_SHAPE}
    if policy.initialization == "pretrained":  # the run goes on from its checkpoint, but these are what it began with
        model[_WEIGHTS] = content_digest(policy.model_dir, suffixes=(".safetensors", ".bin"))
    fixed = {
        "policy.model_path": (policy.model_path, model),
        "policy.optim.name": (policy.optim.name, policy.optim.name),
        "algorithm.name": (config.algorithm.name, config.algorithm.name),
        "data.task": (data.task, data.task),
        "data.reward": (data.reward, data.reward),
        "data.train": (", ".join(data.train or ()), rows_digest(data.train or ())),
        "trainer.seed": (config.trainer.seed, config.trainer.seed),
        **(contents or {}),
    }
    plain = {field: {"value": value, "compared": compared} for field, (value, compared) in fixed.items()}
    return json.loads(json.dumps(plain))  # tuples become lists, as they will be when read back


def _check_fixed(saved: Mapping[str, Any], fixed: Mapping[str, Any]) -> None:
    for field, now in fixed.items():
        then = saved.get(field, now)  # a checkpoint that does not record the field is taken as it is
        if then["compared"] == now["compared"]:
            continue
        rule = "is set to null, but " if now["value"] is None else ""
        rule += "the checkpoint was trained " + ("without one" if then["value"] is None else f"with {then['value']!r}")
        if field == "data.train" or field.endswith(".pool"):
            rule += ", whose content was another"
        if field == "policy.model_path":
            old, new = then["compared"], now["compared"]
            names = [name for name in new if old.get(name) != new[name] and name != _WEIGHTS]
            shape = ", ".join(f"{name} {old.get(name)!r}, not {new[name]!r}" for name in names)
            rule += f", a model of {shape}" if shape else ", whose weights were others"
        raise UserError(
            field, now["value"], rule, "restore it to continue that run, or start another one: set exp_manager.name"
        )


def _load_generators(path: Path) -> None:
    try:
        restore_generators(json.loads(path.read_text()))
    except (OSError, ValueError, KeyError, TypeError, AttributeError, RuntimeError) as error:
        rule, fix = (
            f"holds no states of random generators ({described(error)})",
            "take a checkpoint that this version wrote",
        )
        raise UserError(str(path), None, rule, fix) from error

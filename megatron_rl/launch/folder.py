"""A run's folder: whose it is, and what becomes of an earlier run's files.

Nothing is overwritten without a word. What a run does not continue is moved, not removed:

    <run>/abandoned_<time>/     checkpoints, metrics, evaluations ... under the names that they had
"""

from __future__ import annotations

import re
import shutil
import time
from collections.abc import Callable, Collection, Iterable, Iterator, Sequence
from contextlib import AbstractContextManager
from pathlib import Path

from megatron_rl.errors import UserError
from megatron_rl.files import SAME_COMMAND, disk_errors
from megatron_rl.metrics.best import read_best
from megatron_rl.process.lock import identity, other_holder

METRICS, SUMMARY, CHECKPOINTS = "metrics.jsonl", "summary.json", "checkpoints"
_BY_STEP = ("eval", "trees", "numerics", "rollouts")
"""Folders of files named by step; of ``rollouts`` the texts, beside what ``rollout.record`` writes under other names."""
_SINKS = ("tensorboard", "wandb_run_id.txt", "mlflow_run_id.txt")
"""Events, and the ids under which tracking services know the run: another run must not go on there."""
BEST_EXPORT, STEP_EXPORTS = "hf_best", "hf_step_"
_PRODUCTS = (
    CHECKPOINTS, METRICS, *_BY_STEP, "hf", BEST_EXPORT, "best.json", "evaluations", SUMMARY, "curves.png", *_SINKS,
)  # fmt: skip
_STEP = re.compile(r"step_(\d{8})\..+")
_STEP_EXPORT = re.compile(rf"{STEP_EXPORTS}(\d{{8}})")


class RunFolder:
    """The folder of one run, as the one rank that writes there sees it.

    Raises:
        UserError: from every method, the folder cannot be read or written.
    """

    def __init__(self, path: Path, say: Callable[[str], None], *, is_writer: bool = True) -> None:
        """Args: the folder; where one-line messages for the user go; whether this is the rank that writes there."""
        self.path, self.say, self._is_writer = path, say, is_writer
        with self._touching():
            self._identity = identity(path)

    def check_unused(self) -> None:
        """Check that no run has left anything here that a new one would mix with.

        Raises:
            UserError: there is something.
        """
        if found := list(self._products()):
            raise UserError(
                "exp_manager.resume_if_exists",
                False,
                f"starts a new run, but {self.path} holds one already ({', '.join(found)})",
                "set another exp_manager.name, or move or remove that folder; leave resume_if_exists out to continue it",
            )

    def check_same(self) -> None:
        """Check, as the rank that writes, that the folder is still the one that the run has taken, and still its own.

        Raises:
            UserError: it is not.
        """
        if not self._is_writer:
            return
        with self._touching():
            other, is_same = other_holder(self.path), identity(self.path) == self._identity
        if other is not None:
            rule = f"was taken over by {other}, which got no sign of life from this run for a while"
            raise UserError("exp_manager.exp_dir", str(self.path), rule, "leave the folder to that run")
        if not is_same:
            rule = "is not the folder any more that this run has taken: it was removed, replaced or unmounted, or its lock was"
            raise UserError(
                "exp_manager.exp_dir", str(self.path), rule, "bring it back and give the same command again"
            )

    def start_at(self, step: int | None, others: Sequence[Path]) -> None:
        """Take away what the run does not continue, and say what was kept aside.

        Args:
            step: steps done at the own checkpoint that the run starts from; None: it starts from none, or from another run's.
            others: own checkpoints of another branch. With some, all that is later than ``step`` is kept aside; without, it is
                removed, because the same steps are repeated.
        """
        self.check_same()
        with self._touching():
            if step is None:
                if names := list(self._products()):
                    aside = self._move(self.path / name for name in names)
                    self.say(f"this run continues nothing of {', '.join(names)} here: moved to {aside}")
                return
            later = [path for path in self._files_by_step() if _step_of(path) > step]
            if not others:
                for path in later:
                    shutil.rmtree(path) if path.is_dir() else path.unlink()
                return
            aside = self._move([*others, *later])
            if (self.path / METRICS).is_file():
                shutil.copyfile(self.path / METRICS, aside / METRICS)
            names = [path.name for path in others]
            self.say(f"this run does not continue {', '.join(names)}: moved, with its metrics, to {aside}")

    def step_exports(self) -> list[Path]:
        """Return the folders of exported steps, oldest first."""
        return sorted(path for path in self.path.glob(f"{STEP_EXPORTS}*") if _STEP_EXPORT.fullmatch(path.name))

    def prune_exports(self, *, keep_last: int, keep: Collection[int]) -> None:
        """Remove exported steps but the last ones, and those of ``keep``."""
        with self._touching():
            for path in self.step_exports()[:-keep_last]:
                if _step_of(path) not in keep:
                    shutil.rmtree(path)

    def keep_best(self, step: int) -> int | None:
        """Return the step that ``hf_best/`` holds, where a run starts after ``step`` steps.

        Move away one of a later step, or one that was being replaced, so that nobody knows whose weights it has.
        """
        with self._touching():
            held = read_best(self.path)[1]
            if held is not None and held <= step:
                return held
            if (self.path / BEST_EXPORT).is_dir():
                aside = self._move([self.path / BEST_EXPORT])
                of = "being replaced" if held is None else f"of step {held}, after which this run does not start"
                self.say(f"{BEST_EXPORT} was {of}: moved to {aside}")
            return None

    def _products(self) -> Iterator[str]:
        """Yield the names of what a run has written here."""
        for name in (*_PRODUCTS, *(path.name for path in self.step_exports())):
            path = self.path / name
            if path.is_dir() and not path.is_symlink():
                is_there = any(path.glob("step_*" if name == CHECKPOINTS else "*"))
            else:
                is_there = path.is_file() and path.stat().st_size > 0
            if is_there:
                yield name

    def _files_by_step(self) -> Iterator[Path]:
        for name in _BY_STEP:
            yield from (path for path in (self.path / name).glob("step_*") if _STEP.fullmatch(path.name))
        yield from self.step_exports()

    def _move(self, paths: Iterable[Path]) -> Path:
        """Move files and folders below one new folder, and return it."""
        aside = self.path / f"abandoned_{time.strftime('%Y%m%dT%H%M%S')}"
        while aside.exists():
            aside = aside.with_name(aside.name + "_")
        for path in paths:
            target = aside / path.relative_to(self.path)
            target.parent.mkdir(parents=True, exist_ok=True)
            path.rename(target)
        return aside

    def _touching(self) -> AbstractContextManager[None]:
        return disk_errors(self.path, field="exp_manager.exp_dir", fix=SAME_COMMAND)


def _step_of(path: Path) -> int:
    found = _STEP.fullmatch(path.name) or _STEP_EXPORT.fullmatch(path.name)
    assert found is not None
    return int(found.group(1))

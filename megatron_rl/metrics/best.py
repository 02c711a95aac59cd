"""The best steps of a run by one metric: chosen here, kept by its checkpoints, and told in ``best.json``."""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass
from difflib import get_close_matches
from pathlib import Path
from typing import Any

from megatron_rl.config.trainer import CheckpointConfig
from megatron_rl.errors import UserError
from megatron_rl.files import SAME_COMMAND, disk_errors, write_atomic

BEST = "best.json"
"""File in the run's folder, JSON with ``metric_name``, ``higher_is_better``, ``best``: a list of ``{"step", "value"}``, the
best first, and ``hf_best``: the step in that folder, or null."""


@dataclass(frozen=True)
class BestStep:
    """A step and the value that its weights had."""

    step: int
    value: float


class BestSteps:
    """The ``keep_best`` best steps so far, the same on every rank.

    Args:
        settings: ``metric_name`` None: no step is better than another.
        found: ``state()`` of an earlier start. Values by another metric are not compared: none of them is taken over.
        say: prints a line for the user; told once if a step has no such metric.
    """

    def __init__(
        self, settings: CheckpointConfig, found: Mapping[str, Any] | None = None, say: Callable[[str], None] = print
    ) -> None:
        self._settings, self._say, self._is_told = settings, say, False
        self._measure = {"metric_name": settings.metric_name, "higher_is_better": settings.higher_is_better}
        before = self._measure | {"best": []} | dict(found or {})
        best = [BestStep(**each) for each in before.pop("best")]
        if settings.metric_name is None:
            self._measure = before
        elif before != self._measure and best:
            say(f"the best steps so far were by {_shown(before)}, not by {_shown(self._measure)}: none of them counts")
            best = []
        self._best = self._sorted(best)

    @property
    def steps(self) -> list[int]:
        """The best steps, the best first."""
        return [each.step for each in self._best]

    def state(self) -> dict[str, Any]:
        """Return what a checkpoint keeps, as JSON."""
        return self._measure | {"best": [asdict(each) for each in self._best]}

    def offer(self, step: int, row: Mapping[str, float]) -> bool:
        """Take a step into account; return whether it is among the best now. Of equal values the earliest is best.

        Args:
            step: steps done.
            row: its metrics; without the metric, or where that is not finite, the step is not among the best.
        """
        name = self._settings.metric_name
        value = None if name is None else row.get(name)
        if name is not None and value is None and not name.startswith("eval/") and not self._is_told:
            near = ", ".join(get_close_matches(name, row, n=3)) or "metrics.jsonl has its metrics"
            self._say(f"step {step} has no metric {name}, by which the best step is chosen ({near})")
            self._is_told = True
        if value is None or not math.isfinite(value):
            return False
        self._best = self._sorted([*(each for each in self._best if each.step != step), BestStep(step, float(value))])
        return step in self.steps

    def write(self, run_dir: Path, *, exported: int | None) -> None:
        """Write ``best.json``, as the rank that writes.

        Args:
            run_dir: folder of the run.
            exported: step whose weights ``hf_best/`` holds.

        Raises:
            UserError: it cannot be written.
        """
        path = run_dir / BEST
        with disk_errors(path, field="exp_manager.exp_dir", fix=SAME_COMMAND):
            write_atomic(path, json.dumps(self.state() | {"hf_best": exported}, indent=1) + "\n")

    def correct(self, run_dir: Path, *, exported: int | None) -> None:
        """Write ``best.json`` again where there is one: it may tell of steps after those that a start goes on from."""
        if (run_dir / BEST).is_file():
            self.write(run_dir, exported=exported)

    def _sorted(self, steps: list[BestStep]) -> list[BestStep]:
        sign = -1 if self._measure["higher_is_better"] else 1
        return sorted(steps, key=lambda each: (sign * each.value, each.step))[: self._settings.keep_best]


def _shown(measure: Mapping[str, Any]) -> str:
    return f"{measure['metric_name']} ({'higher' if measure['higher_is_better'] else 'lower'} is better)"


def read_best(run_dir: Path) -> tuple[int | None, int | None]:
    """Return the best step of a run, and the step that ``hf_best/`` holds; None where there is none.

    Raises:
        UserError: ``best.json`` is damaged.
    """
    path = run_dir / BEST
    try:
        content = json.loads(path.read_text())
        return next((int(each["step"]) for each in content["best"]), None), content["hf_best"]
    except FileNotFoundError:
        return None, None
    except (OSError, ValueError, KeyError, TypeError) as error:
        rule = f"cannot be read ({type(error).__name__} {error})"
        raise UserError(str(path), None, rule, "remove it, and name a checkpoint by its step") from error

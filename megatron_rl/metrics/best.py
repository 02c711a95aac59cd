"""The best steps of a run by one metric, in ``best.json`` of its folder."""

from __future__ import annotations

import json
import math
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from pathlib import Path

from megatron_rl.config.trainer import CheckpointConfig
from megatron_rl.errors import UserError
from megatron_rl.files import SAME_COMMAND, disk_errors, write_atomic

BEST = "best.json"


@dataclass(frozen=True)
class BestStep:
    """A step and the value that its weights had."""

    step: int
    value: float


class BestSteps:
    """The ``keep_best`` best steps so far; every rank has the same, and one writes them.

    Args:
        run_dir: holds ``best.json``.
        settings: ``metric_name`` None: no step is better than another.
        start_step: steps done at the start; later ones of an earlier start are forgotten.
        found: those of an earlier start, as ``read`` returns them on the rank that writes.
    """

    def __init__(
        self, run_dir: Path, settings: CheckpointConfig, *, start_step: int, found: Mapping[int, float] | None = None
    ) -> None:
        self._path, self._settings = run_dir / BEST, settings
        earlier = [BestStep(int(step), value) for step, value in (found or {}).items() if int(step) <= start_step]
        self._best = self._sorted(earlier)

    @property
    def steps(self) -> list[int]:
        """The best steps, the best first."""
        return [each.step for each in self._best]

    def offer(self, step: int, row: Mapping[str, float]) -> bool:
        """Take a step into account; return whether it is among the best now. Among equal values the first counts.

        Args:
            step: steps done.
            row: its metrics; without the metric, or where that is not finite, the step is not among the best.
        """
        value = row.get(self._settings.metric_name or "")
        if value is None or not math.isfinite(value):
            return False
        self._best = self._sorted([*(each for each in self._best if each.step != step), BestStep(step, float(value))])
        return step in self.steps

    def write(self) -> None:
        """Write ``best.json``, as the rank that writes.

        Raises:
            UserError: it cannot be written.
        """
        settings = self._settings
        content = {"metric_name": settings.metric_name, "higher_is_better": settings.higher_is_better}
        with disk_errors(self._path, field="exp_manager.exp_dir", fix=SAME_COMMAND):
            write_atomic(
                self._path, json.dumps(content | {"best": [asdict(each) for each in self._best]}, indent=1) + "\n"
            )

    def _sorted(self, steps: list[BestStep]) -> list[BestStep]:
        sign = -1 if self._settings.higher_is_better else 1
        return sorted(steps, key=lambda each: (sign * each.value, each.step))[: self._settings.keep_best]

    @staticmethod
    def read(run_dir: Path, metric_name: str | None = None) -> list[BestStep]:
        """Return the best steps of a run, the best first; none where there is no file, or it is about another metric.

        Raises:
            UserError: the file is damaged.
        """
        path = run_dir / BEST
        try:
            content = json.loads(path.read_text())
            if metric_name is not None and content["metric_name"] != metric_name:
                return []
            return [BestStep(int(each["step"]), float(each["value"])) for each in content["best"]]
        except FileNotFoundError:
            return []
        except (OSError, ValueError, KeyError, TypeError) as error:
            rule = f"cannot be read ({type(error).__name__} {error})"
            raise UserError(str(path), None, rule, "remove it: the run then finds its best steps anew") from error

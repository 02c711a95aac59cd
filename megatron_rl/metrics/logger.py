"""Log the rows of a run: to disk first, then to the sinks and the console."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from types import TracebackType
from typing import TYPE_CHECKING, Any, Self

from rich.console import Console

from megatron_rl.metrics import rollout_lines
from megatron_rl.metrics.rows import EVAL_PREFIX, MetricsFile, Row, as_number, read_metrics
from megatron_rl.metrics.signal import SignalWatch
from megatron_rl.metrics.sinks import GuardedSink, Sink
from megatron_rl.metrics.terminal import StepConsole, use_console

if TYPE_CHECKING:
    from megatron_rl.config.trainer import RolloutTextsConfig


class MetricsLogger:
    """Rows of a run: ``metrics.jsonl`` first, then the sinks and the console.

    Log a step before its checkpoint is written, so that the row of every checkpoint is there at a resume.

    Args:
        run_dir: holds ``metrics.jsonl``; made if missing. Rows of an earlier start stay until ``resume_at``.
        total_steps: the last step, for the bar; None if there is no last one.
        console: where steps are shown and ``progress`` draws; None takes standard output.
        is_writer: True on rank 0. Other ranks write, show and read nothing.

    Raises:
        UserError: the file holds a line, not the last, that is no row.
    """

    def __init__(
        self,
        run_dir: Path,
        *,
        total_steps: int | None,
        sinks: Sequence[Sink] = (),
        console: Console | None = None,
        is_writer: bool = True,
    ) -> None:
        self.path = run_dir / "metrics.jsonl"
        self._file = MetricsFile(self.path) if is_writer else None
        self._sinks = [GuardedSink(sink) for sink in sinks]
        self._console = StepConsole(use_console((console or Console()) if is_writer else None), total_steps=total_steps)
        self._signal = SignalWatch()

    def rows(self) -> list[Row]:
        """Read the file's rows, in the order of steps; none on ranks that do not write."""
        return [] if self._file is None else read_metrics(self.path)

    def log(self, step: int, metrics: Mapping[str, float]) -> None:
        """Write the row after ``step`` training steps; a second call for the last step adds to its row.

        Values are plain numbers, or anything ``float`` takes (a tensor of one element waits for its device).
        """
        if self._file is None:
            return
        last = self._file.last_step
        assert last is None or step >= last, f"step {step} after step {last}: call resume_at before repeating steps"
        self._put(self._file, step, metrics)
        if step > 0:
            self._console.step(step, metrics)
            if warning := self._signal.see(metrics):
                self._console.say(f"step {step}: {warning}")
        self._console.evaluation(step, metrics)

    def log_eval(self, step: int, metrics: Mapping[str, float]) -> None:
        """Add an evaluation of the weights after ``step`` steps to that step's row, which may be an earlier one.

        Keys get the prefix ``eval/`` where they lack it; a repeated evaluation replaces.
        """
        if self._file is None:
            return
        metrics = {EVAL_PREFIX + key.removeprefix(EVAL_PREFIX): value for key, value in metrics.items()}
        self._put(self._file, step, metrics)
        self._console.evaluation(step, metrics)

    def log_rollouts(self, step: int, rollouts: Sequence[Mapping[str, Any]], settings: RolloutTextsConfig) -> None:
        """Show the first rollouts of a step on the console, and send some to the sinks that take them.

        Args:
            step: steps done.
            rollouts: lines of ``rollouts/step_<number>.jsonl``; none shows nothing.
            settings: how many.
        """
        for rollout in rollouts[: settings.print]:
            self._console.say(rollout_lines.on_console(step, rollout))
        if sent := rollouts[: settings.to_sinks]:
            for guard in self._sinks:
                guard.log_rollouts(step, sent)

    def resume_at(self, step: int) -> int:
        """Forget the rows after ``step`` steps, which will be repeated; -1 forgets all. Return their number."""
        if self._file is None:
            return 0
        rows = self.rows()
        kept = [row for row in rows if row["step"] <= step]
        if len(kept) < len(rows):
            self._file.rewrite(kept)
        for guard in self._sinks:
            guard.resume_at(step)
        return len(rows) - len(kept)

    def sync(self) -> int:
        """Bring the rows to disk, so that a checkpoint written next never is without them; return their number."""
        if self._file is not None:
            self._file.sync()
        return self.num_rows

    @property
    def num_rows(self) -> int:
        """Number of the file's rows; 0 on ranks that do not write."""
        return 0 if self._file is None else self._file.num_rows

    def close(self) -> None:
        """Close sinks and console; the rows are on disk already. A second call does nothing."""
        self._console.close()
        for guard in self._sinks:
            guard.close()
        self._sinks = []
        if self._file is not None:
            self._file.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def _put(self, file: MetricsFile, step: int, metrics: Mapping[str, float]) -> None:
        assert "step" not in metrics, "`step` is the row's own key"
        values = {key: as_number(key, value) for key, value in metrics.items()}
        values |= {f"dropped/sink_{guard.sink.name}": guard.num_missed for guard in self._sinks if guard.num_missed}
        if file.last_step is None or step > file.last_step:
            file.append({"step": step, **values})
        else:
            # At most once an evaluation, so the whole file is rewritten atomically: there always is one row a step.
            file.add(step, values)
        for guard in self._sinks:
            guard.log(step, values)

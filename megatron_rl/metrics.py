"""What a run says about itself while it runs: rows on disk, sinks, phase times, progress on the terminal.

    PhaseTimer.flush --+
    groups, stats -----+--> MetricsLogger.log(step) --> metrics.jsonl   always; the source of truth
    evaluation ------------> MetricsLogger.log_eval     |-> sinks       TensorBoard, W&B, MLflow: copies, may fail
                                                        +-> StepConsole live bar, or plain lines off a terminal

A row's ``step`` is the number of training steps done: training writes rows 1, 2, ...; row 0 holds the evaluation before
training. One row a step: an evaluation is in the row of its step, under ``eval/...``.

JSON has no NaN and no infinity. They are written as the strings "NaN", "Infinity", "-Infinity": still told apart, every
line stays valid JSON, and ``float(...)`` (also JavaScript's ``Number``) reads them back. ``read_metrics`` does it.

torch is imported only inside what needs it, so that the command line starts quickly on a laptop.
"""

from __future__ import annotations

import atexit
import difflib
import inspect
import json
import logging
import math
import os
import time
import uuid
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping, Sequence, Sized
from contextlib import contextmanager
from pathlib import Path
from types import TracebackType
from typing import TYPE_CHECKING, Any, Generic, Protocol, Self, TypeVar

from rich.console import Console, RenderableType
from rich.progress import (
    BarColumn,
    MofNCompleteColumn,
    Progress,
    TaskID,
    TextColumn,
    TimeElapsedColumn,
    TimeRemainingColumn,
)
from rich.text import Text

from megatron_rl.errors import UserError

if TYPE_CHECKING:
    from megatron_rl.config.schema import ExpManagerConfig

logger = logging.getLogger(__name__)

T = TypeVar("T")
Row = dict[str, float]

REWARD, PASS_1, ENTROPY, LENGTH = "reward/mean", "pass@1", "entropy/mean", "response_length/mean"
"""Names under which the console and the curves look for what they show."""
EVAL_PREFIX = "eval/"
NOT_FINITE = {"NaN": math.nan, "Infinity": math.inf, "-Infinity": -math.inf}


# -- rows on disk ------------------------------------------------------------------------------------------------------


def json_safe(value: object) -> object:
    """The same value with each NaN or infinity, at any depth, as its string."""
    if isinstance(value, float) and not math.isfinite(value):
        return "NaN" if math.isnan(value) else "Infinity" if value > 0 else "-Infinity"
    if isinstance(value, Mapping):
        return {key: json_safe(inner) for key, inner in value.items()}
    if isinstance(value, list | tuple):
        return [json_safe(inner) for inner in value]
    return value


def write_atomic(path: Path, data: bytes) -> None:
    """Replace a file so that a reader, or a crash at any moment, finds the old content or the new, never a mixture."""
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(f".{path.name}.tmp")  # same directory: a rename is atomic only inside one file system
    with temporary.open("wb") as file:
        file.write(data)
        file.flush()
        os.fsync(file.fileno())  # else a power cut can leave the new name with no bytes behind it
    temporary.replace(path)


def read_metrics(path: Path) -> list[Row]:
    """The rows of a ``metrics.jsonl``, numbers restored, in file order. Lines that do not parse are left out."""
    return _parse(path.read_bytes())[0]


def _parse(raw: bytes) -> tuple[list[Row], list[int]]:
    """Rows, and the numbers (from 1) of the lines that are none."""
    rows: list[Row] = []
    bad: list[int] = []
    for number, line in enumerate(raw.split(b"\n"), start=1):
        if not line.strip():
            continue
        try:
            row = json.loads(line)
        except ValueError:
            row = None
        if isinstance(row, dict) and isinstance(row.get("step"), int):
            rows.append({key: NOT_FINITE[x] if isinstance(x, str) and x in NOT_FINITE else x for key, x in row.items()})
        else:
            bad.append(number)
    return rows, bad


def _encode(row: Row) -> bytes:
    return json.dumps(json_safe(row), allow_nan=False).encode() + b"\n"


def _as_number(key: str, value: float) -> float:
    """A plain number out of whatever holds one (numpy scalar, tensor of one element)."""
    if isinstance(value, str):
        raise TypeError(f"metric {key!r} is the text {value!r}, not a number")
    return int(value) if isinstance(value, int) else float(value)


class MetricsFile:
    """``metrics.jsonl``: appended line by line, repaired on open, rewritten only by an atomic rename.

    A process killed while it writes leaves a last line without its end; opening drops that line. A broken line anywhere
    else is not something a crash of ours can cause, so it is an error rather than a silent loss.

    Raises:
        UserError: a line before the last one is not a row.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        path.parent.mkdir(parents=True, exist_ok=True)
        raw = path.read_bytes() if path.exists() else b""
        rows, bad = _parse(raw)
        last_line = len(raw.rstrip(b"\n").split(b"\n"))
        for number in bad:
            if number != last_line:
                raise UserError(f"{path}:{number}", None, "is not a metrics row", "delete the line or move the file")
        if bad:
            logger.warning("%s: dropped a half-written last line", path)
        if bad or (raw and not raw.endswith(b"\n")):
            write_atomic(path, b"".join(map(_encode, rows)))
        self._steps = {int(row["step"]) for row in rows}
        self._file = path.open("ab")

    @property
    def last_step(self) -> int | None:
        """The highest step that has a row; None in an empty file."""
        return max(self._steps, default=None)

    def append(self, row: Row) -> None:
        """Add the row of a new highest step; it is with the operating system when this returns."""
        self._file.write(_encode(row))
        self._file.flush()
        self._steps.add(int(row["step"]))

    def rewrite(self, rows: list[Row]) -> None:
        """Replace the content, in the order of steps."""
        self._file.close()
        write_atomic(self.path, b"".join(_encode(row) for row in sorted(rows, key=lambda row: row["step"])))
        self._steps = {int(row["step"]) for row in rows}
        self._file = self.path.open("ab")

    def close(self) -> None:
        """Close the file; rows are on disk already."""
        self._file.close()


# -- sinks -------------------------------------------------------------------------------------------------------------


class Sink(Protocol):
    """A copy of the metrics elsewhere. May raise: ``MetricsLogger`` counts what a sink misses and goes on."""

    name: str
    """Short, for ``dropped/sink_<name>``."""

    def log(self, step: int, metrics: Mapping[str, float]) -> None:
        """Record values of a step; a step can come twice (training, then evaluation) and out of order."""

    def resume_at(self, step: int) -> None:
        """Steps above this one will be logged again."""

    def close(self) -> None:
        """Write what is still pending."""


def _missing(name: str, pip: str) -> UserError:
    return UserError(f"exp_manager.create_{name}_logger", True, f"needs the package {pip}", f"pip install {pip}")


def _check_kwargs(field: str, given: Collection[str], allowed: Collection[str]) -> None:
    """Refuse unknown arguments here, where the config key can be named."""
    for key in given:
        if key not in allowed:
            near = difflib.get_close_matches(key, allowed, n=1)
            fix = f"write {near[0]}" if near else f"use one of {', '.join(sorted(allowed))}"
            raise UserError(f"{field}.{key}", None, "is not an argument that can be set here", fix)


def _stored_id(path: Path, make: Callable[[], str]) -> str:
    """The id of the run in a tracking service: made once, then kept beside the run, so that a resume continues it."""
    if not path.exists():
        write_atomic(path, make().encode() + b"\n")
    return path.read_text().strip()


class TensorBoardSink:
    """Event files in ``run_dir/tensorboard``, or in ``log_dir`` where the arguments give one.

    Written by torch's ``SummaryWriter``: its arguments are what NeMo calls ``summary_writer_kwargs``, and its
    ``purge_step`` makes TensorBoard forget the steps that a resume repeats. It needs no TensorFlow.
    """

    name = "tensorboard"

    def __init__(self, run_dir: Path, kwargs: Mapping[str, Any]) -> None:
        try:
            from torch.utils.tensorboard import SummaryWriter
        except ImportError as error:
            raise _missing("tensorboard", "tensorboard") from error
        # resume_at owns purge_step; comment has no effect once there is a log_dir.
        allowed = set(inspect.signature(SummaryWriter).parameters) - {"purge_step", "comment"}
        _check_kwargs("exp_manager.summary_writer_kwargs", kwargs, allowed)
        arguments = {"log_dir": str(run_dir / "tensorboard"), **kwargs}
        self._open: Callable[[int | None], SummaryWriter] = lambda purge: SummaryWriter(purge_step=purge, **arguments)
        # Opened at the first use: a writer makes its file at once, and a resume would leave one empty file each time.
        self._writer: SummaryWriter | None = None

    def log(self, step: int, metrics: Mapping[str, float]) -> None:
        """One scalar a metric, flushed: the writer's own two minutes are lost when a process is killed."""
        self._writer = self._writer or self._open(None)
        for key, value in metrics.items():
            self._writer.add_scalar(key, value, step)
        self._writer.flush()

    def resume_at(self, step: int) -> None:
        """Start an event file whose first record makes readers forget every later step."""
        self.close()
        self._writer = self._open(step + 1)

    def close(self) -> None:
        """Flush and close the event file."""
        if self._writer is not None:
            self._writer.close()
            self._writer = None


class WandbSink:
    """Weights & Biases. The arguments are ``wandb.init``'s; ``WANDB_MODE=offline`` or ``mode: offline`` work as ever.

    ``step`` is an ordinary metric that all others are plotted over, not W&B's own step: W&B drops a value whose own
    step is not above the last one, which would lose every repeated step after a resume and every late evaluation. The
    price: values of lost steps stay in W&B beside the repeated ones. Offline, a resume writes a second
    ``offline-run-*`` folder with the same id; ``wandb sync`` joins them.
    """

    name = "wandb"

    def __init__(
        self, run_dir: Path, kwargs: Mapping[str, Any], *, run_config: Mapping[str, Any] | None = None
    ) -> None:
        try:
            import wandb
        except ImportError as error:
            raise _missing("wandb", "wandb") from error
        _check_kwargs("exp_manager.wandb_logger_kwargs", kwargs, inspect.signature(wandb.init).parameters)
        run_id = kwargs.get("id") or os.environ.get("WANDB_RUN_ID")
        run_id = run_id or _stored_id(run_dir / "wandb_run_id.txt", lambda: uuid.uuid4().hex[:8])
        arguments = {"dir": str(run_dir), "resume": "allow", "config": dict(run_config or {}), **kwargs, "id": run_id}
        self._run = wandb.init(**arguments)
        self._run.define_metric("step")
        self._run.define_metric("*", step_metric="step")

    def log(self, step: int, metrics: Mapping[str, float]) -> None:
        """One W&B history entry."""
        self._run.log({"step": step, **metrics})

    def resume_at(self, step: int) -> None:
        """Nothing to undo: see the class."""

    def close(self) -> None:
        """Finish the run; waits for the upload."""
        self._run.finish()


class MLflowSink:
    """MLflow, through a client of its own: the process's active MLflow run, if a user has one, is left alone.

    Without ``tracking_uri`` MLflow's own rule holds (``MLFLOW_TRACKING_URI``, else a local store). MLflow keeps every
    value ever logged for a step, so a repeated step has two points there. Its names allow no ``@``: ``pass@1`` is
    ``pass_at_1``.
    """

    name = "mlflow"
    arguments = ("experiment_name", "run_name", "tracking_uri", "tags", "artifact_location", "run_id")
    """``mlflow_logger_kwargs`` as in NeMo, whose names are Lightning's ``MLFlowLogger``'s."""

    def __init__(
        self, run_dir: Path, kwargs: Mapping[str, Any], *, run_config: Mapping[str, Any] | None = None
    ) -> None:
        try:
            from mlflow.entities import Metric, Param
            from mlflow.tracking import MlflowClient
        except ImportError as error:
            raise _missing("mlflow", "mlflow") from error
        _check_kwargs("exp_manager.mlflow_logger_kwargs", kwargs, self.arguments)
        self._metric = Metric
        self._client = MlflowClient(tracking_uri=kwargs.get("tracking_uri"))

        def create() -> str:
            name = kwargs.get("experiment_name", "default")
            known = self._client.get_experiment_by_name(name)
            if known is not None:
                experiment_id = known.experiment_id
            else:
                experiment_id = self._client.create_experiment(name, artifact_location=kwargs.get("artifact_location"))
            run = self._client.create_run(
                experiment_id, run_name=kwargs.get("run_name", run_dir.name), tags=kwargs.get("tags")
            )
            # Here and not at a resume, because parameters can be written only once. 6000 is MLflow's limit.
            params = [Param(key, str(value)[:6000]) for key, value in _flatten(run_config or {})]
            for start in range(0, len(params), 100):  # MLflow's limit of one call
                self._client.log_batch(run.info.run_id, params=params[start : start + 100])
            return run.info.run_id

        self._run_id = kwargs.get("run_id") or _stored_id(run_dir / "mlflow_run_id.txt", create)
        self._client.update_run(self._run_id, status="RUNNING")

    def log(self, step: int, metrics: Mapping[str, float]) -> None:
        """One batch (of up to 1000 values, MLflow's limit) a step."""
        now_ms = int(time.time() * 1000)
        batch = [self._metric(key.replace("@", "_at_"), value, now_ms, step) for key, value in metrics.items()]
        for start in range(0, len(batch), 1000):
            self._client.log_batch(self._run_id, metrics=batch[start : start + 1000])

    def resume_at(self, step: int) -> None:
        """Nothing to undo: see the class."""

    def close(self) -> None:
        """Mark the run as finished."""
        self._client.set_terminated(self._run_id)


def _flatten(tree: Mapping[str, Any], prefix: str = "") -> Iterator[tuple[str, object]]:
    for key, value in tree.items():
        if isinstance(value, Mapping) and value:
            yield from _flatten(value, f"{prefix}{key}.")
        else:
            yield f"{prefix}{key}", value


def build_sinks(config: ExpManagerConfig, run_dir: Path, *, run_config: Mapping[str, Any] | None = None) -> list[Sink]:
    """The sinks that ``exp_manager`` asks for. On rank 0 only.

    Args:
        run_config: the resolved config as nested dicts, shown beside the run in W&B and MLflow.

    Raises:
        UserError: a package is missing, or an argument is not one of the library's.
    """
    sinks: list[Sink] = []
    if config.create_tensorboard_logger:
        sinks.append(TensorBoardSink(run_dir, config.summary_writer_kwargs))
    if config.create_wandb_logger:
        sinks.append(WandbSink(run_dir, config.wandb_logger_kwargs, run_config=run_config))
    if config.create_mlflow_logger:
        sinks.append(MLflowSink(run_dir, config.mlflow_logger_kwargs, run_config=run_config))
    return sinks


class _GuardedSink:
    """A sink whose failures cost its copy of some rows, and nothing else.

    Not loud: days of training must not end because a dashboard is down, and metrics.jsonl holds every row anyway. Not
    silent: the first failure is a warning, and all are counted in ``dropped/sink_<name>``. After a failure in a row the
    sink rests for 1, 3, 7, ... up to 63 rows, because clients of a dead server retry for minutes inside each call.
    """

    def __init__(self, sink: Sink) -> None:
        self.sink = sink
        self.num_missed = 0
        self._failures_in_row = 0
        self._rest = 0

    def log(self, step: int, metrics: Mapping[str, float]) -> None:
        if self._rest > 0:
            self._rest -= 1
            self.num_missed += 1
            return
        try:
            self.sink.log(step, metrics)
        except Exception as error:  # third-party code and a network: any type can arrive here
            if self.num_missed == 0:
                logger.warning(
                    "%s failed at step %d (%s: %s); training goes on, metrics.jsonl has every row, "
                    "further failures are only counted",
                    self.sink.name,
                    step,
                    type(error).__name__,
                    error,
                )
            self.num_missed += 1
            self._failures_in_row = min(self._failures_in_row + 1, 6)
            self._rest = 2**self._failures_in_row - 1
        else:
            self._failures_in_row = 0

    def close(self) -> None:
        try:
            self.sink.close()
        except Exception as error:  # as above: the run is over and its results are on disk
            logger.warning("%s failed to close (%s: %s)", self.sink.name, type(error).__name__, error)
        if self.num_missed:
            logger.warning("%s missed %d rows; metrics.jsonl has them", self.sink.name, self.num_missed)


# -- terminal ----------------------------------------------------------------------------------------------------------


class _Live(Progress):
    """All bars of the process, and one line of numbers below them: as columns they would not fit in 80 characters."""

    status = ""

    def get_renderables(self) -> Iterable[RenderableType]:
        yield from super().get_renderables()
        if self.status:
            yield Text(self.status, style="cyan", no_wrap=True, overflow="ellipsis")


class Display:
    """Where progress of this process is shown. One live area, started with the first task and ended with the last.

    Nesting works because every task is a row of the same rich ``Progress``; two live areas would fight for the cursor.
    Off a terminal a task is silent for ``quiet_s`` seconds and then says a line every ``quiet_s`` seconds.
    """

    def __init__(
        self, console: Console | None, *, quiet_s: float = 30.0, clock: Callable[[], float] = time.monotonic
    ) -> None:
        self.console = console
        """None is silence: ranks other than 0."""
        self.quiet_s = quiet_s
        self.clock = clock
        self._live: _Live | None = None

    @property
    def is_live(self) -> bool:
        """Whether there is a terminal that can redraw."""
        return self.console is not None and self.console.is_interactive

    def print(self, text: str) -> None:
        """A line that stays, above the live area if there is one."""
        if self.console is not None:
            # No markup: a user's text may hold [brackets]. soft_wrap: a log file has no width.
            self.console.print(text, markup=False, highlight=False, soft_wrap=True)

    def set_status(self, text: str) -> None:
        """The line below the bars."""
        if self._live is not None:
            self._live.status = text

    def _start(self, description: str, total: float | None) -> TaskID | None:
        if not self.is_live:
            return None
        if self._live is None:
            self._live = _Live(
                TextColumn("{task.description}"),
                BarColumn(bar_width=24),
                MofNCompleteColumn(),
                TimeElapsedColumn(),
                TextColumn("eta"),
                TimeRemainingColumn(compact=True),
                console=self.console,
                transient=True,
                refresh_per_second=4,
                speed_estimate_period=3600.0,  # rich's 30 s would never see two of our steps, so never a time left
            )
            self._live.start()
            atexit.register(self.close)  # a live area hides the cursor: give it back after an uncaught error
        return self._live.add_task(description, total=total)

    def _advance(self, task_id: TaskID, completed: float) -> None:
        if self._live is not None:
            self._live.update(task_id, completed=completed)

    def _stop(self, task_id: TaskID) -> None:
        if self._live is not None:
            self._live.remove_task(task_id)
            if not self._live.tasks:
                self.close()

    def close(self) -> None:
        """End the live area, whatever tasks are open."""
        if self._live is not None:
            self._live.stop()
            self._live = None
            atexit.unregister(self.close)


_display: Display | None = None


def use_console(console: Console | None) -> Display:
    """Make this console the one that ``progress`` draws on; None silences it. Called by ``MetricsLogger``."""
    global _display
    if _display is None or _display.console is not console:
        if _display is not None:
            _display.close()
        _display = Display(console)
    return _display


def _current_display() -> Display:
    """The display in use; else a console on standard error, on rank 0 only (torchrun's variable, so no torch)."""
    if _display is not None:
        return _display
    return use_console(Console(stderr=True) if int(os.environ.get("RANK", "0")) == 0 else None)


class ProgressTask(Generic[T]):
    """One piece of long work: iterate over it, or open it with ``with`` and call ``advance``."""

    def __init__(
        self, display: Display, description: str, *, items: Iterable[T] | None = None, total: float | None = None
    ) -> None:
        self._display = display
        self._items = items
        self.description = description
        self.total = total
        """In items; None where it is not known."""
        self.completed = 0.0
        self._task_id: TaskID | None = None
        self._started_s = self._said_s = 0.0
        self._has_spoken = False

    def __enter__(self) -> Self:
        self._started_s = self._said_s = self._display.clock()
        self._task_id = self._display._start(self.description, self.total)
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if self._task_id is not None:
            self._display._stop(self._task_id)
        elif self._has_spoken and kind is None:
            self._say()

    def __iter__(self) -> Iterator[T]:
        assert self._items is not None, "progress(total) has nothing to iterate over: use it with `with`"
        with self:
            for item in self._items:
                yield item
                self.advance()

    def advance(self, count: float = 1) -> None:
        """Count finished items."""
        self.advance_to(self.completed + count)

    def advance_to(self, completed: float) -> None:
        """Set the number of finished items."""
        self.completed = completed
        if self._task_id is not None:
            self._display._advance(self._task_id, completed)
        elif self._display.clock() - self._said_s >= self._display.quiet_s:
            self._say()

    def _say(self) -> None:
        self._has_spoken = True
        self._said_s = self._display.clock()
        share = f"/{self.total:g} ({self.completed / self.total:.0%})" if self.total else ""
        self._display.print(f"{self.description}: {self.completed:g}{share}, {self._said_s - self._started_s:.0f} s")


def progress(work: Iterable[T] | int | None, description: str) -> ProgressTask[T]:
    """Show how far long work is, inside whatever else is shown; silent, or a line now and then, off a terminal.

    Args:
        work: what to iterate over; or how many items there will be; or None where nobody knows.
        description: a word or two, such as "generation".

    Example:
        ``for batch in progress(batches, "scoring"): ...`` or
        ``with progress(800, "generation") as bar: ...; bar.advance()``
    """
    if work is None or isinstance(work, int):
        return ProgressTask(_current_display(), description, total=work)
    total = len(work) if isinstance(work, Sized) else None
    return ProgressTask(_current_display(), description, items=work, total=total)


def _thousands(value: float) -> str:
    return f"{value / 1000:.1f}k" if value >= 1000 else f"{value:.0f}"


COLUMNS: dict[str, Callable[[float], str]] = {
    REWARD: lambda x: f"reward {x:.3f}",
    PASS_1: lambda x: f"pass@1 {x:.1%}",
    ENTROPY: lambda x: f"entropy {x:.3f}",
    LENGTH: lambda x: f"length {x:.0f}",
    "tokens_per_s": lambda x: f"{_thousands(x)} tok/s",
    "time/step_s": lambda x: f"{x:.1f} s",
}
"""What a step's line shows, in this order, of the metrics that are there."""


class StepConsole:
    """The steps of a run: a bar with the last numbers on a terminal, else one line a step, ``min_interval_s`` apart.

    The first line and the last are always printed, and so is every evaluation.
    """

    def __init__(self, display: Display, *, total_steps: int | None, min_interval_s: float = 5.0) -> None:
        self.total_steps = total_steps
        self.min_interval_s = min_interval_s
        self._display = display
        self._task: ProgressTask[None] | None = None
        self._printed_s = -math.inf
        self._unsaid = ""
        """The line of the last step, while it is not printed."""

    def step(self, step: int, metrics: Mapping[str, float]) -> None:
        """Show a finished training step."""
        of = "" if self.total_steps is None else f"/{self.total_steps}"
        numbers = "  ".join(show(metrics[key]) for key, show in COLUMNS.items() if key in metrics)
        self._unsaid = f"step {step}{of}  {numbers}".rstrip()
        if self._display.is_live:
            if self._task is None:
                self._task = ProgressTask(self._display, "train", total=self.total_steps)
                self._task.__enter__()
            self._task.advance_to(step)
            self._display.set_status(numbers)
            return
        now = self._display.clock()
        if now - self._printed_s >= self.min_interval_s or step == self.total_steps:
            self._say()
            self._printed_s = now

    def evaluation(self, step: int, metrics: Mapping[str, float]) -> None:
        """Show the evaluation among the metrics, if any: greedy and pass@k in percent; the row has the rest."""
        shown = {key.removeprefix(EVAL_PREFIX): x for key, x in metrics.items() if key.startswith(EVAL_PREFIX)}
        numbers = [f"{key} {x:.1%}" for key, x in shown.items() if key == "greedy" or key.startswith("pass@")]
        if shown:
            self._display.print("  ".join((f"eval at step {step}", *numbers)))

    def close(self) -> None:
        """End the bar and leave the last step's line, also that of a run which ends early."""
        if self._task is not None:
            self._display.set_status("")
            self._task.__exit__(None, None, None)
            self._task = None
        self._say()

    def _say(self) -> None:
        if self._unsaid:
            self._display.print(self._unsaid)
            self._unsaid = ""


# -- the logger --------------------------------------------------------------------------------------------------------


class MetricsLogger:
    """Rows of a run: ``metrics.jsonl`` first, then the sinks and the console.

    Log a step before its checkpoint is written: then the checkpoint to resume from always has its row.

    Args:
        run_dir: holds ``metrics.jsonl``; made if missing. Rows of an earlier start stay until ``resume_at``.
        total_steps: the last step, for the bar; None where open-ended.
        console: also becomes the one that ``progress`` draws on; None takes standard output.
        is_writer: False on every rank but 0: nothing is written, shown or read.

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
        self._sinks = [_GuardedSink(sink) for sink in sinks]
        self._console = StepConsole(use_console((console or Console()) if is_writer else None), total_steps=total_steps)

    def rows(self) -> list[Row]:
        """What the file holds, in the order of steps; nothing on ranks that do not write."""
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

    def resume_at(self, step: int) -> int:
        """Forget the rows after ``step`` steps, which will be repeated; -1 forgets all. Returns how many there were."""
        if self._file is None:
            return 0
        rows = self.rows()
        kept = [row for row in rows if row["step"] <= step]
        if len(kept) < len(rows):
            self._file.rewrite(kept)
        # Not guarded: the run is just starting, where a broken sink should still stop it.
        for guard in self._sinks:
            guard.sink.resume_at(step)
        return len(rows) - len(kept)

    def close(self) -> None:
        """Finish sinks and console; the rows are on disk already. A second call does nothing."""
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
        values = {key: _as_number(key, value) for key, value in metrics.items()}
        values |= {f"dropped/sink_{guard.sink.name}": guard.num_missed for guard in self._sinks if guard.num_missed}
        if file.last_step is None or step > file.last_step:
            file.append({"step": step, **values})
        else:
            # Rare (at most once an evaluation), so the whole file is rewritten: one row a step, never a moment without.
            rows = {int(row["step"]): row for row in self.rows()}
            rows[step] = rows.get(step, {"step": step}) | values
            file.rewrite(list(rows.values()))
        for guard in self._sinks:
            guard.log(step, values)


# -- time and memory ---------------------------------------------------------------------------------------------------


class MemoryMeter(Protocol):
    """Measures the peak of memory between two calls."""

    def peak_bytes(self) -> int:
        """Highest number of bytes since the last call."""


class ProcessMemory:
    """Peak bytes that torch allocated on the current device once it uses CUDA, else the resident size of this process.

    On CUDA it owns torch's peak counter: each reading resets it. Resident size has no counter that can be reset, so it
    is sampled, and what a phase frees before its end is missed.
    """

    def __init__(self) -> None:
        import psutil

        self._process = psutil.Process()
        self._resident = self._process.memory_info().rss

    def peak_bytes(self) -> int:
        """See ``MemoryMeter``."""
        import torch

        if torch.cuda.is_initialized():  # not is_available: a run on the CPU of a GPU machine has its data in memory
            peak = torch.cuda.max_memory_allocated()
            torch.cuda.reset_peak_memory_stats()
            return peak
        before, self._resident = self._resident, self._process.memory_info().rss
        return max(before, self._resident)


class PhaseTimer:
    """Seconds and peak memory of each phase of a step. A nested phase is taken out of the one around it.

    So the phases and ``other`` add up to the step. Seconds are the host's: CUDA work still queued at the end of a phase
    is counted where the host waits for it, unless ``synchronize`` waits at every border (which costs overlap).
    For one thread, and not across an ``await``: phases must end in the reverse order of their start.

    Args:
        memory: None takes ``ProcessMemory``.
        synchronize: called at every border, such as ``torch.cuda.synchronize``.

    Example:
        ``with timer("update"): a(); with timer("optimizer"): b()`` gives the seconds of a to ``update``, of b to
        ``optimizer``.
    """

    def __init__(
        self,
        *,
        clock: Callable[[], float] = time.perf_counter,
        memory: MemoryMeter | None = None,
        synchronize: Callable[[], None] | None = None,
    ) -> None:
        self._clock = clock
        self._memory = memory or ProcessMemory()
        self._synchronize = synchronize
        self._open: list[str] = []
        self._seconds: dict[str, float] = {}
        self._bytes: dict[str, int] = {}
        self._border_s = self._flushed_s = clock()

    @contextmanager
    def __call__(self, phase: str) -> Iterator[None]:
        """Time a phase; repeated phases add up, and their peak is the highest."""
        self._charge()
        self._open.append(phase)
        try:
            yield
        finally:
            self._charge()
            inner = self._open[-1]
            assert inner == phase, f"phase {phase!r} ended while {inner!r} was open: interleaved tasks share a timer"
            self._open.pop()

    def flush(self, total_s: float | None = None) -> Row:
        """Seconds and bytes since the last flush, and start anew; phases still open go on.

        Args:
            total_s: length of the step in seconds; None takes the time since the last flush.

        Returns:
            ``time/<phase>_s``, ``memory/<phase>_bytes``, ``time/step_s`` and ``time/other_s`` = step minus phases.
        """
        self._charge()
        if total_s is None:
            total_s = self._border_s - self._flushed_s
        row: Row = {f"time/{phase}_s": seconds for phase, seconds in self._seconds.items()}
        row["time/other_s"] = max(0.0, total_s - sum(self._seconds.values()))
        row["time/step_s"] = total_s
        row |= {f"memory/{phase}_bytes": peak for phase, peak in self._bytes.items()}
        self._seconds, self._bytes, self._flushed_s = {}, {}, self._border_s
        return row

    def _charge(self) -> None:
        """Give what passed since the last border to the innermost open phase."""
        if self._synchronize is not None:
            self._synchronize()
        now, peak = self._clock(), self._memory.peak_bytes()
        if self._open:
            phase = self._open[-1]
            self._seconds[phase] = self._seconds.get(phase, 0.0) + now - self._border_s
            self._bytes[phase] = max(self._bytes.get(phase, 0), peak)
        self._border_s = now

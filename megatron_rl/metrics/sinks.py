"""Copy the rows to TensorBoard, Weights & Biases, MLflow or a class of the user's; training goes on where a copy fails.

``exp_manager.sinks`` lists classes as ``package.module:CLASS``. Rank 0 builds each as ``CLASS(directory, run_config)`` with the
run's folder and its resolved config as nested dicts.
"""

from __future__ import annotations

import difflib
import inspect
import logging
import os
import time
import uuid
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol, runtime_checkable

from megatron_rl import plugins
from megatron_rl.errors import UserError, described
from megatron_rl.files import write_atomic
from megatron_rl.metrics import rollout_lines

if TYPE_CHECKING:
    from megatron_rl.config.trainer import ExpManagerConfig

logger = logging.getLogger(__name__)


class Sink(Protocol):
    """A copy of the metrics elsewhere. It may raise: ``MetricsLogger`` counts the missed rows and goes on."""

    name: str
    """Short, for ``dropped/sink_<name>``."""

    def log(self, step: int, metrics: Mapping[str, float]) -> None:
        """Record values of a step; a step can come twice (training, then evaluation) and out of order."""

    def resume_at(self, step: int) -> None:
        """Prepare for a resume after ``step``: later steps will be logged again. A fresh run gives -1."""

    def close(self) -> None:
        """Write pending values, and stop."""


@runtime_checkable
class RolloutSink(Protocol):
    """A sink that also takes texts; a sink may leave this method out."""

    def log_rollouts(self, step: int, rows: Sequence[Mapping[str, Any]]) -> None:
        """Show some rollouts of a step: fields as in ``rollouts/step_<number>.jsonl``, without token details."""


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
    """Return the run's id in a tracking service: made once, then kept in a file of the run, so that a resume continues it."""
    if not path.exists():
        write_atomic(path, make() + "\n")
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
        """Write one scalar a metric, and flush: a killed process loses what the writer buffers for up to two minutes."""
        self._writer = self._writer or self._open(None)
        for key, value in metrics.items():
            self._writer.add_scalar(key, value, step)
        self._writer.flush()

    def log_rollouts(self, step: int, rows: Sequence[Mapping[str, Any]]) -> None:
        """Write one text a rollout, as it is."""
        self._writer = self._writer or self._open(None)
        for number, values in enumerate(rollout_lines.table(rows)):
            lines = "\n".join(f"{name}: {value}" for name, value in zip(rollout_lines.COLUMNS, values))
            text = "\n".join("    " + line for line in lines.splitlines())  # Markdown shows indented lines as they are
            self._writer.add_text(f"rollouts/{number}", text, step)
        self._writer.flush()

    def resume_at(self, step: int) -> None:
        """Start a new event file, whose first record makes readers forget every later step."""
        self.close()
        self._writer = self._open(step + 1)

    def close(self) -> None:
        """Flush and close the event file."""
        if self._writer is not None:
            self._writer.close()
            self._writer = None


class WandbSink:
    """Weights & Biases. The arguments are those of ``wandb.init``; ``WANDB_MODE=offline`` and ``mode: offline`` work.

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
        """Add one W&B history entry."""
        self._run.log({"step": step, **metrics})

    def log_rollouts(self, step: int, rows: Sequence[Mapping[str, Any]]) -> None:
        """Add a table of the step."""
        import wandb

        found = wandb.Table(columns=list(rollout_lines.COLUMNS), data=rollout_lines.table(rows))
        self._run.log({"step": step, "rollouts": found})

    def resume_at(self, step: int) -> None:
        """Keep the values of lost steps: the service cannot undo them (see the class)."""

    def close(self) -> None:
        """Finish the run, and wait for the upload."""
        self._run.finish()


class MLflowSink:
    """MLflow, through a client of its own, so that an active MLflow run of the process is left alone.

    Without ``tracking_uri`` MLflow takes ``MLFLOW_TRACKING_URI``, else a local store. MLflow keeps every value ever logged
    for a step, so a repeated step has two points there. MLflow's names allow no ``@``: ``pass@1`` becomes ``pass_at_1``.
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
            # A parameter can be written only once, so a resume writes none. 6000 characters are MLflow's limit.
            params = [Param(key, str(value)[:6000]) for key, value in _flatten(run_config or {})]
            for start in range(0, len(params), 100):  # MLflow takes 100 a call
                self._client.log_batch(run.info.run_id, params=params[start : start + 100])
            return run.info.run_id

        self._run_id = kwargs.get("run_id") or _stored_id(run_dir / "mlflow_run_id.txt", create)
        self._client.update_run(self._run_id, status="RUNNING")

    def log(self, step: int, metrics: Mapping[str, float]) -> None:
        """Send the values of a step, in batches of at most 1000 (MLflow's limit)."""
        now_ms = int(time.time() * 1000)
        batch = [self._metric(key.replace("@", "_at_"), value, now_ms, step) for key, value in metrics.items()]
        for start in range(0, len(batch), 1000):
            self._client.log_batch(self._run_id, metrics=batch[start : start + 1000])

    def log_rollouts(self, step: int, rows: Sequence[Mapping[str, Any]]) -> None:
        """Write ``rollouts/step_<number>.json``, a table as MLflow writes them.

        Not by MLflow's ``log_table``: that keeps the names of all tables in one tag, which overflows after some hundred steps.
        """
        content = {"columns": list(rollout_lines.COLUMNS), "data": rollout_lines.table(rows)}
        self._client.log_dict(self._run_id, content, f"rollouts/step_{step:08d}.json")

    def resume_at(self, step: int) -> None:
        """Keep the values of lost steps: the service cannot undo them (see the class)."""

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
    """Build the sinks that ``exp_manager`` asks for. On rank 0 only.

    Args:
        run_config: the resolved config as nested dicts, which W&B and MLflow show beside the run.

    Raises:
        UserError: a package is missing, an argument is not one of the library's, or an outside class is no sink.
    """
    sinks: list[Sink] = []
    if config.create_tensorboard_logger:
        sinks.append(TensorBoardSink(run_dir, config.summary_writer_kwargs))
    if config.create_wandb_logger:
        sinks.append(WandbSink(run_dir, config.wandb_logger_kwargs, run_config=run_config))
    if config.create_mlflow_logger:
        sinks.append(MLflowSink(run_dir, config.mlflow_logger_kwargs, run_config=run_config))
    return sinks + [_outside_sink(path, run_dir, run_config or {}) for path in config.sinks]


def _outside_sink(path: str, run_dir: Path, run_config: Mapping[str, Any]) -> Sink:
    """Import a sink class and build it; whatever its code raises here becomes a ``UserError``."""
    field = "exp_manager.sinks"
    build = plugins.load(path, field=field, what="a metric sink")
    plugins.check_call(build, path, ("directory", "run_config"), field=field)
    try:
        sink: Sink = build(run_dir, run_config)
    except UserError:
        raise
    except plugins.FROM_OUTSIDE as error:
        rule = f"could not be built as f(directory, run_config) ({described(error)})"
        raise UserError(field, path, rule, "fix the class, or leave the sink out") from error
    absent = [name for name in ("log", "resume_at", "close") if not callable(getattr(sink, name, None))]
    absent += [] if isinstance(getattr(sink, "name", None), str) else ["name"]
    if absent:
        fix = "give the class what megatron_rl.metrics.Sink has: name, log, resume_at and close"
        raise UserError(field, path, f"is not a metric sink: it lacks {', '.join(absent)}", fix)
    return sink


class GuardedSink:
    """A sink whose failures cost nothing but its copies of some rows.

    Days of training must not end because a dashboard is down, and metrics.jsonl holds every row anyway. But the first
    failure is a warning, and all are counted in ``dropped/sink_<name>``. After consecutive failures the sink rests for 1, 3,
    7, ... up to 63 rows, because clients of a dead server retry for minutes inside each call.
    """

    def __init__(self, sink: Sink) -> None:
        self.sink = sink
        self.num_missed = 0
        self._failures_in_row = 0
        self._rest = 0

    def log(self, step: int, metrics: Mapping[str, float]) -> None:
        """Pass a row on, unless the sink is resting after failures."""
        self._pass_on(step, lambda: self.sink.log(step, metrics))

    def log_rollouts(self, step: int, rows: Sequence[Mapping[str, Any]]) -> None:
        """Pass texts on to a sink that takes them, unless it is resting; missed ones count as a row."""
        sink = self.sink
        if isinstance(sink, RolloutSink):
            self._pass_on(step, lambda: sink.log_rollouts(step, rows))

    def _pass_on(self, step: int, call: Callable[[], None]) -> None:
        if self._rest > 0:
            self._rest -= 1
            self.num_missed += 1
            return
        try:
            call()
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

    def resume_at(self, step: int) -> None:
        """Pass a resume on. The run is just starting, so a broken sink stops it here.

        Raises:
            UserError: the sink has failed.
        """
        try:
            self.sink.resume_at(step)
        except UserError:
            raise
        except Exception as error:
            rule = f"failed before the first step ({type(error).__name__}: {error})"
            raise UserError("exp_manager", f"metric sink {self.sink.name}", rule, "mend it, or leave it out") from error

    def close(self) -> None:
        """Finish the sink; a failure is a warning."""
        try:
            self.sink.close()
        except Exception as error:  # the run is over and its results are on disk
            logger.warning("%s failed to close (%s: %s)", self.sink.name, type(error).__name__, error)
        if self.num_missed:
            logger.warning("%s missed %d rows; metrics.jsonl has them", self.sink.name, self.num_missed)

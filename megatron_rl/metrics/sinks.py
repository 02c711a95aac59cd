"""Copies of the rows for TensorBoard, Weights & Biases and MLflow; they may fail, training goes on."""

from __future__ import annotations

import difflib
import inspect
import logging
import os
import time
import uuid
from collections.abc import Callable, Collection, Iterator, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol

from megatron_rl.errors import UserError
from megatron_rl.files import write_atomic

if TYPE_CHECKING:
    from megatron_rl.config.trainer import ExpManagerConfig

logger = logging.getLogger(__name__)


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


class GuardedSink:
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
        """Pass a row on, unless the sink is resting after failures."""
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
        """Finish the sink; its failure is a warning."""
        try:
            self.sink.close()
        except Exception as error:  # as above: the run is over and its results are on disk
            logger.warning("%s failed to close (%s: %s)", self.sink.name, type(error).__name__, error)
        if self.num_missed:
            logger.warning("%s missed %d rows; metrics.jsonl has them", self.sink.name, self.num_missed)

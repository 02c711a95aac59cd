"""Metrics of a run: rows on disk, sinks, phase times, progress on the terminal.

    PhaseTimer.flush --+
    groups, stats -----+--> MetricsLogger.log(step) --> metrics.jsonl   always; the source of truth
    evaluation ------------> MetricsLogger.log_eval     |-> sinks       TensorBoard, W&B, MLflow: copies, may fail
                                                        +-> StepConsole live bar, or plain lines off a terminal

A row's ``step`` is the number of training steps done: training writes rows 1, 2, ...; row 0 holds the evaluation before
training. One row a step: an evaluation is in the row of its step, under ``eval/...``.

JSON has no NaN and no infinity. They are written as the strings "NaN", "Infinity", "-Infinity": every line stays valid
JSON, and ``float(...)`` (also JavaScript's ``Number``) reads them back. ``read_metrics`` does it.

torch is imported only inside what needs it, so that the command line starts quickly on a laptop.
"""

from megatron_rl.metrics.logger import MetricsLogger
from megatron_rl.metrics.rows import MetricsFile, read_metrics
from megatron_rl.metrics.sinks import Sink, build_sinks
from megatron_rl.metrics.terminal import Display, StepConsole, progress, use_console
from megatron_rl.metrics.timing import PhaseTimer, ProcessMemory

__all__ = [
    "Display",
    "MetricsFile",
    "MetricsLogger",
    "PhaseTimer",
    "ProcessMemory",
    "Sink",
    "StepConsole",
    "build_sinks",
    "progress",
    "read_metrics",
    "use_console",
]

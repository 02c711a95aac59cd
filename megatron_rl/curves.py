"""One picture of a run: reward, accuracy, entropy and response length over steps."""

from __future__ import annotations

import math
import re
from collections.abc import Sequence
from pathlib import Path

import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator, PercentFormatter

from megatron_rl.metrics import ENTROPY, EVAL_PREFIX, LENGTH, PASS_1, REWARD, Row, read_metrics, write_atomic

BLUE, GREY = "#2563a8", "#6b7280"
EVAL_COLOURS = ("#d1495b", "#e08e1b", "#3a7d44", "#7b4fa3", "#8c564b")
EVAL_MARKERS = "osD^v"


def plot_curves(metrics_jsonl: Path, png: Path, *, title: str | None = None) -> None:
    """Draw the curves of a run. A short, torn or missing file gives emptier panels, never an error.

    The faint line is the metric, the strong one its running mean (``smooth``). Points in the accuracy panel are
    evaluations on held-out problems: greedy, and each pass@k that was measured.

    Args:
        png: the picture; replaced atomically, so it can be redrawn while somebody looks at it.
        title: None takes the name of the run's folder.
    """
    rows = read_metrics(metrics_jsonl) if metrics_jsonl.is_file() else []
    # A Figure of its own, not pyplot: no global state, no display needed, and a notebook's backend stays as it is.
    figure = Figure(figsize=(11, 7), dpi=130, layout="constrained")
    figure.suptitle(metrics_jsonl.absolute().parent.name if title is None else title, fontsize=14, fontweight="bold")
    (reward, accuracy), (entropy, length) = figure.subplots(2, 2)
    _curve(reward, rows, REWARD, "Reward", "mean reward")
    _curve(accuracy, rows, PASS_1, "Accuracy", "problems solved", label="train pass@1", fallback=_evaluations(rows) == [])
    _eval_points(accuracy, rows)
    accuracy.yaxis.set_major_formatter(PercentFormatter(xmax=1.0, decimals=0))
    _curve(entropy, rows, ENTROPY, "Entropy", "nats per token")
    _curve(length, rows, LENGTH, "Response length", "tokens per response")
    png.parent.mkdir(parents=True, exist_ok=True)
    _save(figure, png)

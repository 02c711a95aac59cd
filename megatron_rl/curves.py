"""One picture of a run: reward, accuracy, entropy and response length over steps."""

from __future__ import annotations

import io
import math
import re
from collections.abc import Sequence
from pathlib import Path

import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator, PercentFormatter

from megatron_rl.metrics.rows import ENTROPY, EVAL_PREFIX, LENGTH, PASS_1, REWARD, Row, read_metrics, write_atomic

LINE, NOTE = "#2563a8", "#6b7280"
EVAL_STYLES = (("#c2410c", "o"), ("#15803d", "s"), ("#7e22ce", "^"), ("#a16207", "D"), ("#0e7490", "v"))
"""Colour and marker of greedy, then of each pass@k: told apart in print and by the colour-blind as well."""


def plot_curves(metrics_jsonl: Path, png: Path, *, title: str | None = None) -> None:
    """Draw the curves of a run. A short, torn or missing file gives emptier panels, never an error.

    The faint line is the metric, the strong one its running mean (``smooth``). Points in the accuracy panel are
    evaluations on held-out problems: greedy, and each pass@k that was measured.

    Args:
        png: the picture; replaced atomically, so it can be redrawn while somebody looks at it.
        title: None takes the name of the run's folder.
    """
    rows = read_metrics(metrics_jsonl) if metrics_jsonl.is_file() else []
    # A Figure of its own, not pyplot: no global state, no display, and a notebook's backend stays as it is.
    figure = Figure(figsize=(11, 7), dpi=130, layout="constrained")
    figure.suptitle(metrics_jsonl.absolute().parent.name if title is None else title, fontsize=14, fontweight="bold")
    (reward, accuracy), (entropy, length) = figure.subplots(2, 2)
    _line(reward, rows, REWARD, "Reward", "mean reward")
    _line(accuracy, rows, PASS_1, "Accuracy", "solved", label="train pass@1")
    _evaluations(accuracy, rows)
    accuracy.yaxis.set_major_formatter(PercentFormatter(xmax=1.0))
    _line(entropy, rows, ENTROPY, "Entropy", "nats per token")
    _line(length, rows, LENGTH, "Response length", "tokens")
    for panel in (reward, accuracy, entropy, length):
        if not panel.lines:
            panel.set(xticks=[], yticks=[])
            panel.text(0.5, 0.5, "not in the metrics", transform=panel.transAxes, ha="center", va="center", color=NOTE)
    image = io.BytesIO()
    figure.savefig(image, format="png")
    write_atomic(png, image.getvalue())


def smooth(values: Sequence[float], width: float) -> np.ndarray:
    """Running mean with Gaussian weights of standard deviation ``width`` points.

    Centred, so that a rise is drawn where it happens (an exponential average lags behind), and normalised by the
    weights that fall inside, so that the ends are not pulled towards zero.
    """
    reach = max(1, math.ceil(3 * width))
    weights = np.exp(-0.5 * (np.arange(-reach, reach + 1) / width) ** 2)
    # "full", then cut: "same" would return the longer of the two when there are fewer points than weights.
    total = np.convolve(np.asarray(values, dtype=float), weights, "full")[reach:-reach]
    return total / np.convolve(np.ones(len(values)), weights, "full")[reach:-reach]


def _series(rows: Sequence[Row], key: str) -> tuple[list[float], list[float]]:
    """Steps and values of one metric, where it is there and finite."""
    points = [(row["step"], row[key]) for row in rows if _is_finite(row.get(key))]
    return [step for step, _ in points], [value for _, value in points]


def _is_finite(value: object) -> bool:
    return isinstance(value, int | float) and math.isfinite(value)


def _line(panel: Axes, rows: Sequence[Row], key: str, title: str, unit: str, *, label: str | None = None) -> None:
    panel.set_title(title, fontsize=12)
    panel.set(xlabel="training step", ylabel=unit)
    panel.xaxis.set_major_locator(MaxNLocator(integer=True))
    panel.grid(alpha=0.25)
    panel.spines[["top", "right"]].set_visible(False)
    steps, values = _series(rows, key)
    if len(steps) >= 5:  # with fewer points a mean says nothing that the points do not
        panel.plot(steps, values, color=LINE, alpha=0.3, linewidth=1)
        panel.plot(steps, smooth(values, max(1.0, len(values) / 40)), color=LINE, linewidth=2.2, label=label)
    elif steps:
        panel.plot(steps, values, color=LINE, marker=".", linewidth=1.5, label=label)


def _evaluations(panel: Axes, rows: Sequence[Row]) -> None:
    keys = {key for row in rows for key in row if re.fullmatch(rf"{EVAL_PREFIX}pass@\d+", key)}
    ordered = [f"{EVAL_PREFIX}greedy", *sorted(keys, key=lambda key: int(key.split("@")[1]))]
    for i, key in enumerate(ordered):
        steps, values = _series(rows, key)
        if steps:
            colour, marker = EVAL_STYLES[i % len(EVAL_STYLES)]
            label = "eval " + key.removeprefix(EVAL_PREFIX)
            panel.plot(steps, values, f"{marker}:", color=colour, markersize=6, linewidth=1.2, label=label)
    if panel.lines:
        panel.legend(fontsize=9, framealpha=0.8)

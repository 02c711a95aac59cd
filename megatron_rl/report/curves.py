"""One picture of a run over its steps: reward, accuracy, entropy and response length; and diversity, where it was measured.

Of a supervised run: loss, gradient norm, learning rate; and accuracy, or entropy where nothing was evaluated.
"""

from __future__ import annotations

import io
import math
import re
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path

import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator, PercentFormatter

from megatron_rl.files import write_atomic
from megatron_rl.metrics.rows import (
    ENTROPY,
    EVAL_PREFIX,
    GRAD_NORM,
    LENGTH,
    LOSS,
    LR,
    PASS_1,
    REWARD,
    Row,
    read_metrics,
    set_prefixes,
)

LINE, NOTE = "#2563a8", "#6b7280"
EVAL_STYLES = (
    ("#c2410c", "o"), ("#15803d", "s"), ("#7e22ce", "^"), ("#a16207", "D"), ("#0e7490", "v"),
    ("#be185d", "P"), ("#475569", "X"),
)  # fmt: skip
"""Colour and marker of greedy, then of each pass@k; they differ in print and to the colour-blind as well."""
DIVERSITY = {
    "keep_rate_greedy": "still solved (greedy)",
    "explore_rate_greedy": "newly solved (greedy)",
    "keep_rate_any": "still solved (any sample)",
    "explore_rate_any": "newly solved (any sample)",
    "styles_ge_3": "3 styles or more",
}
"""Metrics of the diversity panel, with their legend; a run without any of them has no third row."""


def plot_curves(metrics_jsonl: Path, png: Path, *, title: str | None = None) -> None:
    """Draw the curves of a run. A short, torn or missing file gives emptier panels, never an error.

    The faint line is the metric, the strong one its running mean (``smooth``). Points in the accuracy panel are
    evaluations on held-out problems: greedy, and each pass@k that was measured. Runs with a metric of ``DIVERSITY`` get a
    third row: pass@k over k, a line for each evaluation, and those metrics over steps.

    Args:
        png: the picture; replaced atomically, so it can be redrawn while somebody looks at it.
        title: None takes the name of the run's folder.
    """
    rows = read_metrics(metrics_jsonl) if metrics_jsonl.is_file() else []
    # A Figure of its own, not pyplot: no global state, no display, and a notebook's backend stays as it is.
    sets = set_prefixes(key for row in rows for key in row)
    has_diversity = any(prefix + name in row for row in rows for name in DIVERSITY for prefix in sets.values())
    num_panel_rows = 3 if has_diversity else 2
    figure = Figure(figsize=(11, 3.5 * num_panel_rows), dpi=130, layout="constrained")
    figure.suptitle(metrics_jsonl.absolute().parent.name if title is None else title, fontsize=14, fontweight="bold")
    panels = figure.subplots(num_panel_rows, 2)
    is_supervised = any(LOSS in row for row in rows) and not any(REWARD in row or LENGTH in row for row in rows)
    (_supervised if is_supervised else _of_rollouts)(panels[:2].flat, rows, sets)
    if has_diversity:
        _pass_at_k(panels[2][0], rows, sets)
        _diversity(panels[2][1], rows, sets)
    for panel in panels.flat:
        if not panel.lines:
            panel.set(xticks=[], yticks=[])
            panel.text(0.5, 0.5, "not in the metrics", transform=panel.transAxes, ha="center", va="center", color=NOTE)
    image = io.BytesIO()
    figure.savefig(image, format="png")
    write_atomic(png, image.getvalue())


def _of_rollouts(panels: Iterable[Axes], rows: Sequence[Row], sets: Mapping[str, str]) -> None:
    reward, accuracy, entropy, length = panels
    _line(reward, rows, REWARD, "Reward", "mean reward")
    _accuracy(accuracy, rows, sets)
    _line(entropy, rows, ENTROPY, "Entropy", "nats per token")
    _line(length, rows, LENGTH, "Response length", "tokens")


def _supervised(panels: Iterable[Axes], rows: Sequence[Row], sets: Mapping[str, str]) -> None:
    loss, second, grad_norm, rate = panels
    _line(loss, rows, LOSS, "Loss", "nats per token")
    if any(key.startswith(EVAL_PREFIX) for row in rows for key in row):
        _accuracy(second, rows, sets)
    else:
        _line(second, rows, ENTROPY, "Entropy", "nats per token")
    _line(grad_norm, rows, GRAD_NORM, "Gradient norm", "before clipping")
    _line(rate, rows, LR, "Learning rate", "")


def _accuracy(panel: Axes, rows: Sequence[Row], sets: Mapping[str, str]) -> None:
    _line(panel, rows, PASS_1, "Accuracy", "solved", label="train pass@1")
    _evaluations(panel, rows, sets)
    panel.yaxis.set_major_formatter(PercentFormatter(xmax=1.0))


def smooth(values: Sequence[float], width: float) -> np.ndarray:
    """Return the running mean with Gaussian weights of standard deviation ``width`` points.

    Centred, so that a rise is drawn where it happens (an exponential average lags behind), and normalised by the
    weights that fall inside, so that the ends are not pulled towards zero.
    """
    reach = max(1, math.ceil(3 * width))
    weights = np.exp(-0.5 * (np.arange(-reach, reach + 1) / width) ** 2)
    # "full", then cut: "same" would return the longer of the two when there are fewer points than weights.
    total = np.convolve(np.asarray(values, dtype=float), weights, "full")[reach:-reach]
    return total / np.convolve(np.ones(len(values)), weights, "full")[reach:-reach]


def _series(rows: Sequence[Row], key: str) -> tuple[list[float], list[float]]:
    """Return steps and values of one metric, where it is finite."""
    points = [(row["step"], row[key]) for row in rows if _is_finite(row.get(key))]
    return [step for step, _ in points], [value for _, value in points]


def _is_finite(value: object) -> bool:
    return isinstance(value, int | float) and math.isfinite(value)


def _dress(panel: Axes, title: str, unit: str) -> None:
    panel.set_title(title, fontsize=12)
    panel.set(xlabel="training step", ylabel=unit)
    panel.xaxis.set_major_locator(MaxNLocator(integer=True))
    panel.grid(alpha=0.25)
    panel.spines[["top", "right"]].set_visible(False)


def _line(panel: Axes, rows: Sequence[Row], key: str, title: str, unit: str, *, label: str | None = None) -> None:
    _dress(panel, title, unit)
    steps, values = _series(rows, key)
    if len(steps) >= 5:  # with fewer points a mean adds nothing
        panel.plot(steps, values, color=LINE, alpha=0.3, linewidth=1)
        panel.plot(steps, smooth(values, max(1.0, len(values) / 40)), color=LINE, linewidth=2.2, label=label)
    elif steps:
        panel.plot(steps, values, color=LINE, marker=".", linewidth=1.5, label=label)


def _evaluations(panel: Axes, rows: Sequence[Row], sets: Mapping[str, str]) -> None:
    ordered = []
    for prefix in sets.values():
        keys = {key for row in rows for key in row if re.fullmatch(rf"{re.escape(prefix)}pass@\d+", key)}
        ordered += [f"{prefix}greedy", *sorted(keys, key=lambda key: int(key.rsplit("@", 1)[1]))]
    for i, key in enumerate(ordered):
        _points(panel, *_series(rows, key), i, label="eval " + key.removeprefix(EVAL_PREFIX))
    _legend(panel)


def _points(panel: Axes, x: Sequence[float], y: Sequence[float], number: int, *, label: str | None) -> None:
    if x:
        colour, marker = EVAL_STYLES[number % len(EVAL_STYLES)]
        panel.plot(x, y, f"{marker}:", color=colour, markersize=6, linewidth=1.2, label=label)


def _legend(panel: Axes) -> None:
    if panel.lines:
        panel.legend(fontsize=9, framealpha=0.8)


def _pass_at_k(panel: Axes, rows: Sequence[Row], sets: Mapping[str, str]) -> None:
    """Draw a line for each evaluation with two k or more: the first and last of a set stand out, others are faint."""
    _dress(panel, "pass@k", "solved")
    ticks: list[int] = []
    for number, (name, prefix) in enumerate(sets.items()):
        lines = [(row["step"], line) for row in rows if len(line := _pass_at_k_of(row, prefix)) > 1]
        for i, (step, line) in enumerate(lines):
            if 0 < i < len(lines) - 1:
                panel.plot(list(line), list(line.values()), color=NOTE, alpha=0.4, linewidth=1)
            else:
                label = f"{name} step {step}".lstrip()
                _points(panel, list(line), list(line.values()), 2 * number + min(i, 1), label=label)
        ticks = sorted({*ticks, *(k for _, line in lines for k in line)})
    if ticks:
        panel.set_xscale("log", base=2)
        panel.set_xticks(ticks, [str(k) for k in ticks])
        panel.minorticks_off()
    panel.set_xlabel("k samples")
    panel.yaxis.set_major_formatter(PercentFormatter(xmax=1.0))
    _legend(panel)


def _pass_at_k_of(row: Row, prefix: str) -> dict[int, float]:
    """Return pass@k by k, ascending."""
    found = [(re.fullmatch(rf"{re.escape(prefix)}pass@(\d+)", key), value) for key, value in row.items()]
    return dict(sorted((int(match[1]), value) for match, value in found if match and _is_finite(value)))


def _diversity(panel: Axes, rows: Sequence[Row], sets: Mapping[str, str]) -> None:
    """Draw diversity of the evaluations with most samples a problem: fewer samples find fewer styles, whatever the weights."""
    _dress(panel, "Diversity", "share of problems")
    number = 0
    for set_name, prefix in sets.items():
        drawn = [key for row in rows for key in row if re.fullmatch(rf"{re.escape(prefix)}avg@\d+", key)]
        most = max(drawn, key=lambda key: int(key.rsplit("@", 1)[1]), default=None)
        for name, label in DIVERSITY.items():
            alike = rows if name.endswith("_greedy") else [row for row in rows if most is None or most in row]
            _points(panel, *_series(alike, prefix + name), number, label=f"{set_name} {label}".lstrip())
            number += 1
    panel.yaxis.set_major_formatter(PercentFormatter(xmax=1.0))
    _legend(panel)

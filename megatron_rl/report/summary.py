"""The end of a run in a few numbers: ``summary.json`` for programs, a before/after table for people."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from pathlib import Path

from rich.console import Console
from rich.table import Table

from megatron_rl.files import write_atomic
from megatron_rl.metrics.rows import EVAL_PREFIX, json_safe

RATES = {
    "keep_rate_greedy": "solved before, still (greedy)",
    "explore_rate_greedy": "failed before, solved (greedy)",
    "keep_rate_any": "solved before, still (any sample)",
    "explore_rate_any": "failed before, solved (any sample)",
    "styles_ge_3": "problems with 3 styles or more",
}
COUNTS = {"distinct_answers": "distinct answers a problem", "distinct_styles": "distinct styles a problem"}
"""Lines of the table that only some runs have."""


def write_summary(path: Path, summary: Mapping[str, object]) -> None:
    """Write JSON atomically; NaN and infinities become strings, as in ``metrics.jsonl``."""
    write_atomic(path, json.dumps(json_safe(summary), indent=2, allow_nan=False) + "\n")


def print_before_after(
    before: Mapping[str, float], after: Mapping[str, float], k_values: Sequence[int], *, console: Console | None = None
) -> None:
    """Print greedy accuracy and pass@k before and after training, with the change in percentage points; then diversity.

    Args:
        before: a row of ``metrics.jsonl``: fractions in [0, 1] under ``eval/greedy`` and ``eval/pass@<k>``; what is not
            there shows as a dash, and a line of ``RATES`` or ``COUNTS`` with neither is left out.
        after: the same, of the trained weights.
        k_values: which pass@k to show.
        console: None takes standard output.
    """
    table = Table(title="Evaluation before and after training")
    table.add_column("")
    for heading in ("before", "after", "change (points)"):
        table.add_column(heading, justify="right")
    always = {"greedy": "greedy accuracy"} | {f"pass@{k}": f"pass@{k}" for k in k_values}
    for name, label in (always | RATES | COUNTS).items():
        old, new = before.get(EVAL_PREFIX + name), after.get(EVAL_PREFIX + name)
        if old is None and new is None and name not in always:
            continue
        if name in COUNTS:
            table.add_row(label, _count(old), _count(new), "-")  # a number of answers has no percentage points
        else:
            table.add_row(label, _percent(old), _percent(new), _change(old, new))
    (console or Console()).print(table)


def _change(old: float | None, new: float | None) -> str:
    if old is None or new is None:
        return "-"
    points = 100 * (new - old)
    colour = "green" if points > 0 else "red" if points < 0 else "dim"
    return f"[{colour}]{points:+.1f}[/]"


def _count(value: float | None) -> str:
    return "-" if value is None else f"{value:.2f}"


def _percent(value: float | None) -> str:
    return "-" if value is None else f"{value:.1%}"

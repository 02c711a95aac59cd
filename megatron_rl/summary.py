"""The end of a run in a few numbers: ``summary.json`` for programs, a before/after table for people."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from pathlib import Path

from rich.console import Console
from rich.table import Table

from megatron_rl.metrics.rows import EVAL_PREFIX, json_safe, write_atomic


def write_summary(path: Path, summary: Mapping[str, object]) -> None:
    """Write JSON atomically; NaN and infinities become strings, as in ``metrics.jsonl``."""
    write_atomic(path, json.dumps(json_safe(summary), indent=2, allow_nan=False).encode() + b"\n")


def print_before_after(
    before: Mapping[str, float], after: Mapping[str, float], k_values: Sequence[int], *, console: Console | None = None
) -> None:
    """Print greedy accuracy and pass@k before and after training, with the change in percentage points.

    Args:
        before: a row of ``metrics.jsonl``: fractions in [0, 1] under ``eval/greedy`` and ``eval/pass@<k>``; what is not
            there shows as a dash.
        after: the same, of the trained weights.
        k_values: which pass@k to show.
        console: None takes standard output.
    """
    table = Table(title="Evaluation before and after training")
    table.add_column("")
    for heading in ("before", "after", "change (points)"):
        table.add_column(heading, justify="right")
    for name in ("greedy", *(f"pass@{k}" for k in k_values)):
        old, new = before.get(EVAL_PREFIX + name), after.get(EVAL_PREFIX + name)
        change = "-"
        if old is not None and new is not None:
            points = 100 * (new - old)
            colour = "green" if points > 0 else "red" if points < 0 else "dim"
            change = f"[{colour}]{points:+.1f}[/]"
        table.add_row("greedy accuracy" if name == "greedy" else name, _percent(old), _percent(new), change)
    (console or Console()).print(table)


def _percent(value: float | None) -> str:
    return "-" if value is None else f"{value:.1%}"

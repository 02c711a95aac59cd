"""The end of a run in a few numbers: ``summary.json`` for programs, a before/after table for people."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.table import Table

from megatron_rl.files import write_atomic
from megatron_rl.metrics.rows import EVAL_PREFIX, json_safe, set_prefixes

RATES = {
    "keep_rate_greedy": "solved before, still (greedy)",
    "explore_rate_greedy": "failed before, solved (greedy)",
    "keep_rate_any": "solved before, still (any sample)",
    "explore_rate_any": "failed before, solved (any sample)",
    "styles_ge_3": "problems with 3 styles or more",
}
_GENERATED = "rollout/generated_tokens_total"
COUNTS = {"distinct_answers": "distinct answers a problem", "distinct_styles": "distinct styles a problem"}
"""Lines of the table that only some runs have."""


def sum_up(
    directory: Path,
    rows: Sequence[Mapping[str, float]],
    *,
    engine: str,
    k_values: Sequence[int],
    seconds: float,
    origin: str | None,
    is_exported: bool,
    settings: Mapping[str, Any],
) -> None:
    """Write ``summary.json`` of a run, and print its accuracy before and after training.

    Args:
        directory: of the run.
        rows: of ``metrics.jsonl``.
        engine: name of the rollout engine.
        k_values: of pass@k.
        seconds: that this start of the run took.
        origin: the explicit checkpoint that the run began with.
        is_exported: ``hf/`` holds the final weights.
        settings: that the result depends on.
    """
    by_step = {int(row["step"]): row for row in rows}
    last = max(by_step, default=0)
    before, after = by_step.get(0, {}), by_step.get(last, {}) if last else {}
    names: dict[str, str] = {}
    for prefix in set_prefixes((*before, *after)).values():
        of_set = prefix.removeprefix(EVAL_PREFIX)
        names |= {f"{of_set}greedy": f"{prefix}greedy"} | {f"{of_set}pass{k}": f"{prefix}pass@{k}" for k in k_values}
        kept = tuple(prefix + first for first in ("keep_rate", "explore_rate", "distinct", "style"))
        names |= {key.removeprefix(EVAL_PREFIX): key for key in after if key.startswith(kept)}
    summary: dict[str, Any] = {"engine": engine, "steps": last, "origin": origin, "is_exported": is_exported}
    if _GENERATED in after:
        summary["generated_tokens"] = after[_GENERATED]
    for when, row in (("before", before), ("after", after)):
        summary |= {f"{name}_{when}": row[key] for name, key in names.items() if key in row}
    phases = sorted({key for row in rows for key in row if key.startswith("time/")} | {"eval/seconds"})
    summary["seconds_by_phase"] = {key: round(sum(row.get(key, 0.0) for row in rows), 3) for key in phases}
    summary |= {"seconds": round(seconds, 3), "settings": settings}
    write_summary(directory / "summary.json", summary)
    if before and after:
        print_before_after(before, after, k_values)


def write_summary(path: Path, summary: Mapping[str, object]) -> None:
    """Write JSON atomically; NaN and infinities become strings, as in ``metrics.jsonl``."""
    write_atomic(path, json.dumps(json_safe(summary), indent=2, allow_nan=False) + "\n")


def print_before_after(
    before: Mapping[str, float], after: Mapping[str, float], k_values: Sequence[int], *, console: Console | None = None
) -> None:
    """Print greedy accuracy and pass@k before and after training, with the change in percentage points; then diversity.

    Several held-out sets stand below each other, each line with the name of its set.

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
    for set_name, prefix in (set_prefixes((*before, *after)) or {"": EVAL_PREFIX}).items():
        for name, label in (always | RATES | COUNTS).items():
            old, new = before.get(prefix + name), after.get(prefix + name)
            if old is None and new is None and name not in always:
                continue
            label = f"{set_name} {label}".lstrip()
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

"""The results of ``megatron-rl eval`` as a table."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from rich.console import Console
from rich.markup import escape
from rich.table import Table

_LABELS = {"cut_frac": "cut at the limit", "response_length": "tokens of a response"}


def print_results(results: Mapping[str, Any], *, console: Console | None = None) -> None:
    """Print the figures of each set, then those by domain.

    Args:
        results: content of ``results.json``.
        console: None takes standard output.
    """
    out = console or Console()
    for name, found in results["sets"].items():
        title = f"{name}: {found['num_problems']} problems, {found['num_samples']} samples each"
        table = Table(title=title)
        table.add_column("")
        for heading in ("value", "95 % interval", "problems"):
            table.add_column(heading, justify="right")
        for figure, at in found["figures"].items():
            show = _tokens if figure == "response_length" else _percent
            interval = f"{show(at['low'])} to {show(at['high'])}"
            table.add_row(_LABELS.get(figure, figure), show(at["value"]), interval, str(at["num_problems"]))
        out.print(table)
        for column, domains in found["by"].items():
            out.print(_by_domain(f"{name} by {column}", domains))
        if found["dropped"]:
            out.print("left out: " + ", ".join(f"{what} {count}" for what, count in found["dropped"].items()))


def _by_domain(title: str, domains: Mapping[str, Any]) -> Table:
    table = Table(title=escape(title))
    table.add_column("")
    # A domain may lack a figure that others have, where none of its samples could be judged.
    fullest_first = sorted(domains.values(), key=len, reverse=True)
    names = [name for name in dict.fromkeys(name for found in fullest_first for name in found) if name not in _LABELS]
    for heading in ("problems", *names):
        table.add_column(heading, justify="right")
    for value, found in domains.items():
        num_problems = max(at["num_problems"] for at in found.values())
        cells = [_share(found[name]) if name in found else "-" for name in names]
        table.add_row(escape(value) or "(none)", str(num_problems), *cells)
    return table


def _share(at: Mapping[str, float]) -> str:
    return f"{_percent(at['value'])} ({_percent(at['low'])} to {_percent(at['high'])})"


def _percent(value: float) -> str:
    return f"{value:.1%}"


def _tokens(value: float) -> str:
    return f"{value:.1f}"

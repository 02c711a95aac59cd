"""The table of `megatron-rl eval`."""

from __future__ import annotations

import io

from rich.console import Console

from megatron_rl.evaluation.table import print_results


def test_domains_show_as_they_are_named_and_with_every_figure_that_one_has() -> None:
    figure = {"value": 0.5, "low": 0.25, "high": 0.75, "num_problems": 3}
    domains = {"[/easy]": {"cut_frac": figure}, "[red]": {"pass@1": figure, "cut_frac": figure}}
    found = {
        "num_problems": 6,
        "num_samples": 2,
        "figures": {"pass@1": figure},
        "dropped": {},
        "by": {"level": domains},
    }
    out = io.StringIO()
    print_results({"sets": {"set": found}}, console=Console(file=out, width=120))
    lines = out.getvalue().split("set by level")[1].splitlines()
    assert "pass@1" in lines[2]
    assert [line.split() for line in lines if "[" in line] == [
        ["│", "[/easy]", "│", "3", "│", "-", "│"],
        ["│", "[red]", "│", "3", "│", "50.0%", "(25.0%", "to", "75.0%)", "│"],
    ]

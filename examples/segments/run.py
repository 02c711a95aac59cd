"""Is credit for segments worth its tokens? GRPO and SPO from one start, each until it has sampled as many tokens.

    .venv/bin/python -m examples.segments.run [--seed 1]       eight methods, about 20 minutes on two CPU cores

Leaves runs/segments/seed_1/: results.json, results.png (accuracy over tokens and over time), and a run for each method. Run
again after an interruption, it goes on where it stopped.
"""

from __future__ import annotations

import argparse
from itertools import pairwise
from pathlib import Path

from examples.parts import EXAMPLES, Part, rows_of, seconds_of, start, verb, write_report
from megatron_rl.process.lifetime import run

HERE = EXAMPLES / "segments"
NAIVE = ("algorithm.partition.kind=equal", "algorithm.selection.max_probability=null")
METHODS: dict[str, tuple[str, ...]] = {
    "grpo": ("grpo.yaml",),
    "grpo_mask": ("grpo.yaml", "algorithm.selection.max_probability=0.9"),
    "naive_segments": ("chain.yaml", *NAIVE),
    **{f"chain_{interval}": ("chain.yaml", f"algorithm.partition.size={interval}") for interval in (2, 5, 100)},
    "tree_4_4": ("tree.yaml",),
    "tree_6_6": ("tree.yaml", "algorithm.branch_factors=[6,6]", "algorithm.num_prompts_per_step=8"),
}
"""Config and settings of each."""
METRICS = ("eval/avg@4", "eval/avg@8")
"""Accuracy at temperature 1: during a run, and before and after it."""

Point = dict[str, float]


def main() -> int:
    """Run all parts in turn; return the status of the first that fails."""
    parser = argparse.ArgumentParser(description="Segment credit at equal sampled tokens.")
    parser.add_argument("--seed", type=int, default=1)
    parser.add_argument("--only", nargs="*", choices=METHODS, default=list(METHODS))
    arguments = parser.parse_args()
    seed = arguments.seed
    folder = Path("runs/segments") / f"seed_{seed}"
    _, common = start(folder, seed)
    curves: dict[str, list[Point]] = {}
    for method in arguments.only:
        config, *settings = METHODS[method]
        overrides = (*common, f"exp_manager.name={method}", *settings)
        seconds_of(Part(method, verb("train", HERE / config, *overrides), folder / method / "summary.json"))
        curves[method] = curve(folder / method)
    report = {"seed": seed, "methods": {name: summary(points) for name, points in curves.items()}, "curves": curves}
    write_report(folder, report)
    draw(curves, folder / "results.png")
    print_table(report["methods"])
    return 0


def curve(run: Path) -> list[Point]:
    """Return accuracy, tokens sampled so far and seconds of training so far, at each evaluation."""
    points, seconds, tokens = [], 0.0, 0.0
    for row in rows_of(run):
        seconds += row.get("time/step_s", 0.0)
        tokens = row.get("rollout/generated_tokens_total", tokens)
        found = [row[name] for name in METRICS if name in row]
        if found:
            extra = {"greedy": row["eval/greedy"]} if "eval/greedy" in row else {}
            points.append(
                {"step": row["step"], "tokens": tokens, "seconds": round(seconds, 1), "accuracy": found[0]} | extra
            )
    return points


def summary(points: list[Point]) -> Point:
    """Return first, last and best accuracy, and the mean over the tokens spent, which says how fast it rose."""
    pairs = list(pairwise(points))
    spent = points[-1]["tokens"] - points[0]["tokens"]
    area = sum((b["tokens"] - a["tokens"]) * (a["accuracy"] + b["accuracy"]) / 2 for a, b in pairs)
    return {
        "before": points[0]["accuracy"],
        "after": points[-1]["accuracy"],
        "greedy_after": points[-1].get("greedy", float("nan")),
        "best": max(point["accuracy"] for point in points),
        "mean_over_tokens": round(area / spent, 4),
        "tokens": points[-1]["tokens"],
        "seconds": points[-1]["seconds"],
        "steps": points[-1]["step"],
    }


def print_table(methods: dict[str, Point]) -> None:
    """Print the results as a table."""
    from rich.console import Console
    from rich.table import Table

    columns = list(next(iter(methods.values())))
    table = Table("", *columns)
    for method, values in methods.items():
        table.add_row(
            method, *(f"{values[name]:.3f}" if values[name] < 2 else f"{values[name]:.0f}" for name in columns)
        )
    Console(width=120).print(table)


def draw(curves: dict[str, list[Point]], png: Path) -> None:
    """Draw accuracy over tokens, and over seconds."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(12, 4.6), dpi=130, layout="constrained")
    for panel, (key, label) in zip(
        figure.subplots(1, 2, sharey=True),
        (("tokens", "tokens sampled in training"), ("seconds", "seconds of training")),
    ):
        for method, points in curves.items():
            panel.plot(
                [p[key] for p in points], [p["accuracy"] for p in points], marker="o", markersize=3, label=method
            )
        panel.set(xlabel=label)
        panel.grid(alpha=0.25)
    panel.legend()
    figure.axes[0].set_ylabel("held-out accuracy, temperature 1")
    figure.savefig(png)


if __name__ == "__main__":
    run(main)

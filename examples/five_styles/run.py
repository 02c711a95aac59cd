"""Does RL forget styles? A model that answers in five, trained by ten methods: styles and pass@k before and after.

    .venv/bin/python -m examples.five_styles.run [--seed 1]       all methods, about an hour on two CPU cores
    .venv/bin/python -m examples.five_styles.run --quick          four methods and few steps, a quarter of an hour
    .venv/bin/python -m examples.five_styles.run --methods grpo rkl_reward      some of them; the others compare with the first

Leaves runs/five_styles/seed_1/ (quick_1/): results.json, results.png, and a run for each method. Run again after an
interruption, it goes on where it stopped.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from examples.parts import EXAMPLES, Part, rows_of, seconds_of, verb, write_report
from megatron_rl.process.lifetime import run

HERE = EXAMPLES / "five_styles"
KL = 0.02
ERRORS = ("--blind-share", "1.0", "--slip-share", "0.15")
"""Errors of the demonstrations: each style always gets one class of steps wrong."""
METHODS: dict[str, tuple[str, ...]] = {
    "grpo": ("grpo.yaml",),
    "dapo_clip": ("grpo.yaml", "algorithm.ratio_clip_max=0.28"),
    "rkl_k3": ("grpo.yaml", f"algorithm.kl.coef={KL}", "algorithm.kl.estimator=k3"),
    "rkl_k2": ("grpo.yaml", f"algorithm.kl.coef={KL}", "algorithm.kl.estimator=k2"),
    "rkl_reward": (
        "grpo.yaml", f"algorithm.kl.coef={KL}", "algorithm.kl.placement=reward", "algorithm.kl.estimator=k1",
    ),
    "dph_forward": ("dph_rl.yaml", "algorithm.rehearsal.divergence=forward_kl", "algorithm.rehearsal.coef=0.2"),
    "dph_js": ("dph_rl.yaml", "algorithm.rehearsal.divergence=js", "algorithm.rehearsal.coef=0.4"),
} | {
    f"dph_alpha_{alpha}": (
        "dph_rl.yaml", "algorithm.rehearsal.divergence=alpha", f"algorithm.rehearsal.alpha={alpha}",
        "algorithm.rehearsal.coef=0.2",
    )
    for alpha in (0.2, 0.5, 0.8)
}  # fmt: skip
"""Config and settings of each. Coefficients give the divergences the same strength near the start (js curves half as much)."""
QUICK_METHODS = ("grpo", "rkl_k2", "dph_forward", "dph_js")
QUICK = ("trainer.max_steps=25", "eval.num_problems=100")
SHOWN = {
    "greedy": "eval/greedy",
    "pass1": "eval/pass@1",
    "pass16": "eval/pass@16",
    "styles3_share": "eval/styles_ge_3",
    "style_entropy": "eval/style_entropy",
    "keep_any": "eval/keep_rate_any",
    "explore_any": "eval/explore_rate_any",
    "keep_greedy": "eval/keep_rate_greedy",
    "pool_forward_kl": "eval/pool_forward_kl",
}
"""Name in results.json -> metric."""


def main() -> int:
    """Run all parts in turn; return the status of the first that fails."""
    parser = argparse.ArgumentParser(description="The five-style experiment.")
    parser.add_argument("--seed", type=int, default=1)
    parser.add_argument("--quick", action="store_true")
    parser.add_argument("--methods", nargs="+", choices=tuple(METHODS), metavar="METHOD", help=", ".join(METHODS))
    arguments = parser.parse_args()
    folder = Path("runs/five_styles") / f"{'quick' if arguments.quick else 'seed'}_{arguments.seed}"
    common = (f"exp_manager.exp_dir={folder}", f"trainer.seed={arguments.seed}")
    methods = tuple(arguments.methods or (QUICK_METHODS if arguments.quick else METHODS))
    short = QUICK if arguments.quick else ()

    seconds = {part.name: seconds_of(part) for part in preparation(folder, common, arguments.seed)}
    results: dict[str, Any] = {}
    for method in methods:
        config, *settings = METHODS[method]
        # The first one evaluates the base, too; the others are compared with that.
        base = folder / methods[0] / "eval" / "step_00000000.json"
        first = ("eval.before=true",) if method == methods[0] else (f"eval.baseline={base}",)
        overrides = (*common, f"exp_manager.name={method}", *settings, *short, *first)
        done = folder / method / "summary.json"
        seconds[method] = seconds_of(Part(method, verb("train", HERE / config, *overrides), done))
        rows = rows_of(folder / method)
        if method == methods[0]:
            results["base"] = shown(rows[0])
        results[method] = shown(rows[-1])
    report = {
        "seed": arguments.seed,
        "methods": results,
        "seconds": seconds,
        "total_seconds": round(sum(seconds.values())),
    }
    write_report(folder, report)
    draw(results, folder / "results.png")
    print_table(results)
    print(f"{report['total_seconds']} s in all. Look at {folder}/results.png; figures are in {folder}/results.json.")
    return 0


def preparation(folder: Path, common: tuple[str, ...], seed: int) -> list[Part]:
    """Return the parts that make problems, the model of five styles, and its own samples."""
    make = [sys.executable, "-m", "examples.five_styles.make_data", str(folder / "data"), "--seed", str(seed), *ERRORS]
    warm_start = verb("train", HERE / "warm_start.yaml", *common)
    presample = verb("presample", HERE / "dph_rl.yaml", *common, "exp_manager.name=samples")
    return [
        Part("problems", make, folder / "data" / "model" / "config.json"),
        Part("warm start", warm_start, folder / "warm_start" / "summary.json"),
        Part("presample", presample, folder / "samples" / "presample" / "summary.json"),
    ]


def shown(row: Mapping[str, float]) -> dict[str, float]:
    """Return the report's figures of an evaluation."""
    styles = {key.removeprefix("eval/"): value for key, value in row.items() if key.startswith("eval/style/")}
    return {name: round(row[key], 4) for name, key in SHOWN.items() if key in row} | {
        key: round(value, 4) for key, value in styles.items()
    }


def print_table(results: Mapping[str, Mapping[str, float]]) -> None:
    """Print the results as a table."""
    from rich.console import Console
    from rich.table import Table

    table = Table("", *SHOWN)
    for method, values in results.items():
        table.add_row(method, *(f"{values[name]:.3f}" if name in values else "" for name in SHOWN))
    Console(width=120).print(table)


def draw(results: Mapping[str, Mapping[str, float]], png: Path) -> None:
    """Draw accuracy against diversity, a point for each method, and the styles that each method keeps."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(12, 4.6), dpi=130, layout="constrained")
    plane, bars = figure.subplots(1, 2)
    for method, values in results.items():
        plane.plot(values["greedy"], values["pass16"], "o", markersize=8)
        plane.annotate(
            method, (values["greedy"], values["pass16"]), xytext=(5, 4), textcoords="offset points", fontsize=8
        )
    plane.set(xlabel="greedy accuracy", ylabel="pass@16", title="Accuracy and coverage")
    plane.grid(alpha=0.25)
    names = sorted({key for values in results.values() for key in values if key.startswith("style/")})
    left = [0.0] * len(results)
    for name in names:
        widths = [values.get(name, 0.0) for values in results.values()]
        bars.barh(list(results), widths, left=left, label=name.removeprefix("style/"))
        left = [a + b for a, b in zip(left, widths)]
    bars.invert_yaxis()
    bars.set(xlabel="share of samples", title="Styles")
    bars.legend(fontsize=8, ncols=len(names) or 1, loc="upper center", bbox_to_anchor=(0.5, -0.12))
    figure.savefig(png)


if __name__ == "__main__":
    run(main)

"""Does training in eight bits learn as well? GRPO in bfloat16, and with emulated FP8, from one start.

    .venv/bin/python -m examples.fp8.run [--seeds 1 2 3] [--recipes tensorwise blockwise]

About twelve minutes a seed on two CPU cores with units for bfloat16. Leaves in runs/fp8/ results.json (accuracy on 600 held-out
problems, and its difference from bfloat16 with the interval of a paired bootstrap: of each seed, and of all), and in seed_N/
curves.png (loss, gradient norm and reward side by side) and a run for each. Run again after an interruption, it goes on where
it stopped.

``bf16_again`` is bfloat16 once more, other rollouts drawn: what chance alone makes of a run.
"""

from __future__ import annotations

import argparse
import json
from pathlib import Path
from typing import Any

import numpy as np

from examples.parts import EXAMPLES, Part, rows_of, seconds_of, start, verb, write_report
from megatron_rl.process.lifetime import run

HERE = EXAMPLES / "fp8"
FOLDER = Path("runs/fp8")
RECIPES = ("tensorwise", "blockwise", "delayed", "mxfp8")
RESAMPLES = 10_000
CURVES = {"loss": "loss", "grad_norm": "gradient norm", "reward/mean": "reward"}
KINDS = ("greedy", "pass1")
OTHER_ROLLOUTS = 1000
"""Added to the seed of ``bf16_again``."""


def main() -> int:
    """Run all parts in turn; return the status of the first that fails."""
    parser = argparse.ArgumentParser(description="FP8 against bfloat16.")
    parser.add_argument("--seeds", type=int, nargs="+", default=[1])
    parser.add_argument("--recipes", nargs="+", choices=RECIPES, default=list(RECIPES[:2]))
    arguments = parser.parse_args()
    runs = {name: fp8(name) for name in arguments.recipes}
    for seed in arguments.seeds:
        train(seed, {"bf16": (), "bf16_again": (f"trainer.seed={seed + OTHER_ROLLOUTS}",), **runs})
    report: dict[str, Any] = {"seeds": arguments.seeds}
    for name in ("bf16", "bf16_again", *runs):
        report[name] = {kind: compared(name, kind, arguments.seeds) for kind in KINDS} | errors(name, arguments.seeds)
    write_report(FOLDER, report)
    print(json.dumps(report, indent=1))
    return 0


def train(seed: int, runs: dict[str, tuple[str, ...]]) -> None:
    """Run all runs of a seed, from one start, and draw their curves."""
    folder = FOLDER / f"seed_{seed}"
    _, common = start(folder, seed, num_held_out=600)
    for name, settings in runs.items():
        command = verb("train", HERE / "grpo.yaml", *common, f"exp_manager.name={name}", *settings)
        seconds_of(Part(name, command, folder / name / "summary.json"))
    draw({name: rows_of(folder / name) for name in runs}, folder / "curves.png")


def fp8(recipe: str) -> tuple[str, ...]:
    """Return the settings of a recipe: gradients in e5m2, unless blocks have scales of their own."""
    kind = "hybrid" if recipe in ("tensorwise", "delayed") else "e4m3"
    return (f"policy.megatron_cfg.fp8={kind}", f"policy.megatron_cfg.fp8_recipe={recipe}")


def compared(name: str, kind: str, seeds: list[int]) -> dict[str, Any]:
    """Compare the accuracy of each seed's last evaluation with that of bfloat16, over the problems that both could judge."""
    mine, base = ([accuracies(FOLDER / f"seed_{seed}" / run)[kind] for seed in seeds] for run in (name, "bf16"))
    differences = [(a - b)[~np.isnan(a - b)] for a, b in zip(mine, base, strict=True)]
    found = {
        "accuracy": [round(float(np.nanmean(values)), 4) for values in mine],
        "difference": [round(float(values.mean()), 4) for values in differences],
        "interval_95": [interval([values]) for values in differences],
    }
    return found | {
        "mean_difference": round(float(np.mean([values.mean() for values in differences])), 4),
        "mean_interval_95": interval(differences),
    }


def errors(name: str, seeds: list[int]) -> dict[str, float]:
    """Return means over the steps of all seeds: the distance of the trainer's log-probs from those of the bfloat16 rollouts;
    and, for FP8 runs, the error of a layer's output."""
    rows = [row for seed in seeds for row in rows_of(FOLDER / f"seed_{seed}" / name)]
    keys = {"log_prob_abs_diff": "mismatch/log_prob_abs_diff"}
    if name in RECIPES:
        keys["output_error"] = "numerics/output_error_mean"
    return {short: round(float(np.mean([row[key] for row in rows if key in row])), 5) for short, key in keys.items()}


def accuracies(run: Path) -> dict[str, np.ndarray]:
    """Return, by kind of decoding, one number for each problem, in the order of their ids; NaN where none could be judged."""
    last = sorted((run / "eval").glob("step_*.json"))[-1]
    results = json.loads(last.read_text())
    problems = sorted(results["problems"], key=lambda problem: problem["problem_id"])
    return {
        "greedy": np.array([problem["is_greedy_correct"] for problem in problems], dtype=float),
        "pass1": np.array([problem["num_correct"] / (problem["num_samples"] or np.nan) for problem in problems]),
    }


def interval(differences: list[np.ndarray]) -> list[float]:
    """Return the 2.5 % and 97.5 % points of the mean over seeds, with each seed's problems drawn again with replacement."""
    generator = np.random.default_rng(0)
    drawn = [
        values[generator.integers(0, len(values), (RESAMPLES, len(values)))].mean(axis=1) for values in differences
    ]
    return [round(float(point), 4) for point in np.percentile(np.mean(drawn, axis=0), (2.5, 97.5))]


def draw(runs: dict[str, list[dict[str, Any]]], png: Path) -> None:
    """Draw the curves of all runs, one panel for each kind."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(13, 3.8), dpi=130, layout="constrained")
    for panel, (key, label) in zip(figure.subplots(1, len(CURVES)), CURVES.items(), strict=True):
        for name, rows in runs.items():
            points = [(row["step"], row[key]) for row in rows if key in row]
            panel.plot(*zip(*points), label=name, linewidth=1.2)
        panel.set(xlabel="training step", ylabel=label)
        panel.grid(alpha=0.25)
    panel.legend()
    figure.savefig(png)


if __name__ == "__main__":
    run(main)

"""Does training in eight bits learn as well? GRPO in bfloat16, and with emulated FP8, from one start.

    .venv/bin/python examples/fp8/run.py [--seed 1] [--recipes tensorwise blockwise]

Leaves runs/fp8/seed_1/: results.json (accuracy on 600 held-out problems, and its difference from bfloat16 with the interval of
a paired bootstrap), curves.png (loss, gradient norm and reward side by side), and a run for each. Run again after an
interruption, it goes on where it stopped.
"""

from __future__ import annotations

import argparse
import json
import sys
from pathlib import Path
from typing import Any

import numpy as np

sys.path.insert(0, str(Path(__file__).parent.parent))
from parts import ROOT, Part, seconds_of, start, verb

HERE = Path(__file__).parent
RECIPES = ("tensorwise", "blockwise", "delayed", "mxfp8")
RESAMPLES = 10_000
CURVES = {"loss": "loss", "grad_norm": "gradient norm", "reward/mean": "reward"}


def main() -> int:
    """All parts in turn; the status of the first that fails."""
    parser = argparse.ArgumentParser(description="FP8 against bfloat16.")
    parser.add_argument("--seed", type=int, default=1)
    parser.add_argument("--recipes", nargs="+", choices=RECIPES, default=list(RECIPES[:2]))
    arguments = parser.parse_args()
    seed = arguments.seed
    folder = Path("runs/fp8") / f"seed_{seed}"
    _, common = start(folder, seed, num_held_out=600)
    runs = {"bf16": (), **{recipe: fp8(recipe) for recipe in arguments.recipes}}
    for name, settings in runs.items():
        command = verb("train", HERE / "grpo.yaml", *common, f"exp_manager.name={name}", *settings)
        seconds_of(Part(name, command, folder / name / "summary.json"))
    report = {"seed": seed, "methods": {name: compared(folder, name) for name in runs}}
    (ROOT / folder / "results.json").write_text(json.dumps(report, indent=1) + "\n")
    draw({name: rows_of(folder / name) for name in runs}, ROOT / folder / "curves.png")
    print(json.dumps(report, indent=1))
    return 0


def fp8(recipe: str) -> tuple[str, ...]:
    """Settings of a recipe: gradients in e5m2, but not where blocks have scales of their own."""
    kind = "hybrid" if recipe in ("tensorwise", "delayed") else "e4m3"
    return (f"policy.megatron_cfg.fp8={kind}", f"policy.megatron_cfg.fp8_recipe={recipe}")


def compared(folder: Path, name: str) -> dict[str, Any]:
    """Accuracy of a run's last evaluation; and how far it is from bfloat16's, problem by problem."""
    mine, base = (accuracies(folder / run) for run in (name, "bf16"))
    found: dict[str, Any] = {}
    for kind, values in mine.items():
        difference, low, high = paired_bootstrap(values - base[kind])
        found[kind] = {
            "accuracy": round(float(values.mean()), 4),
            "difference": difference,
            "interval_95": [low, high],
            "num_problems": len(values),
        }
    rows = rows_of(folder / name)
    watched = [row for row in rows if "numerics/output_error_mean" in row]
    found["output_error_mean"] = round(float(np.mean([row["numerics/output_error_mean"] for row in watched])), 4)
    found["log_prob_abs_diff"] = round(
        float(np.mean([r["mismatch/log_prob_abs_diff"] for r in rows if "loss" in r])), 5
    )
    return found


def accuracies(run: Path) -> dict[str, np.ndarray]:
    """By kind of decoding, one number a problem, in the order of their ids."""
    last = sorted((ROOT / run / "eval").glob("step_*.json"))[-1]
    results = json.loads(last.read_text())
    problems = sorted(results["problems"], key=lambda problem: problem["problem_id"])
    return {
        "greedy": np.array([float(problem["is_greedy_correct"]) for problem in problems]),
        "pass1": np.array([problem["num_correct"] / results["num_samples"] for problem in problems]),
    }


def paired_bootstrap(differences: np.ndarray) -> tuple[float, float, float]:
    """Mean, and the 2.5 % and 97.5 % points of the means of problems drawn again with replacement."""
    draws = np.random.default_rng(0).integers(0, len(differences), (RESAMPLES, len(differences)))
    low, high = np.percentile(differences[draws].mean(axis=1), (2.5, 97.5))
    return round(float(differences.mean()), 4), round(float(low), 4), round(float(high), 4)


def rows_of(run: Path) -> list[dict[str, Any]]:
    """A run's metrics."""
    return [json.loads(line) for line in (ROOT / run / "metrics.jsonl").read_text().splitlines()]


def draw(runs: dict[str, list[dict[str, Any]]], png: Path) -> None:
    """Curves of all runs, one panel for each kind."""
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
    sys.exit(main())

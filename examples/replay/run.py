"""Does replaying successes make RL faster? GRPO, then RLEP from the same start with GRPO's own successes.

    .venv/bin/python -m examples.replay.run [--seed 1]       about ten minutes on two CPU cores

Leaves runs/replay/seed_1/: results.json, results.png, and the runs phase1 (the baseline) and phase2 (RLEP). Run again after an
interruption, it goes on where it stopped.
"""

from __future__ import annotations

import argparse
import json
from pathlib import Path
from typing import Any

from examples.parts import EXAMPLES, Part, rows_of, seconds_of, start, verb, write_report
from megatron_rl.process.lifetime import run

HERE = EXAMPLES / "replay"
METRIC = "eval/avg@4"
"""Accuracy at temperature 1, every five steps."""


def main() -> int:
    """Run all parts in turn; return the status of the first that fails."""
    parser = argparse.ArgumentParser(description="RLEP against its own phase 1.")
    parser.add_argument("--seed", type=int, default=1)
    seed = parser.parse_args().seed
    folder = Path("runs/replay") / f"seed_{seed}"
    seconds, common = start(folder, seed)
    collect = (*common, f"policy.model_path={folder}/phase1/hf", "exp_manager.name=samples")
    successes = folder / "samples" / "presample" / "summary.json"
    parts = (
        Part("phase 1", verb("train", HERE / "grpo.yaml", *common), folder / "phase1" / "summary.json"),
        Part("successes", verb("presample", HERE / "rlep.yaml", *collect), successes),
        Part("phase 2", verb("train", HERE / "rlep.yaml", *common), folder / "phase2" / "summary.json"),
    )
    seconds |= {part.name: seconds_of(part) for part in parts}
    curves = {name: curve(folder / name) for name in ("phase1", "phase2")}
    report = compare(curves) | {"seed": seed, "seconds": seconds, "curves": curves}
    write_report(folder, report)
    draw(curves, folder / "results.png")
    print(json.dumps({key: value for key, value in report.items() if key != "curves"}, indent=1))
    return 0


def curve(run: Path) -> list[tuple[int, float]]:
    """Return (step, accuracy) of each evaluation with four samples or more; the first and last have eight."""
    rows = rows_of(run)
    names = (METRIC, "eval/avg@8")
    return [
        (row["step"], next(row[name] for name in names if name in row)) for row in rows if any(n in row for n in names)
    ]


def compare(curves: dict[str, list[tuple[int, float]]]) -> dict[str, Any]:
    """Return the best and final accuracy of each, and the step at which each first reached phase 1's best."""
    best = max(accuracy for _, accuracy in curves["phase1"])
    found: dict[str, Any] = {"baseline_best": best}
    for name, points in curves.items():
        reached = next((step for step, accuracy in points if accuracy >= best), None)
        found[name] = {"best": max(a for _, a in points), "final": points[-1][1], "steps_to_baseline_best": reached}
    return found


def draw(curves: dict[str, list[tuple[int, float]]], png: Path) -> None:
    """Draw accuracy over steps."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(7, 4.4), dpi=130, layout="constrained")
    panel = figure.subplots()
    for name, points in curves.items():
        panel.plot(*zip(*points), marker="o", markersize=4, label=name)
    panel.set(xlabel="training step", ylabel="held-out accuracy, temperature 1")
    panel.grid(alpha=0.25)
    panel.legend()
    figure.savefig(png)


if __name__ == "__main__":
    run(main)

"""Watch a language model learn by reinforcement on two CPU cores: data, supervised warm start, GRPO, evaluation.

    make quickstart                    (or: .venv/bin/python examples/quickstart/run.py)
    make quickstart ENGINE=sglang      the same from a real SGLang server; fewer steps, because it is slower on a CPU

Leaves runs/quickstart/ (runs/quickstart_sglang/): summary.json, metrics.jsonl, curves.png, the resolved config, a resumable
checkpoint, and hf/. Run again after an interruption, it goes on where it stopped.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

HERE = Path(__file__).parent
ROOT = HERE.parent.parent
RUNS = Path("runs")
START = RUNS / "quickstart"
"""Data and warm start, whatever the engine."""
PROBLEMS = (
    f"{START}/data --num-warm-start 32000 --num-train 4000 --num-held-out 300"
    " --slip-share 0.3 --forgotten-carry-share 0.6"
).split()
"""Slips make demonstrations that are right in the middle and wrong at the edges, which is what RL sharpens; carries that are
forgotten more often than not make the middle itself wrong, which is what RL moves."""
SGLANG = ("rollout.engine=sglang", "exp_manager.name=quickstart_sglang", "trainer.max_steps=40")


@dataclass(frozen=True)
class Part:
    """One command, done when its result exists."""

    name: str
    command: Sequence[str]
    result: Path


def main() -> int:
    """Run the three parts in turn; the status of the first that fails."""
    parser = argparse.ArgumentParser(description="The quickstart.")
    parser.add_argument("--engine", choices=("transformers", "sglang"), default="transformers")
    uses_sglang = parser.parse_args().engine == "sglang"
    run = RUNS / "quickstart_sglang" if uses_sglang else START
    parts = (
        Part("problems", [sys.executable, "tools/make_word_problems.py", *PROBLEMS], START / "data" / "model"),
        Part("warm start", train("warm_start.yaml"), START / "warm_start" / "hf"),
        Part("reinforcement", train("grpo.yaml", *(SGLANG if uses_sglang else ())), run / "hf"),
    )
    seconds = {part.name: seconds_of(part) for part in parts}
    summary = json.loads((ROOT / run / "summary.json").read_text()) | {"seconds_of_parts": seconds}
    summary["seconds"] = round(sum(seconds.values()), 1)
    (ROOT / run / "summary.json").write_text(json.dumps(summary, indent=2) + "\n")
    print(f"{summary['seconds']:.0f} s in all. Look at {run}/curves.png; the model is in {run}/hf.", flush=True)
    return 0


def seconds_of(part: Part) -> float:
    """Run a part that is not done yet; the seconds that it took, over all interruptions. Leaves the program if it fails."""
    path = ROOT / part.result.parent / f".seconds_of_{part.name.replace(' ', '_')}"
    before = float(path.read_text()) if path.exists() else 0.0
    if (ROOT / part.result).exists():
        print(f"== {part.name}: {part.result} is there already", flush=True)
        return before
    print(f"== {part.name}", flush=True)
    started = time.monotonic()
    status = subprocess.run(part.command, cwd=ROOT, check=False).returncode
    total = round(before + time.monotonic() - started, 1)
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(str(total))
    if status:
        sys.exit(status)
    return total


def train(config: str, *overrides: str) -> list[str]:
    """The documented way to start, as a command."""
    path = HERE.relative_to(ROOT) / config
    return [sys.executable, "-m", "megatron_rl.cli", "train", str(path), *overrides]


if __name__ == "__main__":
    sys.exit(main())

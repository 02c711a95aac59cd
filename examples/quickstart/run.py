"""Watch a language model learn by reinforcement on two CPU cores: data, supervised warm start, GRPO, evaluation.

    make quickstart            (or: .venv/bin/python examples/quickstart/run.py)

Leaves runs/quickstart/: summary.json, metrics.jsonl, curves.png, the resolved config, a resumable checkpoint, and hf/.
Run again after an interruption, it goes on where it stopped.
"""

from __future__ import annotations

import json
import subprocess
import sys
import time
from pathlib import Path

HERE = Path(__file__).parent
ROOT = HERE.parent.parent
RUN = Path("runs/quickstart")
PROBLEMS = f"{RUN}/data --num-warm-start 32000 --num-train 4000 --num-held-out 300 --slip-share 0.35".split()
"""Slips make demonstrations that are right in the middle and wrong at the edges: what RL then sharpens."""


def main() -> int:
    """Run the three parts in turn; the status of the first that fails."""
    started = time.monotonic()
    parts = (
        ("problems", [sys.executable, "tools/make_word_problems.py", *PROBLEMS], RUN / "data" / "model"),
        ("warm start", train("warm_start.yaml"), RUN / "warm_start" / "hf"),
        ("reinforcement", train("grpo.yaml"), RUN / "hf"),
    )
    seconds = {}
    for name, command, result in parts:
        if (ROOT / result).exists():
            print(f"== {name}: {result} is there already", flush=True)
            continue
        print(f"== {name}", flush=True)
        part_started = time.monotonic()
        status = subprocess.run(command, cwd=ROOT, check=False).returncode
        if status:
            return status
        seconds[name] = round(time.monotonic() - part_started, 1)
    path = ROOT / RUN / "summary.json"
    summary = json.loads(path.read_text()) | {"seconds_of_parts": seconds}
    summary["seconds"] = round(time.monotonic() - started, 1)
    path.write_text(json.dumps(summary, indent=2) + "\n")
    print(f"{summary['seconds']:.0f} s in all. Look at {RUN}/curves.png; the model is in {RUN}/hf.", flush=True)
    return 0


def train(config: str) -> list[str]:
    """The documented way to start, as a command."""
    path = HERE.relative_to(ROOT) / config
    return [sys.executable, "-m", "megatron_rl.cli", "train", str(path)]


if __name__ == "__main__":
    sys.exit(main())

"""Watch a language model learn by reinforcement on two CPU cores, or up to two GPUs: data, warm start, GRPO, evaluation.

    make quickstart                    (or: .venv/bin/python -m examples.quickstart.run)
    make quickstart ENGINE=sglang      the same from a real SGLang server; fewer steps, because it is slower on a CPU

Leaves runs/quickstart/ (runs/quickstart_sglang/): summary.json, metrics.jsonl, curves.png, the resolved config, a resumable
checkpoint, and hf/. Run again after an interruption, it goes on where it stopped.
"""

from __future__ import annotations

import argparse
import json
import sys
from pathlib import Path

from examples.parts import EXAMPLES, Part, seconds_of, verb
from megatron_rl.files import write_atomic
from megatron_rl.process.lifetime import run

HERE = EXAMPLES / "quickstart"
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


def of_machine(num_gpus: int, *, uses_sglang: bool = False) -> list[str]:
    """Return the overrides for a machine: on a CPU none, for the files are made for that.

    Args:
        num_gpus: that torch sees.
        uses_sglang: rollouts come from servers: on GPUs one on each of the trainer's, so that one GPU is enough.
    """
    if num_gpus == 0:
        return []
    devices = min(2, num_gpus)
    found = [f"trainer.devices={devices}", "trainer.precision=bf16"]
    if uses_sglang:
        found += ["rollout.servers.placement=colocated", f"rollout.servers.num_per_node={devices}"]
    return found


def main() -> int:
    """Run the three parts in turn; return the status of the first that fails."""
    import torch

    parser = argparse.ArgumentParser(description="The quickstart.")
    parser.add_argument("--engine", choices=("transformers", "sglang"), default="transformers")
    uses_sglang = parser.parse_args().engine == "sglang"
    run = RUNS / "quickstart_sglang" if uses_sglang else START
    problems = [sys.executable, "tools/make_word_problems.py", *PROBLEMS]
    num_gpus = torch.cuda.device_count()
    served = (*SGLANG, *of_machine(num_gpus, uses_sglang=True))
    grpo = verb("train", HERE / "grpo.yaml", *(served if uses_sglang else of_machine(num_gpus)))
    parts = (
        Part("problems", problems, START / "data" / "model" / "config.json"),
        Part(
            "warm start",
            verb("train", HERE / "warm_start.yaml", *of_machine(num_gpus)),
            START / "warm_start" / "summary.json",
        ),
        Part("reinforcement", grpo, run / "summary.json"),
    )
    seconds = {part.name: seconds_of(part) for part in parts}
    summary = json.loads((run / "summary.json").read_text()) | {"seconds_of_parts": seconds}
    summary["seconds"] = round(sum(seconds.values()), 1)
    write_atomic(run / "summary.json", json.dumps(summary, indent=2) + "\n")
    print(f"{summary['seconds']:.0f} s in all. Look at {run}/curves.png; the model is in {run}/hf.", flush=True)
    return 0


if __name__ == "__main__":
    run(main)

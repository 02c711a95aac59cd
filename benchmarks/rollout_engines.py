"""The server engine against the in-process one, on the quickstart's model and batch (32 prompts, 8 rollouts each), on a CPU.

    generate_ratio   response tokens per second of generation, sglang over transformers
    step_ratio       the same of whole training steps
    start_ratio      seconds from the command to the first step, sglang over transformers

Both run the documented command with the same two ranks and weights, in turn, three times; ratios are of medians. Steps after
the first count. The weights are random, so nearly all responses have the full 48 tokens, and lengths do not differ.
"""

from __future__ import annotations

import json
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path

ROOT = Path(__file__).parent.parent
ENGINES = ("transformers", "sglang")
REPEATS, STEPS = 3, 5


def main() -> None:
    """Measure, print the table, and the figures as one line of JSON."""
    seen: dict[str, list[dict[str, float]]] = {engine: [] for engine in ENGINES}
    with tempfile.TemporaryDirectory() as folder:
        problems = [sys.executable, "tools/make_word_problems.py", f"{folder}/data"]
        problems += ["--num-warm-start", "10", "--num-train", "400", "--num-held-out", "10"]
        subprocess.run(problems, cwd=ROOT, check=True, stdout=subprocess.DEVNULL)
        for repeat in range(REPEATS):
            for engine in ENGINES:
                seen[engine].append(measure(engine, Path(folder), f"{engine}_{repeat}"))
                print(engine, seen[engine][-1], flush=True)
    median = {e: {key: statistics.median(run[key] for run in seen[e]) for key in seen[e][0]} for e in ENGINES}
    print("\n| | in process | server |\n| --- | --- | --- |")
    for key in median["sglang"]:
        print(f"| {key} | {median['transformers'][key]:.4g} | {median['sglang'][key]:.4g} |")
    ratios = {
        name: round(median["sglang"][key] / median["transformers"][key], 3)
        for name, key in (
            ("generate_ratio", "generated tokens per s"),
            ("step_ratio", "trained response tokens per s of step"),
            ("start_ratio", "s from command to first step"),
        )
    }
    print(
        json.dumps(ratios | {f"{engine}_{key}": value for engine in ENGINES for key, value in median[engine].items()})
    )


def measure(engine: str, folder: Path, name: str) -> dict[str, float]:
    """One short run."""
    command = [sys.executable, "-m", "megatron_rl.commands.cli", "train", "examples/quickstart/grpo.yaml"]
    command += [f"rollout.engine={engine}", f"trainer.max_steps={STEPS}", "policy.initialization=random"]
    command += [
        f"policy.model_path={folder}/data/model",
        f"data.train={folder}/data/train.jsonl",
        "data.validation=null",
    ]
    command += ["eval.before=false", "eval.after=false", "eval.every_n_steps=0", "exp_manager.export_hf=false"]
    command += [
        "exp_manager.create_checkpoint_callback=false",
        f"exp_manager.exp_dir={folder}",
        f"exp_manager.name={name}",
    ]
    started = time.monotonic()
    with subprocess.Popen(command, cwd=ROOT, stdout=subprocess.DEVNULL) as process:
        path = folder / name / "metrics.jsonl"
        while not (path.exists() and path.read_text().endswith("\n")):
            if process.poll() is not None:
                raise RuntimeError(f"{engine} ended with status {process.returncode} before its first step was done")
            time.sleep(0.02)
        until_row_s = time.monotonic() - started
    rows = [json.loads(line) for line in path.read_text().splitlines()]
    counted = rows[1:]
    tokens = sum(row["num_response_tokens"] for row in counted)
    return {
        "s from command to first step": until_row_s - rows[0]["time/step_s"],
        "s of generation a step": statistics.mean(row["time/generation_s"] for row in counted),
        "generated tokens per s": tokens / sum(row["time/generation_s"] for row in counted),
        "s of weight sync a step": statistics.mean(row["time/weight_sync_s"] for row in counted),
        "trained response tokens per s of step": tokens / sum(row["time/step_s"] for row in counted),
    }


if __name__ == "__main__":
    main()

"""Checkpoints written behind training, against checkpoints that it waits for.

    waited_ratio   seconds that a run waits for a checkpoint, behind over waited for
    step_ratio     seconds of the step during which a checkpoint is written, over those of a step of the waiting run
    whole_ratio    seconds of all steps and checkpoints, behind over waited for

Supervised runs of one rank and one thread with a model of 40 M parameters, 0.6 GB a checkpoint; in turn, three times. Ratios
are of medians; ``whole_ratio`` is of sums. On one core, writing takes from training what it does not wait for.
"""

from __future__ import annotations

import json
import os
import statistics
import subprocess
import sys
import tempfile
from pathlib import Path

ROWS, STEPS, EVERY, REPEATS = 16, 13, 4, 3


def main() -> None:
    """Run both ways in turn and print their ratios."""
    from megatron_rl.tasks.word_problems import generate, write_rows
    from megatron_rl.tasks.word_tokenizer import ModelSize, save_model

    waited: dict[bool, list[float]] = {False: [], True: []}
    steps: dict[bool, list[float]] = {False: [], True: []}
    whole = {False: 0.0, True: 0.0}
    with tempfile.TemporaryDirectory() as folder:
        root = Path(folder)
        save_model(root / "model", ModelSize(hidden_size=640, num_layers=8, num_heads=10, num_kv_heads=2))
        write_rows(root / "rows.jsonl", generate(ROWS * STEPS, seed=1))
        for repeat in range(REPEATS):
            for is_behind in (False, True):
                rows = run(root, f"{'behind' if is_behind else 'waiting'}_{repeat}", is_behind)
                waits = [row["time/checkpoint_s"] for row in rows if "time/checkpoint_s" in row]
                waited[is_behind].append(sum(waits) / ((STEPS - 1) // EVERY))
                steps[is_behind] += [row["time/step_s"] for row in rows[EVERY :: EVERY if is_behind else 1]]
                whole[is_behind] += sum(row["time/step_s"] for row in rows[1:]) + sum(waits)
                print(f"{'behind' if is_behind else 'waited for'}: {waited[is_behind][-1]:.2f} s waited", flush=True)
    median = {name: (statistics.median(waited[name]), statistics.median(steps[name])) for name in waited}
    figures = {
        "waited_ratio": round(median[True][0] / median[False][0], 3),
        "step_ratio": round(median[True][1] / median[False][1], 3),
        "whole_ratio": round(whole[True] / whole[False], 3),
        "waited_s": round(median[False][0], 3),
    }
    print(json.dumps(figures))


def run(root: Path, name: str, is_behind: bool) -> list[dict[str, float]]:
    """Train, and return the rows of metrics."""
    config = Path(__file__).parent.parent / "examples/quickstart/warm_start.yaml"
    settings = [
        f"policy.model_path={root}/model",
        f"data.train={root}/rows.jsonl",
        "trainer.devices=1",
        "policy.optim.sched={name: constant, warmup_updates: 0}",
        f"trainer.max_steps={STEPS}",
        f"policy.train_global_batch_size={ROWS}",
        f"exp_manager.exp_dir={root}",
        f"exp_manager.name={name}",
        "exp_manager.export_hf=false",
        f"exp_manager.checkpoint_callback_params.every_n_train_steps={EVERY}",
        f"exp_manager.checkpoint_callback_params.async_save={str(is_behind).lower()}",
    ]
    command = [sys.executable, "-m", "megatron_rl.train", "--config", str(config), *settings]
    subprocess.run(command, check=True, stdout=subprocess.DEVNULL, env=os.environ | {"OMP_NUM_THREADS": "1"})
    return [json.loads(line) for line in (root / name / "metrics.jsonl").read_text().splitlines()]


if __name__ == "__main__":
    main()

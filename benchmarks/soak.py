"""Memory over time: thousands of short steps of a tiny model, and the growth of every process of the run.

    python benchmarks/soak.py [--steps 2000] [--engine transformers|sglang] [--ranks 2] [--samples samples.jsonl]

A reference, checkpoints, evaluations and scoring workers take part. The resident memory of all processes is sampled every
few seconds. Its slope, by kind of process, is the Theil-Sen estimate (the median slope of all pairs of samples) over the
steps after the warm-up. The last line is one line of JSON, with what the run has left in the folder for temporary files and
in /dev/shm; the exit status is 1 where a kind of process grows by more than 1 MB in 100 steps.
"""

from __future__ import annotations

import argparse
import itertools
import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from collections import defaultdict
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

import psutil

WARM_UP = 0.25
"""Share of the steps that is not fitted: caches fill, and the heap finds its size."""
MOST_MB_PER_100_STEPS = 1.0
SHARED_MEMORY = Path("/dev/shm")
CONFIG = """
trainer: {stage: rl, precision: fp32, seed: 7, accelerator: cpu, threads_per_rank: 1}
exp_manager: {name: soak, checkpoint_callback_params: {every_n_train_steps: 50, keep_last: 2}}
policy: {optim: {lr: 1.0e-4}, train_global_batch_size: 16, train_micro_batch_tokens: 512}
rollout: {temperature: 1.0, max_new_tokens: 12}
algorithm: {name: grpo, num_prompts_per_step: 4, num_generations_per_prompt: 4, kl: {coef: 0.01, estimator: k2}}
data: {task: word_problems, num_scoring_workers: 1}
eval: {every_n_steps: 100, num_samples: 2, num_samples_during: 2, k_values: [1, 2]}
"""
"""The model answers nothing rightly: the reference's term is what it learns from."""


class Use(NamedTuple):
    """Resources that all processes of one kind hold together."""

    megabytes: float = 0.0
    """Resident, 10^6 bytes each."""
    files: int = 0
    threads: int = 0

    def plus(self, process: psutil.Process) -> Use:
        """Return the sum with another process."""
        return Use(
            self.megabytes + process.memory_info().rss / 1e6,
            self.files + process.num_fds(),
            self.threads + process.num_threads(),
        )


class Sample(NamedTuple):
    """The uses of all kinds of process, by kind, after some steps."""

    step: int
    uses: dict[str, Use]


def main() -> int:
    """Run, print a table and a line of JSON; return the exit status."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--steps", type=int, default=2000)
    parser.add_argument("--engine", choices=("transformers", "sglang"), default="transformers")
    parser.add_argument("--ranks", type=int, default=2)
    parser.add_argument("--every-s", type=float, default=2.0, help="seconds between two samples")
    parser.add_argument("--samples", type=Path, help="JSONL file for all samples")
    arguments = parser.parse_args()
    with tempfile.TemporaryDirectory(prefix="soak_") as folder:
        shared = set(SHARED_MEMORY.iterdir())
        status, samples = soak(Path(folder), arguments)
        if not samples:
            sys.exit(f"the run ended before its first sample, with status {status}")
        left = sorted({*SHARED_MEMORY.iterdir()} - shared) + sorted((Path(folder) / "tmp").iterdir())
    if arguments.samples:
        lines = [json.dumps({"step": sample.step, **sample.uses}) for sample in samples]
        arguments.samples.write_text("".join(f"{line}\n" for line in lines))
    kinds = growth(samples, first_step=int(WARM_UP * arguments.steps))
    for kind, figures in kinds.items():
        print(f"{kind}: {figures}")
    fits = status == 0 and all(figures["mb_per_100_steps"] <= MOST_MB_PER_100_STEPS for figures in kinds.values())
    figures = {
        "engine": arguments.engine,
        "last_sampled_step": samples[-1].step,
        "status": status,
        "within_limits": fits,
    }
    print(json.dumps({**figures, "left_behind": [path.name for path in left], "kinds": kinds}))
    return 0 if fits else 1


def soak(folder: Path, arguments: argparse.Namespace) -> tuple[int, list[Sample]]:
    """Train in a folder; return the exit status of the run, and the samples of its processes."""
    from megatron_rl.tasks.word_problems import generate, write_rows
    from megatron_rl.tasks.word_tokenizer import ModelSize, save_model

    (folder / "tmp").mkdir()
    (folder / "soak.yaml").write_text(CONFIG)
    save_model(folder / "model", ModelSize(64, num_layers=2, num_heads=4, num_kv_heads=2, intermediate_size=128))
    write_rows(folder / "train.jsonl", generate(500, seed=1))
    write_rows(folder / "held_out.jsonl", generate(8, seed=2))
    command = [sys.executable, "-m", "megatron_rl.commands.cli", "train", str(folder / "soak.yaml")]
    command += [f"trainer.max_steps={arguments.steps}", f"trainer.devices={arguments.ranks}"]
    command += [f"policy.model_path={folder}/model", "policy.initialization=random", f"exp_manager.exp_dir={folder}"]
    command += [f"data.train={folder}/train.jsonl", f"data.validation={folder}/held_out.jsonl"]
    command += [f"rollout.engine={arguments.engine}"]
    run = subprocess.Popen(command, env=os.environ | {"TMPDIR": str(folder / "tmp"), "PYTHONWARNINGS": "ignore"})
    samples: list[Sample] = []
    metrics = folder / "soak" / "metrics.jsonl"
    while run.poll() is None:
        time.sleep(arguments.every_s)
        # Not after the last step: some ranks end before others.
        if 0 < (step := _last_step(metrics)) < arguments.steps and (uses := _uses(run.pid)):
            samples.append(Sample(step, uses))
    return run.returncode, samples


def growth(samples: Sequence[Sample], *, first_step: int) -> dict[str, dict[str, Any]]:
    """Return the figures of each kind of process that ran for two samples from ``first_step`` on."""
    figures = {}
    for kind in sorted({kind for sample in samples for kind in sample.uses}):
        kept = [(sample.step, sample.uses[kind]) for sample in samples if kind in sample.uses]
        fitted = [(step, use) for step, use in kept if step >= first_step]
        if len({step for step, _ in fitted}) < 2:
            continue
        (_, first), (_, last) = fitted[0], fitted[-1]
        slope = theil_sen([step for step, _ in fitted], [use.megabytes for _, use in fitted])
        figures[kind] = {
            "peak_mb": round(max(use.megabytes for _, use in kept), 1),
            "mb_per_100_steps": round(100 * slope, 3),
            "files": [first.files, last.files],
            "threads": [first.threads, last.threads],
        }
    return figures


def theil_sen(x: Sequence[float], y: Sequence[float]) -> float:
    """Return the median of the slopes between all pairs of points whose x differ: single spikes do not move it."""
    pairs = itertools.combinations(zip(x, y), 2)
    return statistics.median([(y2 - y1) / (x2 - x1) for (x1, y1), (x2, y2) in pairs if x1 != x2])


def _uses(launcher: int) -> dict[str, Use]:
    """Return the uses of the launcher and all that descends from it, by kind; none where a process ended meanwhile."""
    uses: dict[str, Use] = defaultdict(Use)
    try:
        root = psutil.Process(launcher)
        for process in [root, *root.children(recursive=True)]:
            kind = _kind(process.cmdline())
            uses[kind] = uses[kind].plus(process)
    except (psutil.Error, OSError):
        return {}
    return dict(uses)


def _kind(command: Sequence[str]) -> str:
    """Name the kind of a process by its command line."""
    text = " ".join(command)
    marks = {
        "sglang::": text.split("_TP")[0].split()[0].rstrip(":") if text else "",
        "sglang_server": "server",
        "sglang_router": "router",
        "resource_tracker": "resource_tracker",
        "multiprocessing": "scoring",
        "megatron_rl.launch": "launcher",
        "megatron_rl.train": "trainer",
    }
    return next((kind for mark, kind in marks.items() if mark in text), "other")


def _last_step(metrics: Path) -> int:
    """Return the step of the last whole row, 0 where there is none."""
    if not metrics.exists():
        return 0
    with metrics.open("rb") as file:
        file.seek(max(0, metrics.stat().st_size - 20_000))
        lines = file.read().split(b"\n")[:-1]
    return int(json.loads(lines[-1])["step"]) if len(lines) > 1 else 0


if __name__ == "__main__":
    sys.exit(main())

"""What an online reference costs, against DPH-RL, whose reference is stored numbers.

    python benchmarks/reference_memory.py [--hidden 512]

Two runs of the same model, prompts, rows and lengths: GRPO with KL to an online reference, and DPH-RL with a pool. Of each the
last of four steps.

reference_bytes_kl, reference_bytes_dph   weights kept for the reference, of one rank
reference_time_share_kl                   share of a step that goes to the reference: its forward pass, weights in and out
step_time_ratio                           step of DPH-RL over step of GRPO with KL
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import tempfile
from pathlib import Path

ROOT = Path(__file__).parent.parent
STEPS = 4


def main() -> None:
    """Make a model, its pool, and both runs."""
    parser = argparse.ArgumentParser()
    parser.add_argument("--hidden", type=int, default=512)
    hidden = parser.parse_args().hidden
    with tempfile.TemporaryDirectory(prefix="reference_") as name:
        folder = Path(name)
        model = [f"--hidden-size={hidden}", "--num-layers=8", "--num-heads=8", "--num-kv-heads=4"]
        size = [f"--intermediate-size={3 * hidden}", "--num-warm-start=64", "--num-train=64", "--num-held-out=8"]
        call("tools/make_word_problems.py", str(folder / "data"), *model, *size)
        start = (f"policy.model_path={folder}/data/model", f"exp_manager.exp_dir={folder}")
        one = ("trainer.max_steps=1", "policy.optim.sched.warmup_updates=0")
        verb("train", "examples/quickstart/warm_start.yaml", *start, *one, *data(folder, "warm_start"))
        policy = (f"policy.model_path={folder}/warm_start/hf", f"exp_manager.exp_dir={folder}", *data(folder, "train"))
        make_pool(folder)
        small = (
            f"trainer.max_steps={STEPS}", "eval.before=false", "eval.after=false", "eval.every_n_steps=0",
            "algorithm.num_prompts_per_step=8", "policy.train_global_batch_size=48", "exp_manager.export_hf=false",
            "exp_manager.create_checkpoint_callback=false", "algorithm.kl.estimator=k3",
        )  # fmt: skip
        rows = ("algorithm.num_generations_per_prompt=8", "policy.train_global_batch_size=64", "algorithm.kl.coef=0.01")
        verb("train", "examples/quickstart/grpo.yaml", *policy, *small, *rows, "exp_manager.name=kl")
        # As many rows in all: 48 rollouts and 16 stored ones.
        rows = (
            "algorithm.name=dph_rl",
            f"algorithm.rehearsal.pool={folder}/pool",
            "algorithm.num_generations_per_prompt=6",
        )
        rehearsal = ("algorithm.rehearsal.num_rows_per_update=16",)
        verb("train", "examples/quickstart/grpo.yaml", *policy, *small, *rows, *rehearsal, "exp_manager.name=dph")
        kl, dph = last_row(folder / "kl"), last_row(folder / "dph")
    reference_s = kl["time/reference_swap_s"] + kl["time/log_probs_s"]
    line = {
        "reference_bytes_kl": round(kl["memory/reference_bytes"]),
        "reference_bytes_dph": round(dph.get("memory/reference_bytes", 0.0)),
        "reference_time_share_kl": round(reference_s / kl["time/step_s"], 3),
        "step_time_ratio": round(dph["time/step_s"] / kl["time/step_s"], 3),
    }
    print(json.dumps(line))


def make_pool(folder: Path) -> None:
    """Stored rows of the start, with log-probs as good as any for this purpose."""
    import torch
    from transformers import AutoTokenizer

    from megatron_rl.data.origin import model_digest, tokenizer_digest
    from megatron_rl.data.pool import PoolWriter, Provenance, Trajectory

    model = folder / "warm_start" / "hf"
    tokenizer = AutoTokenizer.from_pretrained(model)
    provenance = Provenance(
        "word_problems", model_digest(model), tokenizer_digest(tokenizer), {"log_prob_temperature": 1.0}
    )
    with PoolWriter(folder / "pool", provenance) as writer:
        for line in (folder / "data" / "warm_start.jsonl").read_text().splitlines():
            row = json.loads(line)
            prompt, response = (torch.tensor(tokenizer(row[name])["input_ids"]) for name in ("question", "solution"))
            writer.add(Trajectory(line, prompt, response, 1.0, ref_log_probs=torch.full((len(response),), -3.0)))


def data(folder: Path, split: str) -> tuple[str, ...]:
    """Overrides."""
    return (f"data.train={folder}/data/{split}.jsonl", "data.validation=null", "trainer.devices=1")


def verb(name: str, config: str, *overrides: str) -> None:
    """``megatron-rl name config ...``."""
    call("-m", "megatron_rl.commands.cli", name, config, *overrides)


def call(*arguments: str) -> None:
    """Python, from the repository's folder."""
    subprocess.run([sys.executable, *arguments], cwd=ROOT, check=True, stdout=sys.stderr, env={**os.environ})


def last_row(run: Path) -> dict[str, float]:
    """Metrics of the last step."""
    return json.loads((run / "metrics.jsonl").read_text().splitlines()[-1])


if __name__ == "__main__":
    main()

"""What two choices for CPUs are worth, on one training step of the quickstart's model.

    attention_ratio   tokens/s with batched products for short sequences, over torch's flash attention
    allocator_ratio   tokens/s with freed memory kept (launch.ALLOCATOR), over glibc's defaults

Each figure is measured in a process of its own, in turn, three times; ratios are of medians. One rank, one thread.
"""

from __future__ import annotations

import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from contextlib import nullcontext
from pathlib import Path

ROWS, STEPS, REPEATS = 128, 8, 3


def main() -> None:
    """Run the three variants in turn and print their ratios."""
    from megatron_rl.launch.command import ALLOCATOR

    plain = {k: v for k, v in os.environ.items() if k not in ALLOCATOR} | {
        "OMP_NUM_THREADS": "1",
        "PYTHONWARNINGS": "ignore",
    }
    variants = {
        "ours": (plain | ALLOCATOR, "512"),
        "flash_attention": (plain | ALLOCATOR, "0"),
        "default_allocator": (plain, "512"),
    }
    speeds: dict[str, list[float]] = {name: [] for name in variants}
    for _ in range(REPEATS):
        for name, (environment, max_length) in variants.items():
            command = [sys.executable, __file__, max_length]
            output = subprocess.run(command, env=environment, check=True, capture_output=True, text=True).stdout
            speeds[name].append(float(output.splitlines()[-1]))
            print(f"{name}: {speeds[name][-1]:.0f} tokens/s", flush=True)
    median = {name: statistics.median(values) for name, values in speeds.items()}
    figures = {
        "attention_ratio": round(median["ours"] / median["flash_attention"], 3),
        "allocator_ratio": round(median["ours"] / median["default_allocator"], 3),
        "tokens_per_s": round(median["ours"]),
    }
    print(json.dumps(figures))


def measure(max_matmul_length: int) -> float:
    """Tokens per second of forward, backward and optimizer, after one warm-up step."""
    import megatron_rl.patches

    megatron_rl.patches.apply()
    import torch
    import torch.distributed as dist

    from megatron_rl.algorithms.sft import SFT
    from megatron_rl.config import load_config
    from megatron_rl.convert.architecture.shape import read_shape
    from megatron_rl.convert.hf.random_weights import RandomReader
    from megatron_rl.data.prompts import PromptMaker, SupervisedRowMaker, demonstrations, tokenize_prompts
    from megatron_rl.data.tokenizer import load_tokenizer, stop_ids
    from megatron_rl.model import attention
    from megatron_rl.model.policy import Policy
    from megatron_rl.model.trainable import Trainable
    from megatron_rl.model.weights import load_hf_weights
    from megatron_rl.parallel.groups import build_groups
    from megatron_rl.tasks.problems import load_problems
    from megatron_rl.tasks.word_problems import generate, write_rows
    from megatron_rl.tasks.word_tokenizer import ModelSize, save_model

    attention.MATMUL_MAX_LENGTH = max_matmul_length
    torch.set_num_threads(1)
    root = Path(tempfile.mkdtemp())
    save_model(root / "model", ModelSize())
    write_rows(root / "rows.jsonl", generate(ROWS * STEPS, seed=1))
    dist.init_process_group("gloo", store=dist.FileStore(str(root / "store"), 1), rank=0, world_size=1)
    groups = build_groups(tensor_parallel_size=1, pipeline_parallel_size=1, device=torch.device("cpu"), seed=1)
    overrides = [f"policy.model_path={root}/model", f"data.train={root}/rows.jsonl"]
    overrides += ["trainer.devices=1", f"policy.train_global_batch_size={ROWS}"]
    config = load_config(Path(__file__).parent.parent / "examples/quickstart/warm_start.yaml", overrides)
    shape = read_shape(root / "model")
    tokenizer = load_tokenizer(root / "model", shape)
    problems = load_problems("word_problems", root / "rows.jsonl")
    prompts, _ = tokenize_prompts(problems, PromptMaker(tokenizer, config.data, context_length=256, max_new_tokens=1))
    end = stop_ids(tokenizer, shape, root / "model")[0]
    rows, _ = demonstrations(prompts, SupervisedRowMaker(tokenizer, stop_id=end, context_length=256))
    trainable = Trainable(
        config,
        shape,
        groups,
        optim=config.policy.optim,
        fill_weights=lambda chunks: load_hf_weights(chunks, shape, groups, lambda: RandomReader(shape, seed=1)),
        timer=lambda _phase: nullcontext(),
    )
    policy, algorithm = Policy(trainable), SFT(config)
    tokens, started = 0, 0.0
    for step in range(STEPS):
        mini_batch = rows[step * ROWS : (step + 1) * ROWS]
        algorithm.assign_weights(mini_batch)
        if step == 1:
            tokens, started = 0, time.perf_counter()
        policy.train_step(mini_batch, algorithm.loss)
        tokens += sum(row.num_tokens for row in mini_batch)
    return tokens / (time.perf_counter() - started)


if __name__ == "__main__":
    if len(sys.argv) > 1:
        print(measure(int(sys.argv[1])))
    else:
        main()

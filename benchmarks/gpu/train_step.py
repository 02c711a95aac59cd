"""One update of Qwen2.5-32B-shaped layers, in bfloat16 and in each FP8 recipe that the device can run. One recipe a process.

    tokens_per_s_<recipe>     tokens of a whole update (forward, backward, optimizer) per second
    mfu_<recipe>              floating-point operations of the model per second, over the measured rate of a bfloat16 product
    <recipe>_over_bf16        ratio of tokens per second
    peak_bytes_<recipe>       memory at its highest; estimated_bytes_<recipe> is what ``plan memory`` says
    refused                   recipes that the device cannot run, with what is said

Operations: 6 a parameter and token of the layers and of the output layer's rows that are trained on, and 12 x tokens x length x
width of attention, halved for causality.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

from common import TINY, Sizes, build, join_alone, load, matmul_flops, random_rows, seconds_of, write_model

RECIPES = {
    "bf16": (),
    "tensorwise": ("policy.megatron_cfg.fp8=hybrid", "policy.megatron_cfg.fp8_recipe=tensorwise"),
    "delayed": ("policy.megatron_cfg.fp8=hybrid", "policy.megatron_cfg.fp8_recipe=delayed"),
    "blockwise": ("policy.megatron_cfg.fp8=e4m3", "policy.megatron_cfg.fp8_recipe=blockwise"),
    "mxfp8": ("policy.megatron_cfg.fp8=e4m3", "policy.megatron_cfg.fp8_recipe=mxfp8"),
}


def main() -> None:
    """Measure all recipes in turn, and print one line of JSON."""
    parser = argparse.ArgumentParser()
    parser.add_argument("--tiny", action="store_true", help="sizes for a machine without a GPU")
    parser.add_argument("--layers", type=int, default=10, help="as many as fit: 141 GB hold 10 with all their state")
    parser.add_argument("--tokens", type=int, default=16384)
    parser.add_argument("--length", type=int, default=4096)
    parser.add_argument("--one", choices=RECIPES, help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.one:
        print(json.dumps(measure(arguments)))
        return
    line: dict[str, Any] = {"refused": {}}
    for recipe in RECIPES:
        command = [sys.executable, __file__, *sys.argv[1:], "--one", recipe]
        done = subprocess.run(command, check=False, capture_output=True, text=True)
        if done.returncode == 2:
            line["refused"][recipe] = done.stderr.strip().splitlines()[-1]
        elif done.returncode:
            line.setdefault("failed", {})[recipe] = done.stderr.strip()[-300:]
        else:
            line |= {f"{name}_{recipe}": value for name, value in json.loads(done.stdout.splitlines()[-1]).items()}
        print(recipe, {name: value for name, value in line.items() if name.endswith(recipe)}, flush=True)
    base = line.get("tokens_per_s_bf16")
    for recipe in list(RECIPES)[1:]:
        if base and f"tokens_per_s_{recipe}" in line:
            line[f"{recipe}_over_bf16"] = round(line[f"tokens_per_s_{recipe}"] / base, 3)
    print(json.dumps(line))
    sys.exit(int("failed" in line))


def measure(arguments: argparse.Namespace) -> dict[str, float]:
    """Of one recipe."""
    sizes = TINY if arguments.tiny else Sizes(num_hidden_layers=arguments.layers)
    tokens, length = (128, 32) if arguments.tiny else (arguments.tokens, arguments.length)
    device = join_alone()

    import torch

    from megatron_rl.algorithms import build_algorithm
    from megatron_rl.errors import UserError
    from megatron_rl.memory_plan import estimate
    from megatron_rl.model.build import build_groups_of

    model = write_model(Path(tempfile.mkdtemp()) / "model", sizes)
    config = load(model, f"policy.train_micro_batch_tokens={tokens}", *RECIPES[arguments.one])
    try:
        policy = build(config, build_groups_of(config, device))
    except UserError as error:
        print(error, file=sys.stderr)
        sys.exit(2)
    algorithm = build_algorithm(config)
    rows = random_rows([length] * (tokens // length), sizes.vocab_size)
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats()
    seconds = seconds_of(lambda: policy.train_step(rows, algorithm.loss))
    trained = sum(row.num_response_tokens for row in rows)
    per_layer = sum(p.numel() for p in policy.chunks[0].decoder.parameters())
    operations = 6 * (per_layer * tokens + sizes.hidden_size * sizes.vocab_size * trained)
    operations += 6 * sizes.num_hidden_layers * tokens * length * sizes.hidden_size
    return {
        "tokens_per_s": round(tokens / seconds, 1),
        "mfu": round(operations / seconds / matmul_flops(), 4),
        "peak_bytes": torch.cuda.max_memory_allocated() if device.type == "cuda" else 0,
        "estimated_bytes": estimate(config)[0].updating,
    }


if __name__ == "__main__":
    main()

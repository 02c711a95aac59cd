"""One update of Qwen2.5-32B-shaped layers, in bfloat16 and in each FP8 recipe that the device can run. One recipe a process.

    layers                    as many as fit in every recipe, or what --layers says
    tokens_per_s_<recipe>     tokens of a whole update (forward, backward, optimizer) per second
    model_flops_<recipe>      floating-point operations of the model per second
    mfu_<recipe>              the same over the measured rate of a bfloat16 product
    <recipe>_over_bf16        ratio of tokens per second; fp8_over_bf16 is the best of them
    peak_bytes_<recipe>       memory at its highest; estimated_bytes_<recipe> is what ``plan memory`` says
    refused                   recipes that the device cannot run, with what is said

Operations: 6 a parameter and token of the layers and of the output layer's rows that are trained on, and 12 x tokens x length x
width of attention, halved for causality.
"""

from __future__ import annotations

import argparse
import subprocess
import sys
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from common import (
    TINY,
    Sizes,
    build,
    emit,
    join_alone,
    last_json,
    load,
    matmul_flops,
    random_rows,
    seconds_of,
    write_model,
)

from megatron_rl.errors import UserError
from megatron_rl.process.lifetime import leave

RECIPES = {
    "bf16": (),
    "tensorwise": ("policy.megatron_cfg.fp8=hybrid", "policy.megatron_cfg.fp8_recipe=tensorwise"),
    "delayed": ("policy.megatron_cfg.fp8=hybrid", "policy.megatron_cfg.fp8_recipe=delayed"),
    "blockwise": ("policy.megatron_cfg.fp8=e4m3", "policy.megatron_cfg.fp8_recipe=blockwise"),
    "mxfp8": ("policy.megatron_cfg.fp8=e4m3", "policy.megatron_cfg.fp8_recipe=mxfp8"),
}
FREE_SHARE = 0.15
"""Of the device's memory: activations are estimated, and the estimate was never compared with a GPU."""


def main() -> int:
    """Measure all recipes in turn, and print a line of JSON after each; status 1 if one has failed."""
    parser = argparse.ArgumentParser()
    parser.add_argument("--tiny", action="store_true", help="sizes for a machine without a GPU")
    parser.add_argument("--layers", type=int, help="default: as many as fit")
    parser.add_argument("--tokens", type=int, default=16384)
    parser.add_argument("--length", type=int, default=4096)
    parser.add_argument("--recipes", nargs="+", choices=RECIPES, default=list(RECIPES))
    parser.add_argument("--set", nargs="*", default=[], help="fields of the config, for all recipes")
    parser.add_argument("--one", choices=RECIPES, help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.one:
        emit(measure(arguments))
        return 0
    line: dict[str, Any] = {"refused": {}, "failed": {}}
    for recipe in arguments.recipes:
        command = [sys.executable, __file__, *sys.argv[1:], "--one", recipe]
        done = subprocess.run(command, check=False, capture_output=True, text=True)
        found = last_json(done.stdout)
        if found is None:
            line["failed"][recipe] = f"status {done.returncode}: {done.stderr.strip()[-600:]}"
        elif "refused" in found:
            line["refused"][recipe] = found["refused"]
        else:
            line["layers"] = found.pop("layers")
            line |= {f"{name}_{recipe}": value for name, value in found.items()}
            add_ratio(line, recipe)
        emit({name: value for name, value in line.items() if name != "failed" or value})
    return int(bool(line["failed"]))


def add_ratio(line: dict[str, Any], recipe: str) -> None:
    """Of a recipe in eight bits to bfloat16, and the best so far."""
    base = line.get("tokens_per_s_bf16")
    if base and recipe != "bf16":
        ratio = round(line[f"tokens_per_s_{recipe}"] / base, 3)
        line |= {f"{recipe}_over_bf16": ratio, "fp8_over_bf16": max(ratio, line.get("fp8_over_bf16", 0.0))}


def layers_that_fit(total_bytes: int, overrides: Sequence[str]) -> int:
    """The most layers whose update in any recipe leaves ``FREE_SHARE`` of ``total_bytes``; at least one."""
    layers = 0
    with tempfile.TemporaryDirectory() as folder:
        while True:
            model = write_model(Path(folder), Sizes(num_hidden_layers=layers + 1))
            needed = max(update_bytes(load(model, *overrides, *recipe)) for recipe in RECIPES.values())
            if needed > (1 - FREE_SHARE) * total_bytes:
                return max(1, layers)
            layers += 1


def update_bytes(config: Any) -> int:
    """Return what the plan says of an update, without the engine that a run would have in its process."""
    from megatron_rl.doctor.memory import estimate

    memory = estimate(config)[0]
    return memory.updating - memory.engine


def measure(arguments: argparse.Namespace) -> dict[str, Any]:
    """Of one recipe: what stands at the top, without the recipe in the names; or why it is refused."""
    tokens, length = (128, 32) if arguments.tiny else (arguments.tokens, arguments.length)
    device = join_alone()

    import torch

    from megatron_rl.algorithms import build_algorithm
    from megatron_rl.model.build import build_groups_of
    from megatron_rl.model.flops import PASSES, forward_flops

    overrides = [f"policy.train_micro_batch_tokens={tokens}", *arguments.set]
    if arguments.tiny:
        sizes = TINY
    else:
        total_bytes = torch.cuda.get_device_properties(0).total_memory
        sizes = Sizes(num_hidden_layers=arguments.layers or layers_that_fit(total_bytes, overrides))
    model = write_model(Path(tempfile.mkdtemp()) / "model", sizes)
    config = load(model, *overrides, *RECIPES[arguments.one])
    try:
        policy = build(config, build_groups_of(config, device))
    except UserError as error:
        return {"refused": str(error)}
    algorithm = build_algorithm(config)
    rows = random_rows([length] * (tokens // length), sizes.vocab_size)
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats()
    seconds = seconds_of(lambda: policy.train_step(rows, algorithm.loss))
    peak_bytes = torch.cuda.max_memory_allocated() if device.type == "cuda" else 0
    operations = PASSES * forward_flops(policy.shape, ((row.num_tokens, row.num_response_tokens) for row in rows))
    return {
        "layers": sizes.num_hidden_layers,
        "tokens_per_s": round(tokens / seconds, 1),
        "model_flops": operations / seconds,
        "mfu": round(operations / seconds / matmul_flops(), 4),
        "peak_bytes": peak_bytes,
        "estimated_bytes": update_bytes(config),
    }


if __name__ == "__main__":
    leave(main())

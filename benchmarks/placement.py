"""Placement of GRPO groups on two real SGLang servers: prefix-cache hits and speed, by rule of placement.

    python benchmarks/placement.py [--prompts 16] [--group-size 8] [--repeats 5] [--hidden 128]

Prompts have 768 random tokens and responses 32; random weights hardly ever sample the end. Both rules ask the same two servers
in turn, with new prompts and an empty cache each time.

home     all rollouts of a prompt prefer one server (the product's rule)
fewest   each request goes to the server with the fewest in flight

cached_prompt_frac   the share of prompt tokens that servers did not compute again (``rollout/cached_prompt_frac``), mean
seconds              of one ``generate``, median
"""

from __future__ import annotations

import argparse
import json
import statistics
import sys
import tempfile
import time
from collections.abc import Iterator
from contextlib import closing
from functools import partial
from pathlib import Path

import torch
import torch.distributed as dist
from spo_tree import LEVEL_TOKENS, PROMPT_TOKENS, ROOT, make_problems

sys.path.insert(0, str(ROOT))

from megatron_rl.config import load_config
from megatron_rl.convert.architecture.shape import read_shape
from megatron_rl.convert.hf.reader import HFReader
from megatron_rl.rollout.engine import ServedModel
from megatron_rl.rollout.sglang.dispatch import Dispatch
from megatron_rl.rollout.sglang.engine import SGLangEngine
from megatron_rl.types import Completion, Request
from megatron_rl.weight_sync.delivery import WeightDelivery, WholeTensors

GROUPS = """
algorithm: {name: grpo}
rollout: {engine: sglang, servers: {num_per_node: 2}, sglang_cfg: {max_total_tokens: 120000}}
trainer: {devices: 1, precision: fp32}
"""
PLACEMENTS = ("home", "fewest")


def main() -> None:
    """Measure, and print one line of JSON."""
    parser = argparse.ArgumentParser()
    parser.add_argument("--prompts", type=int, default=16)
    parser.add_argument("--group-size", type=int, default=8)
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--hidden", type=int, default=128)
    arguments = parser.parse_args()
    seen: dict[str, list[tuple[float, float]]] = {name: [] for name in PLACEMENTS}
    with tempfile.TemporaryDirectory(prefix="placement_") as name:
        folder = Path(name)
        make_problems(folder, arguments.hidden)
        dist.init_process_group("gloo", init_method=f"file://{folder}/ranks", rank=0, world_size=1)
        engine, weights = build(folder)
        with closing(engine):
            generator, version = torch.Generator().manual_seed(1), 0
            for repeat in range(1 + arguments.repeats):  # the first warms the servers up
                for placement in PLACEMENTS:
                    engine.update_weights(weights, version)  # empties the caches
                    version += 1
                    found = measure(
                        engine,
                        placement,
                        list(batch(arguments.prompts, engine._model.shape.vocab_size, generator)),
                        arguments.group_size,
                    )
                    print(f"{placement}: {found[0]:.3f} from the cache, {found[1]:.2f} s", flush=True)
                    if repeat:
                        seen[placement].append(found)
    line = {}
    for placement, each in seen.items():
        fractions, seconds = zip(*each)
        line[f"{placement}_cached_prompt_frac"] = round(statistics.mean(fractions), 4)
        line[f"{placement}_seconds"] = round(statistics.median(seconds), 3)
    print(json.dumps(line))


def build(folder: Path) -> tuple[SGLangEngine, WeightDelivery]:
    """Start two servers, and make the source of their weights."""
    (folder / "groups.yaml").write_text(f"defaults: {ROOT}/configs/online.yaml\n{GROUPS}")
    model = folder / "data" / "model"
    paths = [f"policy.model_path={model}", f"data.train={folder}/problems.jsonl", f"exp_manager.exp_dir={folder}"]
    config = load_config(folder / "groups.yaml", [*paths, "data.task=word_problems"])
    shape, group = read_shape(model), dist.group.WORLD
    assert group is not None
    served = ServedModel(model, shape, torch.float32, tuple(shape.eos_token_ids))
    reader = HFReader(model)

    def tensors() -> Iterator[tuple[str, torch.Tensor]]:
        return ((name, reader.read(name)) for name in reader.names)

    weights = WeightDelivery(tensors, [WholeTensors(tensors, bucket_bytes=2**28, cpu_group=group)])
    return SGLangEngine(config, served, device=torch.device("cpu"), cpu_group=group), weights


def batch(count: int, vocab_size: int, generator: torch.Generator) -> Iterator[torch.Tensor]:
    """Yield prompts of random tokens."""
    for _ in range(count):
        yield torch.randint(vocab_size, (PROMPT_TOKENS,), generator=generator)


def measure(engine: SGLangEngine, placement: str, prompts: list[torch.Tensor], group_size: int) -> tuple[float, float]:
    """Generate a batch under a rule of placement: (share of cached prompt tokens, seconds)."""
    dispatch = engine._driver.dispatch  # type: ignore[union-attr]
    by_home = partial(Dispatch._complete, dispatch)

    async def by_load(request: Request, home: int) -> Completion:
        return await by_home(request, min(dispatch.fleet.servers, key=lambda server: server.in_flight).index)

    dispatch._complete = by_home if placement == "home" else by_load  # type: ignore[method-assign]
    engine.metrics()
    started = time.perf_counter()
    engine.generate(
        [Request(ids, LEVEL_TOKENS, 1.0) for ids in prompts for _ in range(group_size)], group_size=group_size
    )
    seconds = time.perf_counter() - started
    return engine.metrics()["rollout/cached_prompt_frac"], seconds


if __name__ == "__main__":
    main()

"""Trees of rollouts from a real SGLang server, with its prefix cache and without; and what the scheduling of a node costs.

    python benchmarks/spo_tree.py [--hidden 128]

Both runs grow trees of the same shape by the documented command: 4-4-4 on 16 prompts of 768 tokens, 32 tokens a level, random
weights that hardly ever sample the end. The second step counts.

cached_share             of the prompt tokens of a step, those that the server did not compute again
speedup                  sampled tokens per second of generation, with the cache over without (--disable-radix-cache)
scheduling_ms_per_node   of scheduler, fleet and bookkeeping, with servers that answer at once: 10,000 nodes alive at once
"""

from __future__ import annotations

import argparse
import asyncio
import json
import random
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

ROOT = Path(__file__).parent.parent
PROMPT_TOKENS, LEVEL_TOKENS = 768, 32
TREE = f"""
algorithm:
  name: spo_tree
  num_prompts_per_step: 16
  branch_factors: [4, 4, 4]
  tokens_per_level: {LEVEL_TOKENS}
  num_edges_per_step: 64
rollout: {{engine: sglang, max_new_tokens: {3 * LEVEL_TOKENS}, temperature: 1.0}}
policy: {{train_global_batch_size: 64, train_micro_batch_tokens: 2048}}
trainer: {{devices: 1, max_steps: 2, precision: fp32}}
exp_manager: {{export_hf: false, create_checkpoint_callback: false}}
data: {{task: word_problems}}
"""


def main() -> None:
    """Measure, and print one line of JSON."""
    parser = argparse.ArgumentParser()
    parser.add_argument("--hidden", type=int, default=128)
    hidden = parser.parse_args().hidden
    per_node = scheduling_s_per_node()
    print(f"scheduling: {1e3 * per_node:.3f} ms a node", flush=True)
    with tempfile.TemporaryDirectory(prefix="trees_") as name:
        folder = Path(name)
        make_problems(folder, hidden)
        (folder / "tree.yaml").write_text(f"defaults: {ROOT}/configs/online.yaml\n{TREE}")
        found = {}
        for run, settings in (("cached", ()), ("uncached", ("rollout.sglang_cfg.disable_radix_cache=true",))):
            row = grown(folder, run, *settings)
            tokens_per_s = row["rollout/generated_tokens"] / row["time/generation_s"]
            found[run] = (row["rollout/cached_prompt_frac"], tokens_per_s)
            print(
                f"{run}: {row['rollout/generated_tokens']:.0f} tokens in {row['time/generation_s']:.1f} s, "
                f"{tokens_per_s:.0f} a second, {found[run][0]:.3f} of prompt tokens from the cache",
                flush=True,
            )
    line = {
        "cached_share": round(found["cached"][0], 4),
        "speedup": round(found["cached"][1] / found["uncached"][1], 3),
        "scheduling_ms_per_node": round(1e3 * per_node, 4),
    }
    print(json.dumps(line))


def make_problems(folder: Path, hidden: int) -> None:
    """A random model that hardly ever ends a response, and 32 different problems of ``PROMPT_TOKENS`` tokens each for it."""
    import torch
    from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer

    model = [f"--hidden-size={hidden}", "--num-layers=4", "--num-heads=8", "--num-kv-heads=4"]
    size = [f"--intermediate-size={3 * hidden}", "--num-warm-start=10", "--num-train=400", "--num-held-out=10"]
    subprocess.run(
        [sys.executable, "tools/make_word_problems.py", str(folder / "data"), *model, *size],
        cwd=ROOT, check=True, stdout=subprocess.DEVNULL,
    )  # fmt: skip
    shape = json.loads((folder / "data" / "model" / "config.json").read_text())
    (folder / "data" / "model" / "config.json").write_text(json.dumps(shape | {"max_position_embeddings": 2048}))
    tokenizer = AutoTokenizer.from_pretrained(folder / "data" / "model")
    torch.manual_seed(1)
    weights = AutoModelForCausalLM.from_config(AutoConfig.from_pretrained(folder / "data" / "model"))
    # One direction of the residual stream is the same for every token but the end, and the tied output layer reads it.
    embedding = weights.get_input_embeddings().weight.data
    embedding[:, 0] = 1.0
    embedding[tokenizer.eos_token_id, 0] = -4.0
    weights.save_pretrained(folder / "data" / "model")
    words = [json.loads(line)["question"] for line in (folder / "data" / "train.jsonl").read_text().splitlines()]
    draw = random.Random(1)
    with (folder / "problems.jsonl").open("w") as file:
        for _ in range(32):
            ids = tokenizer(" ".join(draw.sample(words, 100)), add_special_tokens=False)["input_ids"]
            text = tokenizer.decode(ids[:PROMPT_TOKENS])
            assert len(tokenizer(text, add_special_tokens=False)["input_ids"]) == PROMPT_TOKENS
            file.write(json.dumps({"question": text, "answer": "7"}) + "\n")


def grown(folder: Path, name: str, *settings: str) -> dict[str, float]:
    """The metrics of a run's second step."""
    command = [
        sys.executable,
        "-m",
        "megatron_rl.commands.cli",
        "train",
        str(folder / "tree.yaml"),
        f"exp_manager.name={name}",
    ]
    command += [f"exp_manager.exp_dir={folder}", f"policy.model_path={folder}/data/model", *settings]
    command += [f"data.train={folder}/problems.jsonl", "rollout.sglang_cfg.max_total_tokens=120000"]
    done = subprocess.run(command, cwd=ROOT, check=False, capture_output=True, text=True)
    if done.returncode:
        sys.exit(done.stdout[-3000:] + done.stderr[-3000:])
    return json.loads((folder / name / "metrics.jsonl").read_text().splitlines()[-1])


def scheduling_s_per_node() -> float:
    """Wall time of a growth of 11,000 nodes, 10,000 of them alive at once, on servers that answer at once; and of what the
    engine does with it then."""
    import torch

    from megatron_rl.config.rollout import ServersConfig, WeightSyncConfig
    from megatron_rl.rollout.growth import Branch, from_list, in_order
    from megatron_rl.rollout.sglang.dispatch import Dispatch
    from megatron_rl.rollout.sglang.fleet import Fleet, Server
    from megatron_rl.rollout.sglang.versions import adapter_for
    from megatron_rl.types import Completion, Request

    piece = Completion(torch.arange(LEVEL_TOKENS), torch.zeros(LEVEL_TOKENS), "length", 0)

    class AtOnce:
        url = "http://nowhere"

        async def generate(self, *_args: Any, **_how: Any) -> Completion:
            await asyncio.sleep(0)
            return piece

    def children(key: tuple[int, ...], context: Any) -> list[Branch]:
        return [Branch((*key, n), Request(context, LEVEL_TOKENS, 1.0), 96) for n in range(10)]

    def expand(branch: Branch, completion: Completion) -> list[Branch]:
        if len(branch.key) == 3:
            return []
        return children(branch.key, torch.cat([branch.request.prompt_ids, completion.response_ids]))

    async def grow() -> tuple[float, int]:
        config = ServersConfig(max_in_flight=5000)
        adapter = adapter_for("0.5.23", AtOnce.url)
        servers = [Server(i, AtOnce(), state="serving", adapter=adapter) for i in range(4)]  # type: ignore[arg-type]
        fleet = Fleet(servers, config, WeightSyncConfig(), check=lambda _server, _info: None)
        dispatch = Dispatch(fleet, stop_ids=[])
        seeds = [branch for tree in range(100) for branch in children((tree,), torch.arange(PROMPT_TOKENS))]
        started = time.perf_counter()
        grown = await dispatch.grow(seeds, expand)
        ordered = [grown[key] for key in in_order(seeds, expand, lambda branch: grown[branch.key])]
        again = from_list(seeds, expand, ordered)
        return time.perf_counter() - started, len(again)

    seconds, count = asyncio.run(grow())
    assert count == 1000 + 10_000
    return seconds / count


if __name__ == "__main__":
    main()

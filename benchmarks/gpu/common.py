"""What the GPU's benchmarks share: a policy on one device, its rows, and what the device can multiply at most."""

from __future__ import annotations

import atexit
import json
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from contextlib import nullcontext
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

ROOT = Path(__file__).parents[2]
sys.path.insert(0, str(ROOT))


@dataclass(frozen=True)
class Sizes:
    """Of a Qwen2.5-shaped model; the defaults are the 32B model's."""

    hidden_size: int = 5120
    intermediate_size: int = 27648
    num_attention_heads: int = 40
    num_key_value_heads: int = 8
    vocab_size: int = 152_064
    num_hidden_layers: int = 4


TINY = Sizes(128, 256, 8, 4, 131, 2)
"""For a machine without a GPU: does the script run?"""


def write_model(folder: Path, sizes: Sizes) -> Path:
    """A ``config.json`` alone: weights are random."""
    folder.mkdir(parents=True, exist_ok=True)
    fixed = {
        "model_type": "qwen2", "tie_word_embeddings": False, "rms_norm_eps": 1e-5, "rope_theta": 1e6, "hidden_act": "silu",
        "max_position_embeddings": 32768, "torch_dtype": "bfloat16", "bos_token_id": 1, "eos_token_id": 2,
        "initializer_range": 0.02,
    }  # fmt: skip
    (folder / "config.json").write_text(json.dumps(fixed | asdict(sizes)))
    return folder


def load(model: Path, *overrides: str) -> Any:
    """The config of a run on one device."""
    from megatron_rl.config import load_config

    given = (
        f"policy.model_path={model}", "policy.initialization=random", "data.task=gsm8k", "data.train=none.jsonl",
        "trainer.devices=1", "rollout.temperature=1.0", "algorithm.kl.coef=0",
    )  # fmt: skip
    return load_config(ROOT / "configs/grpo.yaml", [*given, *overrides])


def join_alone() -> Any:
    """A process group of one until this process ends, and the patches; returns the device."""
    import torch
    import torch.distributed as dist

    import megatron_rl.patches

    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    megatron_rl.patches.apply(device.type)
    store = dist.FileStore(tempfile.mkdtemp() + "/store", 1)
    dist.init_process_group("nccl" if device.type == "cuda" else "gloo", store=store, rank=0, world_size=1)
    atexit.register(dist.destroy_process_group)
    return device


def build(config: Any, groups: Any) -> Any:
    """A policy with the random weights of the config's seed."""
    from megatron_rl.config import read_model_shape
    from megatron_rl.convert.hf.random_weights import RandomReader
    from megatron_rl.model.policy import Policy
    from megatron_rl.model.trainable import Trainable
    from megatron_rl.model.weights import load_hf_weights

    shape = read_model_shape(config)
    trainable = Trainable(
        config,
        shape,
        groups,
        optim=config.policy.optim,
        fill_weights=lambda chunks: load_hf_weights(
            chunks, shape, groups, lambda: RandomReader(shape, seed=1, device=groups.device)
        ),
        timer=lambda _phase: nullcontext(),
    )
    return Policy(trainable)


def emit(line: dict[str, Any]) -> None:
    """Print everything measured so far, as one line of JSON: who is stopped later has said this much."""
    print(json.dumps(line), flush=True)


def last_json(output: str) -> dict[str, Any] | None:
    """The last whole line of JSON in an output that may break off anywhere; None where there is none."""
    for line in reversed(output.splitlines()):
        try:
            found = json.loads(line)
        except json.JSONDecodeError:
            continue
        if isinstance(found, dict):
            return found
    return None


def random_rows(lengths: Sequence[int], vocab_size: int, *, prompt_share: float = 0.25) -> list[Any]:
    """Rows with advantages of both signs and token-mean weights."""
    import torch

    from megatron_rl.types import RowKind, TrainingSample

    generator = torch.Generator().manual_seed(1)
    rows = []
    for length in lengths:
        ids = torch.randint(3, vocab_size, (length,), generator=generator)
        cut = max(1, int(length * prompt_share))
        row = TrainingSample(ids[:cut], ids[cut:], RowKind.RL)
        row.advantages = torch.randn(1, generator=generator).expand(length - cut).clone()
        rows.append(row)
    total = sum(row.num_response_tokens for row in rows)
    for row in rows:
        row.weights = torch.full((row.num_response_tokens,), 1 / total)
    return rows


def seconds_of(work: Callable[[], object], *, repeats: int = 3) -> float:
    """The least of several, after one that does not count."""
    import torch

    def once() -> float:
        wait = torch.cuda.synchronize if torch.cuda.is_available() else (lambda: None)
        wait()
        started = time.perf_counter()
        work()
        wait()
        return time.perf_counter() - started

    once()
    return min(once() for _ in range(repeats))


def matmul_flops(size: int = 8192) -> float:
    """Floating-point operations per second of a bfloat16 product: what shares of a peak refer to."""
    import torch

    device = "cuda" if torch.cuda.is_available() else "cpu"
    size = size if device == "cuda" else 256
    a, b = (torch.randn(size, size, device=device, dtype=torch.bfloat16) for _ in range(2))

    def ten() -> None:
        for _ in range(10):
            torch.matmul(a, b)

    return 10 * 2 * size**3 / seconds_of(ten)

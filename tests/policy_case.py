"""A policy on a tiny model, for tests: built under any layout inside a forked rank."""

from __future__ import annotations

import tempfile
from pathlib import Path

import torch

from megatron_rl.config import Config, load_config
from megatron_rl.doctor.layout import build_policy
from megatron_rl.types import RowKind, TrainingSample

__all__ = ["build_policy", "log_probs_of", "random_samples", "tiny_config"]
CONFIG = Path(__file__).parent / "tiny.yaml"


def tiny_config(
    model: Path, *overrides: str, tp: int = 1, pp: int = 1, vpp: int = 1, cp: int = 1, dp: int = 1, sp: bool = False
) -> Config:
    """The smallest run, under a layout. An override ``algorithm={...}`` is the whole section: others' keys do not fit it."""
    sections = [item.removeprefix("algorithm=") for item in overrides if item.startswith("algorithm={")]
    overrides = tuple(item for item in overrides if not item.startswith("algorithm={"))
    with tempfile.NamedTemporaryFile("w", suffix=".yaml") as file:
        file.write(tiny_yaml(*sections))
        file.flush()
        return load_config(
            file.name,
            [
                f"policy.model_path={model}",
                f"trainer.devices={tp * pp * cp * dp}",
                f"policy.megatron_cfg.tensor_model_parallel_size={tp}",
                f"policy.megatron_cfg.pipeline_model_parallel_size={pp}",
                f"policy.megatron_cfg.virtual_pipeline_model_parallel_size={vpp}",
                f"policy.megatron_cfg.context_parallel_size={cp}",
                *(["policy.megatron_cfg.sequence_parallel=true"] if sp else []),
                *overrides,
            ],
        )


def tiny_yaml(algorithm: str | None = None) -> str:
    """The smallest run's config, with another ``algorithm`` section if one is given."""
    lines = CONFIG.read_text().splitlines()
    if algorithm is not None:
        lines = [line for line in lines if not line.startswith("algorithm:")] + [f"algorithm: {algorithm}"]
    return "\n".join(lines)


def random_samples(count: int = 8, vocab_size: int = 131) -> list[TrainingSample]:
    """Rows of very unequal lengths, with advantages of both signs and token-mean weights."""
    generator = torch.Generator().manual_seed(1)
    samples = []
    for _ in range(count):
        prompt, response = (int(torch.randint(1, limit, (1,), generator=generator)) for limit in (9, 40))
        row = TrainingSample(
            torch.randint(0, vocab_size, (prompt,), generator=generator),
            torch.randint(0, vocab_size, (response,), generator=generator),
            RowKind.RL,
        )
        row.advantages = torch.randn(1, generator=generator).expand(response).clone()
        samples.append(row)
    total = sum(row.num_response_tokens for row in samples)
    for row in samples:
        row.weights = torch.full((row.num_response_tokens,), 1 / total)
    return samples


def log_probs_of(model: torch.nn.Module, samples: list[TrainingSample]) -> list[torch.Tensor]:
    """The same quantity from a transformers model, one row at a time, in float64."""
    found = []
    for row in samples:
        ids = torch.cat([row.prompt_ids, row.response_ids])[None]
        with torch.no_grad():
            log_p = model(ids).logits[0].double().log_softmax(-1)
        found.append(log_p[len(row.prompt_ids) - 1 : -1].gather(1, row.response_ids[:, None])[:, 0])
    return found

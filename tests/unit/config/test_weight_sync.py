"""Weight updates: which settings go together."""

from __future__ import annotations

from pathlib import Path

import pytest

from megatron_rl.config import load_config

CONFIG = Path(__file__).parents[2] / "tiny.yaml"
SGLANG = "rollout.engine=sglang"


@pytest.mark.parametrize(
    "overrides",
    [
        [],
        [SGLANG],
        [SGLANG, "weight_sync.transport=shards"],
        [SGLANG, "weight_sync.transport=tensors", "weight_sync.quantization=fp8_block"],
        [SGLANG, "weight_sync.transport=shards", "weight_sync.quantization=fp8_block"],
        [SGLANG, "weight_sync.transport=disk", "weight_sync.directory=/shared"],
    ],
)
def test_what_goes_together_is_taken(overrides: list[str]) -> None:
    load_config(CONFIG, ["policy.model_path=none", *overrides])

"""Weight updates: which settings go together."""

from __future__ import annotations

from pathlib import Path

import pytest

from megatron_rl.config import load_config
from megatron_rl.errors import UserError

CONFIG = Path(__file__).parents[2] / "tiny.yaml"
SGLANG = "rollout.engine=sglang"


@pytest.mark.parametrize(
    ("overrides", "field"),
    [
        ([SGLANG, "weight_sync.transport=disk"], "weight_sync.directory"),
        ([SGLANG, "weight_sync.directory=/shared"], "weight_sync.directory"),
        ([SGLANG, "weight_sync.transport=shards", "weight_sync.quantization=fp8_block"], "weight_sync.quantization"),
        (["weight_sync.quantization=fp8_tensor"], "weight_sync.quantization"),
        (["weight_sync.transport=shards"], "weight_sync.transport"),
        ([SGLANG, "weight_sync.transport=disks"], "weight_sync.transport"),
        ([SGLANG, "weight_sync.full_every=0"], "weight_sync.full_every"),
    ],
)
def test_what_does_not_go_together_is_named(overrides: list[str], field: str) -> None:
    with pytest.raises(UserError) as caught:
        load_config(CONFIG, ["policy.model_path=none", *overrides])
    assert caught.value.field == field


@pytest.mark.parametrize(
    "overrides",
    [
        [],
        [SGLANG],
        [SGLANG, "weight_sync.transport=shards"],
        [SGLANG, "weight_sync.transport=tensors", "weight_sync.quantization=fp8_block"],
        [SGLANG, "weight_sync.transport=disk", "weight_sync.directory=/shared"],
    ],
)
def test_what_goes_together_is_taken(overrides: list[str]) -> None:
    load_config(CONFIG, ["policy.model_path=none", *overrides])

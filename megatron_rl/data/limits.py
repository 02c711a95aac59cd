"""Length limit of a training row."""

from __future__ import annotations

from megatron_rl.config import Config, read_model_shape
from megatron_rl.data.pack import pack_layout


def row_limit(config: Config) -> int:
    """Return the tokens of prompt and response for which both the model's context and one micro-batch have room."""
    budget, multiple = config.policy.train_micro_batch_tokens, pack_layout(config.policy).sequence_multiple
    return min(budget // multiple * multiple, read_model_shape(config).max_position_embeddings)

"""Qwen2 and Qwen2.5: Llama's trunk with biases on queries, keys and values."""

from __future__ import annotations

from megatron_rl.convert.tables.llama import ATTENTION_BIAS, TRUNK

TABLE = (*TRUNK, *ATTENTION_BIAS)

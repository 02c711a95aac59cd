"""Qwen3, dense: Llama's trunk with a norm over each query and key head."""

from __future__ import annotations

from megatron_rl.convert.tables.kinds import Rule, replicated
from megatron_rl.convert.tables.llama import ATTENTION_BIAS, TRUNK

_M = "decoder.layers.{layer}.self_attention."
_H = "model.layers.{layer}.self_attn."

QK_NORM = (
    Rule(_M + "q_layernorm.weight", (_H + "q_norm.weight",), replicated("head"), needs="qk_norm"),
    Rule(_M + "k_layernorm.weight", (_H + "k_norm.weight",), replicated("head"), needs="qk_norm"),
)

TABLE = (*TRUNK, *ATTENTION_BIAS, *QK_NORM)

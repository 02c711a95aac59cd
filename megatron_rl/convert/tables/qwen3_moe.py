"""Qwen3 with experts: Qwen3's attention; a router and experts instead of the MLP."""

from __future__ import annotations

from megatron_rl.convert.tables.kinds import Rule, gated, replicated, row
from megatron_rl.convert.tables.llama import ATTENTION_BIAS, TRUNK
from megatron_rl.convert.tables.qwen3 import QK_NORM

_M = "decoder.layers.{layer}.mlp."
_H = "model.layers.{layer}.mlp."

EXPERTS = (
    Rule(_M + "router.weight", (_H + "gate.weight",), replicated("experts", "hidden")),
    Rule(_M + "experts.local_experts.{expert}.linear_fc1.weight",
         (_H + "experts.{expert}.gate_proj.weight", _H + "experts.{expert}.up_proj.weight"), gated("moe_ffn", "hidden")),
    Rule(_M + "experts.local_experts.{expert}.linear_fc2.weight", (_H + "experts.{expert}.down_proj.weight",),
         row("hidden", "moe_ffn")),
)  # fmt: skip

TABLE = (*(rule for rule in TRUNK if ".mlp." not in rule.megatron), *ATTENTION_BIAS, *QK_NORM, *EXPERTS)

"""Mixtral: Llama's attention; a router and experts, under names of their own, instead of the MLP."""

from __future__ import annotations

from megatron_rl.convert.tables.kinds import Rule, gated, replicated, row
from megatron_rl.convert.tables.llama import TRUNK

_M = "decoder.layers.{layer}.mlp."
_H = "model.layers.{layer}.block_sparse_moe."

EXPERTS = (
    Rule(_M + "router.weight", (_H + "gate.weight",), replicated("experts", "hidden")),
    # w1 is the gate, w3 the up and w2 the down projection.
    Rule(_M + "experts.local_experts.{expert}.linear_fc1.weight",
         (_H + "experts.{expert}.w1.weight", _H + "experts.{expert}.w3.weight"), gated("moe_ffn", "hidden")),
    Rule(_M + "experts.local_experts.{expert}.linear_fc2.weight", (_H + "experts.{expert}.w2.weight",),
         row("hidden", "moe_ffn")),
)  # fmt: skip

TABLE = (*(rule for rule in TRUNK if ".mlp." not in rule.megatron), *EXPERTS)

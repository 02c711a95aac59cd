"""DeepSeek-V3: latent attention; dense layers first, then layers of routed and shared experts.

Up projections hold whole heads one after another, so they are cut by rows; the short projections down to the latents, and
the rotated key that all heads share, are whole on every rank.
"""

from __future__ import annotations

from dataclasses import replace

from megatron_rl.convert.tables.kinds import Rule, column, gated, replicated, row
from megatron_rl.convert.tables.llama import TRUNK
from megatron_rl.convert.tables.qwen3_moe import EXPERTS

_M = "decoder.layers.{layer}."
_H = "model.layers.{layer}."
_MA, _HA = _M + "self_attention.", _H + "self_attn."

LATENT_ATTENTION = (
    Rule(_MA + "linear_q_proj.weight", (_HA + "q_proj.weight",), column("latent_q", "hidden"), needs="has_plain_query"),
    Rule(_MA + "linear_q_down_proj.weight", (_HA + "q_a_proj.weight",), replicated("q_latent", "hidden"),
         needs="has_query_latent"),
    Rule(_MA + "q_layernorm.weight", (_HA + "q_a_layernorm.weight",), replicated("q_latent"), needs="has_query_latent"),
    Rule(_MA + "linear_q_up_proj.weight", (_HA + "q_b_proj.weight",), column("latent_q", "q_latent"),
         needs="has_query_latent"),
    Rule(_MA + "linear_kv_down_proj.weight", (_HA + "kv_a_proj_with_mqa.weight",),
         replicated("kv_latent_and_rope", "hidden")),
    Rule(_MA + "kv_layernorm.weight", (_HA + "kv_a_layernorm.weight",), replicated("kv_latent")),
    Rule(_MA + "linear_kv_up_proj.weight", (_HA + "kv_b_proj.weight",), column("latent_kv", "kv_latent")),
    Rule(_MA + "linear_proj.weight", (_HA + "o_proj.weight",), row("hidden", "latent_v")),
)  # fmt: skip

SHARED_EXPERTS = (
    Rule(_M + "mlp.router.expert_bias", (_H + "mlp.gate.e_score_correction_bias",), replicated("experts"),
         is_float32=True),
    Rule(_M + "mlp.shared_experts.linear_fc1.weight",
         (_H + "mlp.shared_experts.gate_proj.weight", _H + "mlp.shared_experts.up_proj.weight"),
         gated("shared_ffn", "hidden")),
    Rule(_M + "mlp.shared_experts.linear_fc2.weight", (_H + "mlp.shared_experts.down_proj.weight",),
         row("hidden", "shared_ffn")),
)  # fmt: skip

TABLE = (
    *(replace(rule, layers="dense") if ".mlp." in rule.megatron else rule
      for rule in TRUNK if ".self_attention." not in rule.megatron),
    *LATENT_ATTENTION,
    *(replace(rule, layers="experts") for rule in (*EXPERTS, *SHARED_EXPERTS)),
)  # fmt: skip

"""Llama: weight table. Qwen2 and Qwen3 share the trunk and add to it."""

from __future__ import annotations

from megatron_rl.convert.tables.kinds import Rule, gated, qkv, replicated, row, vocab

_M = "decoder.layers.{layer}."
_H = "model.layers.{layer}."

TRUNK = (
    Rule("embedding.word_embeddings.weight", ("model.embed_tokens.weight",), vocab("hidden")),
    Rule(_M + "input_layernorm.weight", (_H + "input_layernorm.weight",), replicated("hidden")),
    Rule(_M + "self_attention.linear_qkv.weight",
         (_H + "self_attn.q_proj.weight", _H + "self_attn.k_proj.weight", _H + "self_attn.v_proj.weight"),
         qkv("hidden")),
    Rule(_M + "self_attention.linear_proj.weight", (_H + "self_attn.o_proj.weight",), row("hidden", "q")),
    Rule(_M + "pre_mlp_layernorm.weight", (_H + "post_attention_layernorm.weight",), replicated("hidden")),
    Rule(_M + "mlp.linear_fc1.weight", (_H + "mlp.gate_proj.weight", _H + "mlp.up_proj.weight"),
         gated("ffn", "hidden")),
    Rule(_M + "mlp.linear_fc2.weight", (_H + "mlp.down_proj.weight",), row("hidden", "ffn")),
    Rule("decoder.final_layernorm.weight", ("model.norm.weight",), replicated("hidden")),
    Rule("output_layer.weight", ("lm_head.weight",), vocab("hidden"), needs="untied"),
    # Tied: the last pipeline stage keeps a copy of the embedding, where the stage of the embedding is another one.
    Rule("output_layer.weight", ("model.embed_tokens.weight",), vocab("hidden"), needs="tied", is_copy=True),
)  # fmt: skip

ATTENTION_BIAS = (
    Rule(_M + "self_attention.linear_qkv.bias",
         (_H + "self_attn.q_proj.bias", _H + "self_attn.k_proj.bias", _H + "self_attn.v_proj.bias"),
         qkv(), needs="qkv_bias"),
    # The bias of a row-parallel layer is added once, after the sum over ranks: every rank holds all of it.
    Rule(_M + "self_attention.linear_proj.bias", (_H + "self_attn.o_proj.bias",), replicated("hidden"),
         needs="proj_bias"),
)  # fmt: skip

MLP_BIAS = (
    Rule(_M + "mlp.linear_fc1.bias", (_H + "mlp.gate_proj.bias", _H + "mlp.up_proj.bias"), gated("ffn"),
         needs="mlp_bias"),
    Rule(_M + "mlp.linear_fc2.bias", (_H + "mlp.down_proj.bias",), replicated("hidden"), needs="mlp_bias"),
)  # fmt: skip

TABLE = (*TRUNK, *ATTENTION_BIAS, *MLP_BIAS)

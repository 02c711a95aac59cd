"""Layer specs: Transformer Engine's where it is installed, Megatron's local modules with our core attention elsewhere."""

from __future__ import annotations

import importlib.util

import torch
from megatron.core.models.gpt.gpt_layer_specs import (
    get_gpt_layer_local_spec,
    get_gpt_layer_with_transformer_engine_spec,
)
from megatron.core.transformer.spec_utils import ModuleSpec
from megatron.core.transformer.transformer_config import TransformerConfig

from megatron_rl.model import experts
from megatron_rl.model.attention import PackedCausalAttention


def has_transformer_engine() -> bool:
    """Whether the torch bindings of Transformer Engine are installed (the meta package alone is not enough)."""
    return importlib.util.find_spec("transformer_engine_torch") is not None


def layer_spec(config: TransformerConfig, device: torch.device) -> ModuleSpec:
    """The spec of one decoder layer where the model lives: Transformer Engine has no kernels for CPUs."""
    if device.type != "cpu" and has_transformer_engine():
        spec = get_gpt_layer_with_transformer_engine_spec(
            num_experts=config.num_moe_experts,
            moe_grouped_gemm=config.moe_grouped_gemm,
            qk_layernorm=config.qk_layernorm,
        )
    else:
        spec = get_gpt_layer_local_spec(
            num_experts=config.num_moe_experts, qk_layernorm=config.qk_layernorm, normalization=config.normalization
        )
        spec.submodules.self_attention.submodules.core_attention = PackedCausalAttention
    if config.num_moe_experts:
        spec.module = experts.Layer
        spec.submodules.mlp.submodules.router = experts.Router
    return spec

"""A layer with latent attention can be built; without the patch it cannot, and when that changes this test says so."""

from __future__ import annotations

import pytest
import torch
from megatron.core.models.gpt.gpt_layer_specs import get_gpt_layer_local_spec
from megatron.core.transformer import multi_latent_attention
from megatron.core.transformer.spec_utils import build_module
from megatron.core.transformer.transformer_config import MLATransformerConfig

from megatron_rl.model.attention import PackedCausalAttention
from tests.forked import run_ranks
from tests.tiny_gpt import init_parallel


def output_shape(*, is_patched: bool) -> tuple[int, ...]:
    config = MLATransformerConfig(
        num_layers=1, hidden_size=32, num_attention_heads=4, q_lora_rank=16, kv_lora_rank=16, qk_head_dim=8,
        qk_pos_emb_head_dim=4, v_head_dim=8, rope_type="rope", use_cpu_initialization=True, qk_layernorm=True,
        masked_softmax_fusion=False, persist_layer_norm=False, attention_dropout=0.0,
    )  # fmt: skip
    init_parallel(config)
    if not is_patched:  # as its module says after import
        multi_latent_attention.HAVE_TE = True
    spec = get_gpt_layer_local_spec(qk_layernorm=True, multi_latent_attention=True, normalization="RMSNorm")
    spec.submodules.self_attention.submodules.core_attention = PackedCausalAttention
    attention = build_module(spec.submodules.self_attention, config=config, layer_number=1)
    return tuple(attention.linear_proj(torch.zeros(3, 1, 32))[0].shape)


def test_latent_attention_is_built() -> None:
    assert run_ranks(output_shape, 1, is_patched=True) == [(3, 1, 32)]
    with pytest.raises(AssertionError, match="TypeError: isinstance"):
        run_ranks(output_shape, 1, is_patched=False)

"""Layer specs: Transformer Engine's on GPUs, Megatron's local modules on CPUs, with our core attention and emulated FP8."""

from __future__ import annotations

from functools import partial
from typing import Any

import torch
from megatron.core.models.gpt.gpt_layer_specs import (
    get_gpt_decoder_block_spec,
    get_gpt_layer_local_spec,
    get_gpt_layer_with_transformer_engine_spec,
)
from megatron.core.optimizer import Adam
from megatron.core.transformer.attention import SelfAttention
from megatron.core.transformer.multi_latent_attention import MLASelfAttention
from megatron.core.transformer.spec_utils import ModuleSpec
from megatron.core.transformer.transformer_block import TransformerBlockSubmodules
from megatron.core.transformer.transformer_config import TransformerConfig

from megatron_rl.config.installed import has_transformer_engine
from megatron_rl.errors import UserError
from megatron_rl.model import experts
from megatron_rl.model.attention import AsSpecified, GroupedAttention, LatentAttention, PackedCausalAttention
from megatron_rl.model.fp8.emulation import EMULATED, emulated


def adam_in_use() -> str:
    """The Adam that Megatron has found: Transformer Engine's, else Apex's, else torch's."""
    return f"{Adam.__module__}.{Adam.__qualname__}"


def uses_transformer_engine(chosen: str | None, device: torch.device) -> bool:
    """Decide whether a model gets Transformer Engine's layers or local ones.

    Args:
        chosen: ``policy.megatron_cfg.transformer_impl``; None takes Transformer Engine's on a GPU, local ones on a CPU.
        device: of the model.

    Raises:
        UserError: Transformer Engine's are wanted where they cannot run. A GPU gets slower layers only when asked to.
    """
    if chosen == "local" or (chosen is None and device.type == "cpu"):
        return False
    if device.type == "cpu":
        raise UserError(
            "policy.megatron_cfg.transformer_impl", chosen, "has no kernels for CPUs",
            "leave it out, which takes local layers here",
        )  # fmt: skip
    if not has_transformer_engine():
        raise UserError(
            "policy.megatron_cfg.transformer_impl", chosen, "needs Transformer Engine on a GPU, which is not installed",
            "make PLATFORM=gpu installs it; or set it to local: plain torch, slower, nothing in eight bits",
        )  # fmt: skip
    return True


def layer_spec(config: TransformerConfig, vp_stage: int | None = None) -> ModuleSpec | TransformerBlockSubmodules:
    """The spec of this stage's decoder layers.

    Args:
        config: Megatron's; its ``transformer_impl`` says whose layers, its ``moe_layer_freq`` is a list where layers differ.
        vp_stage: which chunk, under virtual pipelining.

    Returns:
        One spec for all layers, or, where they differ, a block with one for each layer of this stage.
    """
    is_local = config.transformer_impl != "transformer_engine"
    if isinstance(config.moe_layer_freq, list):
        block = get_gpt_decoder_block_spec(
            config, use_transformer_engine=not is_local, normalization=config.normalization, vp_stage=vp_stage
        )
        for spec in {id(spec): spec for spec in block.layer_specs}.values():  # layers of a kind share theirs
            _use_own_parts(spec, is_local=is_local, has_experts=hasattr(_parts(spec.submodules.mlp), "router"))
        return emulated(block) if getattr(config, EMULATED, None) else block
    options = {
        "num_experts": config.num_moe_experts,
        "qk_layernorm": config.qk_layernorm,
        "multi_latent_attention": config.multi_latent_attention,
    }
    if is_local:
        spec = get_gpt_layer_local_spec(normalization=config.normalization, **options)
    else:
        spec = get_gpt_layer_with_transformer_engine_spec(moe_grouped_gemm=config.moe_grouped_gemm, **options)
    _use_own_parts(spec, is_local=is_local, has_experts=bool(config.num_moe_experts))
    return emulated(spec) if getattr(config, EMULATED, None) else spec


def _use_own_parts(spec: ModuleSpec, *, is_local: bool, has_experts: bool) -> None:
    attention = spec.submodules.self_attention
    if attention.module is SelfAttention:
        attention.module = GroupedAttention
    if attention.module is MLASelfAttention:
        attention.module = LatentAttention if is_local else AsSpecified
    if is_local:
        attention.submodules.core_attention = PackedCausalAttention
    if has_experts:
        spec.module = experts.ExpertLayer
        _parts(spec.submodules.mlp).router = experts.ExpertRouter


def _parts(spec: ModuleSpec | partial[Any]) -> Any:
    """Submodules of a spec, or of the builder that later versions of Megatron have in the place of some specs."""
    return spec.keywords["submodules"] if isinstance(spec, partial) else spec.submodules

"""Build a Megatron model on this rank from a Hugging Face ``config.json``."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import fields
from importlib.util import find_spec
from typing import Any

import torch
import torch.nn.functional as F
from megatron.core.models.common.embeddings import rope_utils
from megatron.core.transformer.transformer_config import MLATransformerConfig, TransformerConfig
from torch import Tensor

from megatron_rl.config import Config
from megatron_rl.config.schema import check_attention
from megatron_rl.convert.architecture.deepseek_fields import LATENT_NORM_EPS
from megatron_rl.convert.architecture.rope import RopeScaling, YarnScaling
from megatron_rl.convert.architecture.shape import ModelShape
from megatron_rl.convert.tables.kinds import padded_vocab_size
from megatron_rl.errors import UserError
from megatron_rl.model.attention import OF_ATTENTION
from megatron_rl.model.experts import reduce_over_holders
from megatron_rl.model.forward import PolicyModel
from megatron_rl.model.fp8.emulation import EMULATED, finish_layers
from megatron_rl.model.fp8.recipe import check_fp8, recipe_of
from megatron_rl.model.specs import layer_spec, uses_transformer_engine
from megatron_rl.parallel.groups import Groups, build_groups

_UNEVEN_PIPELINES = (
    "num_layers_in_first_pipeline_stage", "num_layers_in_last_pipeline_stage", "pipeline_model_parallel_layout",
    "account_for_embedding_in_pipeline_split", "account_for_loss_in_pipeline_split",
)  # fmt: skip

_EXPERT_PADDING = ("moe_router_padding_for_fp8", "moe_router_padding_for_quantization")


def transformer_config(config: Config, shape: ModelShape, device: torch.device) -> TransformerConfig:
    """Build Megatron's config: shape from config.json, precision from ``trainer``, the rest from ``policy.megatron_cfg``."""
    _check_features(config, shape)
    dtype = torch.bfloat16 if config.trainer.precision == "bf16" else torch.float32
    settings: dict[str, object] = {
        "num_layers": shape.num_layers,
        "hidden_size": shape.hidden_size,
        "num_attention_heads": shape.num_attention_heads,
        "num_query_groups": shape.num_key_value_heads,
        "kv_channels": shape.head_dim,
        "ffn_hidden_size": shape.intermediate_size,
        "normalization": "RMSNorm",
        "layernorm_epsilon": shape.norm_eps,
        "activation_func": F.silu,
        "gated_linear_unit": True,
        "add_bias_linear": shape.mlp_bias,
        "add_qkv_bias": shape.qkv_bias,
        "qk_layernorm": shape.qk_norm,
        "hidden_dropout": 0.0,
        "attention_dropout": 0.0,
        "params_dtype": dtype,
        "pipeline_dtype": dtype if config.policy.pipeline_parallel_size > 1 else None,
        "bf16": dtype == torch.bfloat16,
        # Gradients are divided once, by the token count of the whole mini-batch.
        "calculate_per_token_loss": True,
        # Packs differ in length; Megatron ties shape exchange to this dispatcher even for dense models.
        "variable_seq_lengths": config.policy.pipeline_parallel_size > 1,
        "moe_token_dispatcher_type": "alltoall",
        "attention_softmax_in_fp32": True,
        "virtual_pipeline_model_parallel_size": None,
    }
    kind: type[TransformerConfig] = MLATransformerConfig if shape.latent else TransformerConfig
    settings |= _expert_settings(shape) | _latent_settings(shape)
    if config.policy.virtual_pipeline_size > 1:
        # With Megatron's defaults the interleaved schedule pairs sends and receives wrongly, and says nothing.
        settings |= {"overlap_p2p_comm": True, "batch_p2p_comm": False}
    if device.type == "cpu":
        settings["use_cpu_initialization"] = True
    else:
        # Transformer Engine brings its own kernel, but Megatron's output layer needs Apex's, built from source.
        settings["gradient_accumulation_fusion"] = find_spec("fused_weight_gradient_mlp_cuda") is not None
    is_local = not uses_transformer_engine(config.policy.megatron_cfg.get("transformer_impl"), device)
    settings["transformer_impl"] = "local" if is_local else "transformer_engine"
    if not is_local:
        check_attention(config.trainer.precision, config.policy.context_parallel_size)
        settings |= _fused_kernels(shape)
        if shape.num_experts:
            settings["moe_grouped_gemm"] = True  # one kernel for all experts of a rank, which keep their own parameters
    elif config.policy.megatron_cfg.get("cpu_offloading"):
        raise UserError(
            "policy.megatron_cfg.cpu_offloading", True, "needs Transformer Engine's layers on a GPU", "leave it out"
        )
    if shape.num_experts:
        _check_expert_kernels(config.policy.megatron_cfg, shape, device, is_local=is_local)
    recipe = recipe_of(config.policy.megatron_cfg)
    if recipe is not None:
        check_fp8(config, recipe, device, is_local=is_local)
    known = {field.name for field in fields(kind)}
    overrides = {name: value for name, value in config.policy.megatron_cfg.items() if name in known}
    if config.policy.virtual_pipeline_size == 1:
        overrides.pop("virtual_pipeline_model_parallel_size", None)
    is_emulated = recipe is not None and device.type == "cpu"
    # Emulation needs no padding of experts, which Megatron grants to its own fields alone.
    off = {"fp8": None, **dict.fromkeys(_EXPERT_PADDING, False)} if is_emulated else {}
    found = kind(**(settings | overrides | off))
    if is_emulated:
        setattr(found, EMULATED, recipe)
    setattr(found, OF_ATTENTION, _attention_settings(shape))
    return found


def _attention_settings(shape: ModelShape) -> dict[str, object]:
    """Return the fields in which a model's attention differs from its other layers; Megatron's config has one value for all."""
    settings: dict[str, object] = {}
    if shape.proj_bias != shape.mlp_bias:
        settings["add_bias_linear"] = shape.proj_bias
    if shape.latent is not None and shape.norm_eps != LATENT_NORM_EPS:
        settings["layernorm_epsilon"] = LATENT_NORM_EPS
    return settings


def _fused_kernels(shape: ModelShape) -> dict[str, object]:
    """Return the settings of Megatron's fused kernels, all off by default, for Transformer Engine's layers."""
    return {
        "bias_activation_fusion": True,  # doctor/memory.py counts what it saves
        # Of a layer without bias and dropout one addition is left to fuse.
        "bias_dropout_fusion": shape.proj_bias or shape.mlp_bias,
        # By cu_seqlens and rank, as zigzag_indices cuts them; any frequencies, but no scale of YaRN. For latent attention
        # Megatron has another kernel, which it calls experimental, and for YaRN alone.
        "apply_rope_fusion": shape.latent is None and rope_utils.fused_apply_rotary_pos_emb_thd is not None,
    }


def _expert_settings(shape: ModelShape) -> dict[str, object]:
    if not shape.num_experts:
        return {}
    settings: dict[str, object] = {
        "num_moe_experts": shape.num_experts,
        "moe_ffn_hidden_size": shape.moe_intermediate_size,
        "moe_router_topk": shape.num_experts_per_tok,
        # Weights that sum to 1 are the softmax over the chosen experts alone.
        "moe_router_pre_softmax": not shape.norm_topk_prob,
        # Balancing is another objective than the reward's: who wants it asks for it.
        "moe_router_load_balancing_type": "none",
    }
    if shape.num_dense_layers:
        settings["moe_layer_freq"] = [int(shape.has_experts(layer)) for layer in range(shape.num_layers)]
    if shape.num_shared_experts:
        settings["moe_shared_expert_intermediate_size"] = shape.dims["shared_ffn"]
    if shape.sigmoid_router is not None:
        router = shape.sigmoid_router
        settings |= {
            "moe_router_score_function": "sigmoid",
            "moe_router_pre_softmax": False,
            "moe_router_enable_expert_bias": True,
            "moe_router_bias_update_rate": 0.0,
            "moe_router_topk_scaling_factor": router.scaling_factor,
            "moe_router_dtype": "fp32",
        }
        if router.num_groups > 1:
            settings |= {"moe_router_num_groups": router.num_groups, "moe_router_group_topk": router.groups_per_tok}
    return settings


def _check_expert_kernels(
    passed: Mapping[str, Any], shape: ModelShape, device: torch.device, *, is_local: bool
) -> None:
    """Refuse kernels for experts that are not here, or would choose other experts than the model."""
    for field in ("moe_grouped_gemm", "moe_router_fusion"):
        if passed.get(field) and is_local:
            raise UserError(
                f"policy.megatron_cfg.{field}", True, "is a kernel of Transformer Engine, whose layers are not used here",
                "leave it out, which takes it where it can be used" if field == "moe_grouped_gemm" else "leave it out",
            )  # fmt: skip
    if passed.get("moe_router_fusion") and shape.sigmoid_router is not None and shape.sigmoid_router.num_groups > 1:
        raise UserError(
            "policy.megatron_cfg.moe_router_fusion", True,
            "scores groups of experts otherwise than this model's router", "leave it out",
        )  # fmt: skip
    if passed.get("moe_token_dispatcher_type") != "flex":
        return
    rule = None
    if device.type == "cpu":
        rule = "has no kernels for CPUs"
    elif find_spec("deep_ep") is None:
        rule = "needs the package deep_ep, which is not installed"
    if rule is not None:
        raise UserError(
            "policy.megatron_cfg.moe_token_dispatcher_type", "flex", rule, "leave it out: alltoall needs nothing"
        )


def _latent_settings(shape: ModelShape) -> dict[str, object]:
    if shape.latent is None:
        return {}
    latent, scaling = shape.latent, shape.rope_scaling
    settings: dict[str, object] = {
        "q_lora_rank": latent.q_lora_rank,
        "kv_lora_rank": latent.kv_lora_rank,
        "qk_head_dim": latent.qk_nope_head_dim,
        "qk_pos_emb_head_dim": latent.qk_rope_head_dim,
        "v_head_dim": latent.v_head_dim,
        "qk_layernorm": True,  # Megatron's switch for the norms over latents
        "rope_type": "rope",
        "rotary_base": shape.rope_theta,
    }
    if isinstance(scaling, YarnScaling):
        settings |= {
            "rope_type": "yarn",
            "rotary_scaling_factor": scaling.factor,
            "original_max_position_embeddings": scaling.original_max_position_embeddings,
            "beta_fast": scaling.beta_fast,
            "beta_slow": scaling.beta_slow,
            "mscale": scaling.mscale,
            "mscale_all_dim": scaling.mscale_all_dim,
        }
    return settings


def _check_features(config: Config, shape: ModelShape) -> None:
    """Refuse settings under which this model would compute wrongly or not at all, or that a checkpoint could not hold."""
    policy, passed = config.policy, config.policy.megatron_cfg
    if shape.latent is not None and policy.tensor_parallel_size > 1 and not passed.get("sequence_parallel"):
        raise UserError(
            "policy.megatron_cfg.sequence_parallel", False,
            "must be true for latent attention under tensor parallelism: the gradient of its shared key would be partial",
            "set it",
        )  # fmt: skip
    if shape.num_experts and passed.get("moe_use_legacy_grouped_gemm"):
        raise UserError(
            "policy.megatron_cfg.moe_use_legacy_grouped_gemm", True, "keeps all experts of a rank in one matrix",
            "leave it out: moe_grouped_gemm alone keeps one parameter an expert",
        )  # fmt: skip
    has_part = {
        "mlp": not shape.num_experts or shape.num_dense_layers,
        "moe": shape.num_experts,
        "shared_experts": shape.num_shared_experts,
        "mla_up_proj": shape.latent,
        "layernorm": shape.num_experts or shape.latent,  # elsewhere a part of the linear layer behind it
    }
    for module in passed.get("recompute_modules") or ():
        if not has_part.get(module, True):
            raise UserError(
                "policy.megatron_cfg.recompute_modules", passed["recompute_modules"],
                f"has nothing to compute again as {module}: this model's layers have none", "leave it out",
            )  # fmt: skip
    if (passed.get("cpu_offloading_num_layers") or 0) >= shape.num_layers:
        raise UserError(
            "policy.megatron_cfg.cpu_offloading_num_layers", passed["cpu_offloading_num_layers"],
            f"must be below the model's {shape.num_layers} layers: the last one's activations are needed at once",
            "use a smaller number",
        )  # fmt: skip
    rate = passed.get("moe_router_bias_update_rate")
    if shape.sigmoid_router is not None and rate:
        raise UserError(
            "policy.megatron_cfg.moe_router_bias_update_rate", rate,
            "must be 0: a bias that moves outside of the gradient would change the reference model as well",
            "leave it out; moe_router_load_balancing_type=seq_aux_loss balances by a loss",
        )  # fmt: skip
    if not shape.num_dense_layers:
        return
    if policy.router_replay:
        raise UserError(
            "policy.router_replay", True, "needs experts in every layer; this model's first layers have none",
            "leave it out",
        )  # fmt: skip
    sizes = {name: value for name, value in passed.items() if value and name in _UNEVEN_PIPELINES}
    num_chunks = policy.pipeline_parallel_size * policy.virtual_pipeline_size
    # The first stage holds chunks 0, pp, 2 pp, ...: with its last one it must reach beyond the dense layers.
    last = (policy.virtual_pipeline_size - 1) * policy.pipeline_parallel_size + 1
    if sizes or shape.num_layers // num_chunks * last <= shape.num_dense_layers:
        raise UserError(
            "policy.megatron_cfg.pipeline_model_parallel_size", policy.pipeline_parallel_size,
            f"must leave every stage a layer with experts, in equal stages; the first {shape.num_dense_layers} have none",
            "use fewer stages, and none of " + ", ".join(_UNEVEN_PIPELINES),
        )  # fmt: skip


def build_groups_of(config: Config, device: torch.device) -> Groups:
    """Build the process groups that a config asks for."""
    policy = config.policy
    return build_groups(
        tensor_parallel_size=policy.tensor_parallel_size,
        pipeline_parallel_size=policy.pipeline_parallel_size,
        virtual_pipeline_size=policy.virtual_pipeline_size,
        context_parallel_size=policy.context_parallel_size,
        expert_parallel_size=policy.expert_parallel_size,
        expert_tensor_parallel_size=policy.megatron_cfg.get("expert_tensor_parallel_size"),
        device=device,
        seed=config.trainer.seed,
        timeout_s=config.trainer.timeout_s,
    )


def build_chunks(config: Config, shape: ModelShape, groups: Groups) -> list[PolicyModel]:
    """Build this rank's part of the model, with random weights (a checkpoint's weights are loaded over them).

    One pipeline stage; under virtual pipelining, chunk i is stage ``i * pp_size + pp_rank`` of ``vpp * pp_size``.
    """
    megatron_config = transformer_config(config, shape, groups.device)
    count = config.policy.virtual_pipeline_size
    return [
        _build_chunk(config, megatron_config, shape, groups, index if count > 1 else None, is_last=index == count - 1)
        for index in range(count)
    ]


def _build_chunk(
    config: Config,
    megatron_config: TransformerConfig,
    shape: ModelShape,
    groups: Groups,
    vp_stage: int | None,
    *,
    is_last: bool,
) -> PolicyModel:
    model = PolicyModel(
        config=megatron_config,
        transformer_layer_spec=layer_spec(megatron_config, vp_stage),
        vocab_size=padded_vocab_size(shape.vocab_size, tp_size=groups.tp_size),
        max_sequence_length=shape.max_position_embeddings,
        pre_process=groups.pp_rank == 0 and not vp_stage,
        post_process=groups.is_last_stage and is_last,
        vp_stage=vp_stage,
        parallel_output=True,
        share_embeddings_and_output_weights=shape.tied,
        position_embedding_type="rope",
        rotary_base=shape.rope_theta,
    )
    model.true_vocab_size = shape.vocab_size
    model.temperature = config.log_prob_temperature
    # Megatron's own rope scaling fixes three of Llama 3's four parameters, so the frequencies are set from config.json.
    if shape.latent is None:  # latent attention has its own, layer by layer
        model.rotary_pos_emb.inv_freq = inverse_frequencies(shape).to(groups.device)
    finish_layers(model.decoder.layers, megatron_config)
    reduce_over_holders(model, groups)
    return model.to(groups.device)


def inverse_frequencies(shape: ModelShape) -> Tensor:
    """Return the rotary frequencies, [head_dim / 2] float32, with Llama 3's scaling where config.json asks for it.

    Llama 3 (arXiv 2407.21783, as in its released configuration): wavelengths above ``original / low_freq_factor`` are
    stretched by ``factor``, those below ``original / high_freq_factor`` are kept, and those between are interpolated.
    """
    exponents = torch.arange(0, shape.head_dim, 2, dtype=torch.float32) / shape.head_dim
    frequencies = 1.0 / (shape.rope_theta**exponents)
    scaling = shape.rope_scaling
    if not isinstance(scaling, RopeScaling):
        return frequencies
    original = scaling.original_max_position_embeddings
    low, high, factor = scaling.low_freq_factor, scaling.high_freq_factor, scaling.factor
    turns = original * frequencies / (2 * torch.pi)  # full turns within the original context
    kept_share = ((turns - low) / (high - low)).clamp(0, 1)
    return kept_share * frequencies + (1 - kept_share) * frequencies / factor

"""The model that a ``config.json`` describes, checked. Neither torch nor transformers is imported.

A field that would change the computation and that we do not implement is an error, never ignored: a model that runs
with the wrong attention trains without complaint.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from megatron_rl.convert.architecture.deepseek_fields import (
    LatentShape,
    SigmoidRouter,
    read_fp8_block,
    read_latent,
    read_router,
)
from megatron_rl.convert.architecture.fields import MAX_LENGTH, ConfigFields
from megatron_rl.convert.architecture.rope import RopeScaling, YarnScaling, read_rope

Family = Literal["llama", "mistral", "qwen2", "qwen3", "qwen3_moe", "mixtral", "deepseek_v3"]
Dtype = Literal["float32", "bfloat16", "float16"]

ARCHITECTURES: dict[Family, str] = {
    "llama": "LlamaForCausalLM",
    "mistral": "MistralForCausalLM",
    "qwen2": "Qwen2ForCausalLM",
    "qwen3": "Qwen3ForCausalLM",
    "qwen3_moe": "Qwen3MoeForCausalLM",
    "mixtral": "MixtralForCausalLM",
    "deepseek_v3": "DeepseekV3ForCausalLM",
}


@dataclass(frozen=True)
class ModelShape:
    """A decoder, dense or with a mixture of experts in its layers, as ``config.json`` describes it. Hashable."""

    family: Family
    num_layers: int
    hidden_size: int
    num_attention_heads: int
    num_key_value_heads: int
    """Megatron: ``num_query_groups``."""
    head_dim: int
    """Megatron: ``kv_channels``. Not always hidden_size / num_attention_heads (Qwen3). In latent attention: of a query."""
    intermediate_size: int
    vocab_size: int
    """Rows of the HF embedding, without Megatron's padding."""
    tied: bool
    """Output layer and embedding are one tensor: the checkpoint has no ``lm_head``."""
    norm_eps: float
    rope_theta: float
    rope_scaling: RopeScaling | YarnScaling | None
    qkv_bias: bool
    proj_bias: bool
    """Bias of the attention's output projection."""
    mlp_bias: bool
    qk_norm: bool
    """RMS norm over head_dim of each query and key head, before rotation."""
    max_position_embeddings: int
    initializer_range: float
    """Standard deviation of random weights."""
    dtype: Dtype
    """Type of the stored weights, as the config states it."""
    bos_token_id: int | None
    eos_token_ids: tuple[int, ...]
    """Ids of ``config.json`` only; ``generation_config.json`` may list more."""
    pad_token_id: int | None
    num_experts: int = 0
    """Number in each layer that has any; 0: a dense model."""
    num_experts_per_tok: int = 0
    """Megatron: ``moe_router_topk``."""
    moe_intermediate_size: int = 0
    """Width of one expert."""
    norm_topk_prob: bool = False
    """True: the chosen experts' weights sum to 1 (before a scaling factor)."""
    num_dense_layers: int = 0
    """Number of first layers that have an ordinary MLP in a model of experts."""
    num_shared_experts: int = 0
    """Number of experts that every token goes to: one MLP of that many times the width."""
    sigmoid_router: SigmoidRouter | None = None
    """None: softmax over all experts' scores."""
    latent: LatentShape | None = None
    """Multi-head latent attention; None: grouped-query attention."""
    num_mtp_layers: int = 0
    """Number of layers behind the last that predict tokens further ahead; they are in the checkpoint, not in the model."""
    fp8_block: tuple[int, int] | None = None
    """Rows and columns of weight that share a scale, where the checkpoint's weights are 8-bit floats."""

    @property
    def width_field(self) -> str:
        """Name of the field with the width along which the MLP, or each expert, is cut."""
        return "moe_intermediate_size" if self.num_experts else "intermediate_size"

    @property
    def width_fields(self) -> tuple[str, ...]:
        """Names of all such fields, for dense layers and layers of experts."""
        return (self.width_field, *(("intermediate_size",) if self.num_dense_layers else ()))

    @property
    def rotary_dim(self) -> int:
        """Number of dimensions of each query and key that are rotated."""
        return self.latent.qk_rope_head_dim if self.latent else self.head_dim

    @property
    def has_query_latent(self) -> bool:
        """Say whether queries come from a latent of their own."""
        return self.latent is not None and self.latent.q_lora_rank is not None

    @property
    def has_plain_query(self) -> bool:
        """Say whether this is latent attention in which queries come from the hidden state."""
        return self.latent is not None and self.latent.q_lora_rank is None

    def has_experts(self, layer: int) -> bool:
        """Say whether a layer (counted from 0) has experts."""
        return self.num_experts > 0 and layer >= self.num_dense_layers

    @property
    def untied(self) -> bool:
        """Say whether the checkpoint has an ``lm_head``."""
        return not self.tied

    @property
    def dims(self) -> dict[str, int]:
        """The named sizes that a weight table uses."""
        sizes = {
            "hidden": self.hidden_size, "ffn": self.intermediate_size, "vocab": self.vocab_size,
            "head": self.head_dim, "q": self.num_attention_heads * self.head_dim,
            "kv": self.num_key_value_heads * self.head_dim, "experts": self.num_experts,
            "moe_ffn": self.moe_intermediate_size, "shared_ffn": self.num_shared_experts * self.moe_intermediate_size,
        }  # fmt: skip
        if self.latent is not None:
            latent, heads = self.latent, self.num_attention_heads
            sizes |= {
                "q_latent": latent.q_lora_rank or 0, "kv_latent": latent.kv_lora_rank,
                "kv_latent_and_rope": latent.kv_lora_rank + latent.qk_rope_head_dim,
                "latent_q": heads * latent.qk_head_dim, "latent_kv": heads * (latent.qk_nope_head_dim + latent.v_head_dim),
                "latent_v": heads * latent.v_head_dim,
            }  # fmt: skip
        return sizes


def read_shape(directory: str | Path) -> ModelShape:
    """Read ``directory/config.json``, written by transformers 4 or 5.

    Raises:
        UserError: no such file, not json, a missing or ill-typed field, or a feature that we do not implement.
    """
    config = ConfigFields.read(Path(directory) / "config.json")
    family = _family(config)
    _refuse_unsupported(config, family)
    hidden_size = config.positive_int("hidden_size")
    num_heads = config.positive_int("num_attention_heads")
    # Some classes read a missing count as "one per head"; for the others it would be a fixed number, surely not meant.
    is_one_per_head = family in ("llama", "deepseek_v3")
    num_key_value_heads = config.positive_int("num_key_value_heads", num_heads if is_one_per_head else None)
    if num_heads % num_key_value_heads:
        raise config.error("num_key_value_heads", f"must divide num_attention_heads = {num_heads}")
    rope_theta, rope_scaling = read_rope(
        config,
        types=("default", "yarn") if family == "deepseek_v3" else ("default", "llama3"),
        default_theta=1e6 if family == "mixtral" else 1e4,
    )
    # Qwen2 has biases of q, k and v whatever attention_bias says, Mistral and Mixtral none; the others have all four or none.
    attention_bias = family not in ("qwen2", "mistral", "mixtral") and config.boolean("attention_bias", False)
    latent = read_latent(config) if family == "deepseek_v3" else None
    return ModelShape(
        family=family,
        num_layers=config.positive_int("num_hidden_layers"),
        hidden_size=hidden_size,
        num_attention_heads=num_heads,
        num_key_value_heads=num_key_value_heads,
        head_dim=latent.qk_head_dim if latent else _head_dim(config, family, hidden_size, num_heads),
        intermediate_size=config.positive_int("intermediate_size"),
        vocab_size=config.positive_int("vocab_size", at_most=MAX_LENGTH),
        tied=config.boolean("tie_word_embeddings", False),
        norm_eps=config.positive_float("rms_norm_eps", 1e-5 if family == "mixtral" else 1e-6),
        rope_theta=rope_theta,
        rope_scaling=rope_scaling,
        qkv_bias=family == "qwen2" or attention_bias,
        proj_bias=attention_bias,
        mlp_bias=family == "llama" and config.boolean("mlp_bias", False),
        qk_norm=family in ("qwen3", "qwen3_moe"),
        max_position_embeddings=config.positive_int("max_position_embeddings", at_most=MAX_LENGTH),
        initializer_range=config.positive_float("initializer_range", 0.02),
        dtype=_dtype(config),
        bos_token_id=config.token_id("bos_token_id"),
        eos_token_ids=config.token_ids("eos_token_id"),
        pad_token_id=config.token_id("pad_token_id"),
        latent=latent,
        **(_EXPERTS[family](config) if family in _EXPERTS else {}),
    )


def _qwen3_experts(config: ConfigFields) -> dict[str, Any]:
    if config.get("decoder_sparse_step", 1) != 1 or config.get("mlp_only_layers"):
        raise config.error(
            "mlp_only_layers",
            "every layer must have experts (decoder_sparse_step 1)",
            "use a model without dense layers",
        )
    return {
        **_chosen_experts(config, "num_experts"),
        "moe_intermediate_size": config.positive_int("moe_intermediate_size"),
        "norm_topk_prob": config.boolean("norm_topk_prob", False),
    }


def _mixtral_experts(config: ConfigFields) -> dict[str, Any]:
    if config.get("router_jitter_noise", 0) != 0:
        raise config.error("router_jitter_noise", "noise in the router is not implemented", "set it to 0")
    return {
        **_chosen_experts(config, "num_local_experts"),
        "moe_intermediate_size": config.positive_int("intermediate_size"),
        "norm_topk_prob": True,
    }


def _deepseek_experts(config: ConfigFields) -> dict[str, Any]:
    experts = _chosen_experts(config, "n_routed_experts")
    num_dense = config.count("first_k_dense_replace", 0)
    if num_dense >= config.positive_int("num_hidden_layers"):
        raise config.error("first_k_dense_replace", "leaves no layer with experts", "use a model that has some")
    # transformers calls the number of prediction layers num_mtp_layers, and reads and writes the older name as well.
    mtp_name = "num_nextn_predict_layers" if config.get("num_nextn_predict_layers") is not None else "num_mtp_layers"
    return {
        **experts,
        "moe_intermediate_size": config.positive_int("moe_intermediate_size"),
        "norm_topk_prob": config.boolean("norm_topk_prob", True),
        "num_dense_layers": num_dense,
        "num_shared_experts": config.positive_int("n_shared_experts"),
        "sigmoid_router": read_router(
            config, num_experts=experts["num_experts"], num_chosen=experts["num_experts_per_tok"]
        ),
        "num_mtp_layers": config.count(mtp_name, 0),
        "fp8_block": read_fp8_block(config),
    }


_EXPERTS = {"qwen3_moe": _qwen3_experts, "mixtral": _mixtral_experts, "deepseek_v3": _deepseek_experts}


def _chosen_experts(config: ConfigFields, name: str) -> dict[str, Any]:
    # transformers 5 writes num_local_experts where released checkpoints have the family's own name.
    if config.get(name) is None:
        name = "num_local_experts"
    num_experts, chosen = config.positive_int(name), config.positive_int("num_experts_per_tok")
    if chosen > num_experts:
        raise config.error("num_experts_per_tok", f"must not exceed {name} = {num_experts}")
    return {"num_experts": num_experts, "num_experts_per_tok": chosen}


def _family(config: ConfigFields) -> Family:
    for family, architecture in ARCHITECTURES.items():
        if config.get("model_type") == family:
            if config.get("architectures") not in (None, [architecture]):
                raise config.error("architectures", f"must be [{architecture!r}] for model_type {family!r}")
            return family
    supported = ", ".join(ARCHITECTURES)
    raise config.error("model_type", f"must be one of {supported}", "use a model of a supported family")


def _refuse_unsupported(config: ConfigFields, family: Family) -> None:
    if config.get("hidden_act", "silu") not in ("silu", "swish"):
        raise config.error("hidden_act", "only the gated silu MLP is implemented", "use a model with silu")
    if config.boolean("use_sliding_window", False):
        raise config.error(
            "use_sliding_window", "sliding-window attention is not implemented", "use a model with full attention"
        )
    # What transformers' class of Mistral takes where the field is absent; null is full attention.
    window = config.values.get("sliding_window", 4096 if family == "mistral" else None)
    if (
        family in ("mistral", "mixtral")
        and window is not None
        and window < config.positive_int("max_position_embeddings")
    ):
        raise config.error(
            "sliding_window",
            f"is {window} tokens, less than the context, and sliding-window attention is not implemented",
            "use a model with full attention, of Mistral from v0.2 on",
        )
    if any(layer != "full_attention" for layer in config.get("layer_types") or []):
        raise config.error("layer_types", "every layer must be 'full_attention'", "use a model with full attention")
    num_layers, kinds = config.positive_int("num_hidden_layers"), config.get("layer_types")
    if kinds and len(kinds) != num_layers:
        raise config.error("layer_types", f"has {len(kinds)} entries for num_hidden_layers = {num_layers}")
    if config.get("quantization_config") and family != "deepseek_v3":
        raise config.error("quantization_config", "quantized checkpoints cannot be trained", "use the original weights")
    own_code = (config.get("auto_map") or {}).get("AutoModelForCausalLM")
    # The code that came with the first DeepSeek-V3 became transformers' own class of that name.
    if own_code is not None and (family, own_code) != ("deepseek_v3", "modeling_deepseek.DeepseekV3ForCausalLM"):
        raise config.error(
            "auto_map",
            "names code of the model's own, which is not run",
            f"use a model that is transformers' own {ARCHITECTURES[family]}",
        )


def _head_dim(config: ConfigFields, family: Family, hidden_size: int, num_heads: int) -> int:
    if family in ("qwen3", "qwen3_moe"):
        head_dim = config.positive_int("head_dim", 128)
    elif config.get("head_dim") is None and hidden_size % num_heads:
        raise config.error("hidden_size", f"must be a multiple of num_attention_heads = {num_heads}")
    else:
        head_dim = config.positive_int("head_dim", hidden_size // num_heads)
    if head_dim % 2:
        raise config.error("head_dim", f"must be even for rotary embeddings, but it is {head_dim}")
    return head_dim


def _dtype(config: ConfigFields) -> Dtype:
    key = "dtype" if config.get("dtype") is not None else "torch_dtype"
    text = str(config.get(key) or "float32").removeprefix("torch.")
    for dtype in ("float32", "bfloat16", "float16"):
        if text == dtype:
            return dtype
    raise config.error(key, "must be float32, bfloat16 or float16", "use a checkpoint in one of these types")

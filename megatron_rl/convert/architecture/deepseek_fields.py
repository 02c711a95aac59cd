"""Fields that only DeepSeek-V3's ``config.json`` has: latent attention, its router, FP8 weights."""

from __future__ import annotations

from dataclasses import dataclass

from megatron_rl.convert.architecture.fields import ConfigFields

LATENT_NORM_EPS = 1e-6
"""Epsilon of the norms over latents, whatever ``rms_norm_eps`` says of the others."""


@dataclass(frozen=True)
class LatentShape:
    """Multi-head latent attention (arXiv 2405.04434, section 2.1): keys and values come from one short vector a token."""

    q_lora_rank: int | None
    """Length of the latent that queries come from; None: they come from the hidden state."""
    kv_lora_rank: int
    qk_nope_head_dim: int
    """Dimensions of each query and key head that are not rotated. Megatron: ``qk_head_dim``."""
    qk_rope_head_dim: int
    """The rotated part; all key heads share it. Megatron: ``qk_pos_emb_head_dim``."""
    v_head_dim: int

    @property
    def qk_head_dim(self) -> int:
        """Dimensions of a query or key head."""
        return self.qk_nope_head_dim + self.qk_rope_head_dim


@dataclass(frozen=True)
class SigmoidRouter:
    """Experts scored one by one and chosen within the best groups (arXiv 2412.19437, section 2.1.2)."""

    num_groups: int
    """1: experts are chosen among all."""
    groups_per_tok: int
    scaling_factor: float
    """Sum of the chosen experts' weights."""


def read_latent(config: ConfigFields) -> LatentShape:
    """Read the attention's sizes; refuse what Megatron's attention cannot express."""
    if config.boolean("attention_bias", False):
        raise config.error("attention_bias", "biases in latent attention are not implemented", "use a model without")
    if not config.boolean("rope_interleave", True):
        raise config.error("rope_interleave", "only interleaved rotary pairs are implemented", "use a model with them")
    if config.positive_int("num_key_value_heads", config.positive_int("num_attention_heads")) != config.positive_int(
        "num_attention_heads"
    ):
        raise config.error("num_key_value_heads", "must equal num_attention_heads: latent attention has no groups")
    rotated = config.positive_int("qk_rope_head_dim")
    if rotated % 2:
        raise config.error("qk_rope_head_dim", "must be even for rotary embeddings")
    if "q_lora_rank" not in config.values:
        raise config.error("q_lora_rank", "must be there: a size, or null for queries without a latent")
    return LatentShape(
        q_lora_rank=None if config.get("q_lora_rank") is None else config.positive_int("q_lora_rank"),
        kv_lora_rank=config.positive_int("kv_lora_rank"),
        qk_nope_head_dim=config.positive_int("qk_nope_head_dim"),
        qk_rope_head_dim=rotated,
        v_head_dim=config.positive_int("v_head_dim"),
    )


def read_router(config: ConfigFields, *, num_experts: int, num_chosen: int) -> SigmoidRouter:
    """Read groups and scale; refuse other ways to score, choose and weigh."""
    for key, only in (("scoring_func", "sigmoid"), ("topk_method", "noaux_tc"), ("moe_layer_freq", 1)):
        if config.get(key, only) != only:
            raise config.error(key, f"only {only!r} is implemented", "use a model of DeepSeek-V3's kind")
    if config.boolean("norm_topk_prob", True) != (num_chosen > 1):
        raise config.error(
            "norm_topk_prob", "must be true with several experts a token, false with one: what Megatron computes"
        )
    num_groups, chosen_groups = config.positive_int("n_group"), config.positive_int("topk_group")
    if num_experts % num_groups or (num_groups > 1 and num_experts < 2 * num_groups):
        raise config.error("n_group", f"must cut the {num_experts} experts into equal groups of two or more")
    if chosen_groups > num_groups or num_chosen > num_experts // num_groups * chosen_groups:
        raise config.error(
            "topk_group", f"must be at most n_group = {num_groups}, and leave {num_chosen} experts to choose"
        )
    return SigmoidRouter(num_groups, chosen_groups, config.positive_float("routed_scaling_factor"))


def read_fp8_block(config: ConfigFields) -> tuple[int, int] | None:
    """Return the (rows, columns) of 8-bit weight that share a scale; None: the weights are ordinary ones."""
    section = config.get("quantization_config")
    if not section:
        return None
    if not isinstance(section, dict) or section.get("quant_method") != "fp8" or section.get("fmt", "e4m3") != "e4m3":
        raise config.error("quantization_config", "only quant_method fp8 in e4m3 is read", "use the original weights")
    block = section.get("weight_block_size")
    if not isinstance(block, list) or len(block) != 2 or any(type(size) is not int or size < 1 for size in block):
        raise config.error("quantization_config.weight_block_size", "must be two positive integers, such as [128, 128]")
    return block[0], block[1]

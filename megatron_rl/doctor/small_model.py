"""Models small enough for a laptop, and random in a way that shows mistakes.

A norm of ones, a bias of zeros or a flat distribution would hide a dropped norm, a lost bias or a wrong head order: so norm
weights are drawn from U(0.5, 1.5), biases are not zero, there are fewer key than query heads, the vocabulary fills no
multiple of 128, and logits have a standard deviation of about 2.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

VOCABULARY = 131
_SIZES: dict[str, Any] = {
    "vocab_size": VOCABULARY, "hidden_size": 64, "intermediate_size": 96, "num_attention_heads": 8,
    "max_position_embeddings": 256, "bos_token_id": 1, "eos_token_id": 2, "pad_token_id": 0,
}  # fmt: skip
_LATENT = {
    "q_lora_rank": 48, "kv_lora_rank": 40, "qk_nope_head_dim": 12, "qk_rope_head_dim": 8, "v_head_dim": 16,
    "num_key_value_heads": 8, "n_group": 1, "topk_group": 1, "num_nextn_predict_layers": 0,
}  # fmt: skip
_DROPPED = (
    "layer_types", "max_window_layers", "torch_dtype", "dtype", "transformers_version", "quantization_config", "auto_map",
    "num_mtp_layers",
)  # fmt: skip


def write_small_model(source: Path, directory: Path, *, num_layers: int, num_experts: int, seed: int) -> None:
    """A random checkpoint of the kind that ``source`` is: its family, biases, norms, rotation and ties, in small sizes.

    Args:
        source: Hugging Face directory; only config.json is read.
        directory: created.
        num_layers: of the small model; twice as many where the source's first layers are dense.
        num_experts: of each layer, where the source has experts.
        seed: of the weights.
    """
    from transformers import AutoConfig, AutoModelForCausalLM
    from transformers.utils import logging

    given: dict[str, Any] = json.loads((source / "config.json").read_text())
    is_grouped = given.get("num_key_value_heads", given["num_attention_heads"]) < given["num_attention_heads"]
    sizes = _SIZES | {"num_hidden_layers": num_layers, "num_key_value_heads": 4 if is_grouped else 8}
    if given.get("head_dim"):
        sizes["head_dim"] = 16
    for name in ("num_experts", "num_local_experts", "n_routed_experts"):
        if given.get(name):
            sizes |= {name: num_experts, "num_experts_per_tok": 2, "moe_intermediate_size": 32}
    if given.get("kv_lora_rank"):
        sizes |= _LATENT | {"q_lora_rank": _LATENT["q_lora_rank"] if given.get("q_lora_rank") else None}
        if given.get("first_k_dense_replace"):  # twice the layers, so that the first pipeline stage has experts as well
            sizes |= {"first_k_dense_replace": 1, "num_hidden_layers": 2 * num_layers}
        for fields in (given, sizes):
            fields.pop("head_dim", None)  # transformers derives it
    fields = {name: value for name, value in given.items() if name not in _DROPPED} | sizes
    logging.disable_progress_bar()
    model = AutoModelForCausalLM.from_config(AutoConfig.for_model(**fields), dtype=torch.float32)
    randomize(model, seed=seed)
    model.save_pretrained(directory)


def randomize(model: torch.nn.Module, *, seed: int) -> None:
    """Draw all weights of a Hugging Face model; equal arguments give equal weights."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, parameter in sorted(model.named_parameters()):
            parameter.copy_(_random(name, parameter.shape, generator))
        for name, buffer in sorted(model.named_buffers()):
            if name.endswith("e_score_correction_bias"):
                buffer.copy_(_random(name, buffer.shape, generator))


def _random(name: str, shape: torch.Size, generator: torch.Generator) -> Tensor:
    if "norm" in name:
        return torch.empty(shape).uniform_(0.5, 1.5, generator=generator)
    values = torch.randn(shape, generator=generator)
    if name.endswith("bias"):
        return 0.5 * values
    if name.endswith("mlp.gate.weight"):  # routers: chosen and other experts far apart, for any rounding
        return 4.0 * values / shape[-1] ** 0.5
    # Vocabulary: the final norm gives vectors of length sqrt(hidden), hence logits with a deviation of about 2.
    scale = 2.0 if "embed_tokens" in name or "lm_head" in name else 1.0
    return values * scale / shape[-1] ** 0.5

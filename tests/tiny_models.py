"""Random Hugging Face checkpoints, small enough for any test and made to show mistakes (see doctor/small_model.py)."""

from __future__ import annotations

from pathlib import Path
from typing import Any, Literal

import torch

from megatron_rl.doctor.small_model import randomize

PAD_ID, BOS_ID, EOS_ID = 0, 1, 2

_CHARACTERS = "\n" + "".join(chr(code) for code in range(32, 127))
_DEFAULTS: dict[str, Any] = {
    "vocab_size": 131, "hidden_size": 64, "intermediate_size": 96, "num_hidden_layers": 2, "num_attention_heads": 8,
    "num_key_value_heads": 4, "max_position_embeddings": 256, "bos_token_id": BOS_ID, "eos_token_id": EOS_ID,
    "pad_token_id": PAD_ID,
}  # fmt: skip

_EXPERTS: dict[str, Any] = {
    "num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 32, "norm_topk_prob": True,
    "decoder_sparse_step": 1, "mlp_only_layers": [],
}  # fmt: skip

_MIXTRAL: dict[str, Any] = {"num_local_experts": 4, "num_experts_per_tok": 2, "intermediate_size": 32}
_DEEPSEEK: dict[str, Any] = {
    "q_lora_rank": 48, "kv_lora_rank": 40, "qk_nope_head_dim": 12, "qk_rope_head_dim": 8, "v_head_dim": 16,
    "num_key_value_heads": 8, "first_k_dense_replace": 1, "moe_intermediate_size": 32, "n_routed_experts": 8,
    "n_shared_experts": 2, "num_experts_per_tok": 3, "n_group": 4, "topk_group": 2, "routed_scaling_factor": 2.5,
    "norm_topk_prob": True, "num_nextn_predict_layers": 0, "rope_parameters": {
        "rope_type": "yarn", "rope_theta": 10000.0, "factor": 8.0, "original_max_position_embeddings": 32,
        "beta_fast": 4.0, "beta_slow": 1.0, "mscale": 1.5, "mscale_all_dim": 0.7,
    },
}  # fmt: skip
"""Three experts of two groups: Megatron's own sum over a group would be of one expert, not of two."""


def make_tiny_model(
    directory: str | Path,
    family: Literal["llama", "qwen2", "qwen3", "qwen3_moe", "mixtral", "deepseek_v3"],
    *,
    tied: bool,
    seed: int,
    dtype: str = "float32",
    tokenizer: bool = False,
    **overrides: Any,
) -> Path:
    """Write config.json and model.safetensors (and a tokenizer of one id per character) into ``directory``.

    Args:
        directory: created where it does not exist.
        family: model_type.
        tied: whether output layer and embedding are one tensor.
        seed: of the weights; equal arguments give equal files.
        dtype: "float32" or "bfloat16".
        tokenizer: also write a tokenizer: printable ASCII and newline, ids 0, 1, 2 = pad, bos, eos.
        overrides: fields of the transformers config, such as ``num_hidden_layers=4`` or ``attention_bias=True``.
    """
    from transformers import AutoConfig, AutoModelForCausalLM

    special = {
        "qwen3": {"head_dim": 16}, "qwen3_moe": {"head_dim": 16, **_EXPERTS}, "mixtral": _MIXTRAL,
        "deepseek_v3": _DEEPSEEK,
    }.get(family, {})  # fmt: skip
    fields = {**_DEFAULTS, "tie_word_embeddings": tied, **special, **overrides}
    model = AutoModelForCausalLM.from_config(AutoConfig.for_model(family, **fields))
    randomize(model, seed=seed)
    model.to(getattr(torch, dtype)).save_pretrained(directory)
    if tokenizer:
        # transformers 5 reads any tokenizer beside model_type qwen2 with Qwen2's splitting rules: spaces would vanish.
        assert family != "qwen2", "use llama or qwen3 where a test needs a tokenizer"
        assert fields["vocab_size"] >= 3 + len(_CHARACTERS), "the vocabulary does not cover the tokenizer"
        write_tokenizer(directory)
    return Path(directory)


def write_tokenizer(directory: str | Path) -> None:
    """One id per character, without special tokens added on encoding."""
    from tokenizers import Regex, Tokenizer, decoders, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    vocabulary = {"<pad>": PAD_ID, "<s>": BOS_ID, "</s>": EOS_ID}
    vocabulary |= {character: 3 + i for i, character in enumerate(_CHARACTERS)}
    tokenizer = Tokenizer(models.WordLevel(vocabulary, unk_token="<pad>"))
    tokenizer.pre_tokenizer = pre_tokenizers.Split(Regex(r"[\s\S]"), "isolated")
    tokenizer.decoder = decoders.Fuse()
    PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, pad_token="<pad>", bos_token="<s>", eos_token="</s>",
        clean_up_tokenization_spaces=False,
    ).save_pretrained(directory)  # fmt: skip

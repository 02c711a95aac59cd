"""Published models' config.json, of which a memory plan needs nothing else."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

_QWEN = {
    "model_type": "qwen2", "rms_norm_eps": 1e-6, "rope_theta": 1e6, "max_position_embeddings": 32768,
    "torch_dtype": "bfloat16", "hidden_act": "silu", "bos_token_id": 151643, "eos_token_id": 151645,
}  # fmt: skip
_SIZES = (
    "hidden_size",
    "intermediate_size",
    "num_hidden_layers",
    "num_attention_heads",
    "num_key_value_heads",
    "vocab_size",
)


def _qwen(*sizes: int, tied: bool) -> dict[str, Any]:
    return _QWEN | dict(zip(_SIZES, sizes, strict=True)) | {"tie_word_embeddings": tied}


MODELS: dict[str, dict[str, Any]] = {
    "0.5B": _qwen(896, 4864, 24, 14, 2, 151936, tied=True),
    "1.5B": _qwen(1536, 8960, 28, 12, 2, 151936, tied=True),
    "3B": _qwen(2048, 11008, 36, 16, 2, 151936, tied=True),
    "7B": _qwen(3584, 18944, 28, 28, 4, 152064, tied=False),
    "14B": _qwen(5120, 13824, 48, 40, 8, 152064, tied=False),
    "32B": _qwen(5120, 27648, 64, 40, 8, 152064, tied=False),
    "30B-A3B": _qwen(2048, 6144, 48, 32, 4, 151936, tied=False) | {
        "model_type": "qwen3_moe", "head_dim": 128, "num_experts": 128, "num_experts_per_tok": 8,
        "moe_intermediate_size": 768, "norm_topk_prob": True, "decoder_sparse_step": 1, "mlp_only_layers": [],
        "attention_bias": False,
    },
}  # fmt: skip


def write_model(folder: Path, name: str) -> Path:
    """A folder with the config.json of one of ``MODELS``."""
    folder = folder / name
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "config.json").write_text(json.dumps(MODELS[name]))
    return folder

"""The directory of a tiny model for generated tasks: a word-level tokenizer and a Qwen3 ``config.json``, no weights.

One token a word, sign or digit. Decoding joins the digits of a number, so ``#### 36`` comes back as it was written.

Qwen3 and not Qwen2, because transformers 5 takes ``model_type: qwen2`` to mean Qwen2's own tokenizer whatever
tokenizer_config.json says (MODELS_WITH_INCORRECT_HUB_TOKENIZER_CLASS): it would read our words with Qwen2's splitting
rules, and most of them would vanish without an error.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from megatron_rl.errors import UserError
from megatron_rl.files import write_atomic
from megatron_rl.tasks.word_problems import ANSWER_MARK, NAMES

if TYPE_CHECKING:
    from tokenizers import Tokenizer

PAD, END, UNKNOWN = "<pad>", "<eos>", "<unk>"
WORDS = ("has", "more", "fewer", "than", "times", "as", "many", "How", "+", "-", "*", "=", ".", "?", ANSWER_MARK)
VOCABULARY = (PAD, END, UNKNOWN, *"0123456789", *WORDS, *NAMES)
"""The tokens of word problems. 48 entries: an even share for 2, 4, 8 or 16 tensor-parallel ranks."""


def build_tokenizer(vocabulary: Sequence[str] = VOCABULARY) -> Tokenizer:
    """Build a tokenizer that splits at spaces and between digits, then looks tokens up.

    Args:
        vocabulary: tokens in the order of their ids: ``PAD``, ``END`` and ``UNKNOWN``, the ten digits, words and signs.

    Raises:
        UserError: a token occurs twice, or one that every vocabulary has is missing.
    """
    from tokenizers import AddedToken, Regex, Tokenizer, decoders, models, pre_tokenizers

    _check_vocabulary(vocabulary)
    tokenizer = Tokenizer(models.WordLevel({token: i for i, token in enumerate(vocabulary)}, unk_token=UNKNOWN))
    tokenizer.add_special_tokens([AddedToken(token, special=True) for token in (PAD, END, UNKNOWN)])
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [pre_tokenizers.WhitespaceSplit(), pre_tokenizers.Digits(individual_digits=True)]
    )
    tokenizer.decoder = decoders.Sequence(
        [
            decoders.Replace(Regex("^"), " "),
            decoders.Fuse(),
            decoders.Replace(Regex(r"(?<=\d) (?=\d)"), ""),
            decoders.Strip(" ", 1, 0),
        ]
    )
    return tokenizer


def _check_vocabulary(vocabulary: Sequence[str]) -> None:
    """Refuse a repeated token, which leaves an id without one, and a missing digit, which would read as ``UNKNOWN``."""
    missing = sorted({PAD, END, UNKNOWN, *"0123456789"} - set(vocabulary))
    if missing:
        raise UserError("vocabulary", missing, "must hold pad, end, unknown and the digits", "add what is missing")
    if len(set(vocabulary)) < len(vocabulary):
        repeated = sorted({token for token in vocabulary if vocabulary.count(token) > 1})
        raise UserError("vocabulary", repeated, "occur more than once", "name each token once")


def save_tokenizer(directory: Path, vocabulary: Sequence[str] = VOCABULARY) -> None:
    """Write the files that ``AutoTokenizer.from_pretrained`` reads."""
    tokenizer = build_tokenizer(vocabulary)
    directory.mkdir(parents=True, exist_ok=True)
    tokenizer.save(str(directory / "tokenizer.json"))
    _write_json(
        directory / "tokenizer_config.json",
        {
            "tokenizer_class": "PreTrainedTokenizerFast",
            "pad_token": PAD,
            "eos_token": END,
            "unk_token": UNKNOWN,
            "clean_up_tokenization_spaces": False,  # it would join "." to the word before
        },
    )


@dataclass(frozen=True)
class ModelSize:
    """A Qwen3-style decoder: grouped-query attention with normalised queries and keys, gated MLP, RMS norm."""

    hidden_size: int = 128
    num_layers: int = 4
    num_heads: int = 4
    num_kv_heads: int = 2
    intermediate_size: int = 384
    is_tied: bool = True
    """Output layer and embedding are one tensor."""
    max_positions: int = 256

    def __post_init__(self) -> None:
        for name, value in vars(self).items():
            if value < 1 and name != "is_tied":
                raise UserError(name, value, "must be at least 1", "give a positive number")
        if self.hidden_size % (2 * self.num_heads):
            raise UserError(
                "hidden_size",
                self.hidden_size,
                f"must be an even multiple of num_heads = {self.num_heads}",
                "rotary embeddings turn pairs, so each head needs an even width",
            )
        if self.num_heads % self.num_kv_heads:
            raise UserError(
                "num_kv_heads", self.num_kv_heads, f"must divide num_heads = {self.num_heads}", "use 1 or num_heads"
            )


def save_model(directory: Path, size: ModelSize, vocabulary: Sequence[str] = VOCABULARY) -> None:
    """Write tokenizer and ``config.json``, in the spelling of the published Qwen3 checkpoints; no weights."""
    save_tokenizer(directory, vocabulary)
    _write_json(
        directory / "config.json",
        {
            "architectures": ["Qwen3ForCausalLM"],
            "model_type": "qwen3",
            "hidden_size": size.hidden_size,
            "intermediate_size": size.intermediate_size,
            "num_hidden_layers": size.num_layers,
            "num_attention_heads": size.num_heads,
            "num_key_value_heads": size.num_kv_heads,
            "head_dim": size.hidden_size // size.num_heads,
            "attention_bias": False,
            "tie_word_embeddings": size.is_tied,
            "max_position_embeddings": size.max_positions,
            "vocab_size": len(vocabulary),
            "hidden_act": "silu",
            "rms_norm_eps": 1e-6,
            "rope_theta": 10000.0,
            "initializer_range": 0.06,
            "attention_dropout": 0.0,
            "use_sliding_window": False,
            "torch_dtype": "float32",
            "bos_token_id": None,
            "eos_token_id": vocabulary.index(END),
            "pad_token_id": vocabulary.index(PAD),
        },
    )


def _write_json(path: Path, value: dict[str, object]) -> None:
    write_atomic(path, json.dumps(value, indent=2) + "\n")

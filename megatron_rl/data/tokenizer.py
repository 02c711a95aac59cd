"""The tokenizer of a run, checked against the model that will read its ids."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from megatron_rl.convert.architecture.shape import ModelShape
from megatron_rl.errors import UserError


def load_tokenizer(directory: Path, shape: ModelShape) -> Any:
    """Load a transformers tokenizer whose every id is a row of the model's embedding.

    Raises:
        UserError: it cannot be loaded, or has ids beyond the model's vocabulary.
    """
    from transformers import AutoTokenizer

    try:
        tokenizer = AutoTokenizer.from_pretrained(directory)
    except Exception as error:  # transformers raises many kinds; all mean the same to the user
        raise UserError(
            "policy.tokenizer_path",
            str(directory),
            f"holds no tokenizer that transformers can load ({error})",
            "point it at a directory with tokenizer.json",
        ) from error
    largest = max(tokenizer.get_vocab().values())
    if largest >= shape.vocab_size:
        raise UserError(
            "policy.tokenizer_path",
            str(directory),
            f"has token id {largest}, but the model's vocabulary ends at {shape.vocab_size - 1}",
            "use the tokenizer that belongs to policy.model_path",
        )
    return tokenizer


def stop_ids(tokenizer: Any, shape: ModelShape) -> list[int]:
    """Return the ids that end a response: the tokenizer's and the model's; demonstrations end with the first.

    Raises:
        UserError: there is none, so no response could ever end.
    """
    first = [] if tokenizer.eos_token_id is None else [tokenizer.eos_token_id]
    ids = list(dict.fromkeys([*first, *shape.eos_token_ids]))
    if not ids:
        raise UserError(
            "policy.tokenizer_path",
            None,
            "neither tokenizer nor config.json names an end-of-sequence token",
            "set eos_token in the tokenizer's files",
        )
    return ids


def ids_with_newlines(tokenizer: Any) -> Tensor:
    """Return [*] int64: tokens whose text contains an end of line.

    Raises:
        UserError: there is none.
    """
    known = sorted(set(tokenizer.get_vocab().values()))
    texts = tokenizer.batch_decode([[token] for token in known])
    found = [token for token, text in zip(known, texts) if "\n" in text]
    if not found:
        raise UserError(
            "algorithm.partition.kind",
            "newlines",
            "finds no token with a line's end in this vocabulary",
            "use cut_points, tokens or equal",
        )
    return torch.tensor(found)

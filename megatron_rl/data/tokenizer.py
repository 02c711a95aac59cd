"""The tokenizer of a run, checked against the model that will read its ids."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from megatron_rl.convert.architecture.shape import ModelShape
from megatron_rl.errors import UserError, described


def load_tokenizer(directory: Path, shape: ModelShape) -> Any:
    """Load a transformers tokenizer whose every id is a row of the model's embedding.

    Raises:
        UserError: it cannot be loaded, or has ids beyond the model's vocabulary.
    """
    from transformers import AutoTokenizer

    try:
        tokenizer = AutoTokenizer.from_pretrained(directory, trust_remote_code=False)
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


def stop_ids(
    tokenizer: Any,
    shape: ModelShape,
    model: Path,
    *,
    is_chat: bool = False,
    say: Callable[[str], None] = lambda _: None,
) -> list[int]:
    """Return the ids that end a response, in every engine; rows to learn from end with the first.

    They are those of the tokenizer, of ``config.json`` and of ``generation_config.json``, and with ``is_chat`` the token that
    ends an assistant's turn in the chat template, which comes first then.

    Args:
        tokenizer: a transformers tokenizer.
        shape: of the model.
        model: its directory.
        is_chat: prompts are made by the chat template.
        say: is told where the turn ends in another token than the tokenizer's end of sequence.

    Raises:
        UserError: there is none, so no response could ever end; generation_config.json cannot be read.
    """
    turn_end = chat_end_id(tokenizer) if is_chat else None
    if turn_end is not None and turn_end != tokenizer.eos_token_id:
        name, eos = tokenizer.convert_ids_to_tokens(turn_end), tokenizer.eos_token
        say(
            f"the chat template ends a turn with {name}, the tokenizer's end of sequence is {eos}: responses stop at either"
        )
    candidates = [turn_end, tokenizer.eos_token_id, *shape.eos_token_ids, *_generation_eos_ids(model)]
    ids = [int(token) for token in dict.fromkeys(candidates) if token is not None]
    if not ids:
        raise UserError(
            "policy.tokenizer_path",
            None,
            "neither tokenizer nor config.json names an end-of-sequence token",
            "set eos_token in the tokenizer's files",
        )
    return ids


def _generation_eos_ids(model: Path) -> list[int]:
    """Read the end-of-sequence ids of ``generation_config.json``, of which instruct models have several."""
    path = model / "generation_config.json"
    if not path.is_file():
        return []
    try:
        given = json.loads(path.read_text(encoding="utf-8")).get("eos_token_id")
    except (OSError, ValueError, AttributeError) as error:
        raise UserError(str(path), None, f"cannot be read ({described(error)})", "restore it, or remove it") from error
    ids = given if isinstance(given, list) else [given] if given is not None else []
    if not all(isinstance(token, int) for token in ids):
        raise UserError(str(path), given, "eos_token_id is neither an id nor a list of ids", "correct the file")
    return ids


def chat_end_id(tokenizer: Any) -> int | None:
    """Return the token that ends an assistant's turn in the chat template; None where the template shows none.

    A turn of a marked text is rendered; the first special token after the mark is it.
    """
    if tokenizer.chat_template is None:
        return None
    mark = "0123"
    messages = [{"role": "user", "content": "?"}, {"role": "assistant", "content": mark}]
    try:
        text = tokenizer.apply_chat_template(messages, tokenize=False)
    except Exception:  # a template that takes other messages: prompts will show whether it works
        return None
    after = tokenizer(text.rpartition(mark)[2], add_special_tokens=False)["input_ids"]
    specials = set(tokenizer.all_special_ids) | {
        token for token, added in tokenizer.added_tokens_decoder.items() if added.special
    }
    return next((token for token in after if token in specials), None)


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

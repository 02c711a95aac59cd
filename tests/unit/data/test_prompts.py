"""Prompts and demonstrations that do not fit: an error that names the right place, or left out and counted."""

from __future__ import annotations

import logging

import pytest
import torch

from megatron_rl.config.data import DataConfig
from megatron_rl.data.prompts import demonstrations, tokenize_prompts
from megatron_rl.errors import UserError
from megatron_rl.types import Problem, Prompt


def tokenizer(texts, **_options):
    """One id a character."""
    return {"input_ids": [[ord(character) for character in text] for text in texts]}


def problem(prompt: str, solution: str = "s") -> Problem:
    return Problem("id", prompt, "1", solution, f"file:{len(prompt)}")


def prompts(*solutions: str) -> list[Prompt]:
    return [Prompt(problem("ab", solution), torch.tensor([97, 98])) for solution in solutions]


def test_the_file_without_a_prompt_left_is_the_one_that_is_named() -> None:
    config = DataConfig(task="gsm8k", train="t", overlong_prompts="drop")
    with pytest.raises(UserError, match="no prompt is left") as caught:
        tokenize_prompts(
            [problem("long")], tokenizer, config, context_length=4, max_new_tokens=2, field="data.validation"
        )
    assert caught.value.field == "data.validation"


def test_a_long_demonstration_is_an_error() -> None:
    with pytest.raises(UserError, match=r"exceed the context of 5 tokens.*data\.overlong_prompts=drop"):
        demonstrations(prompts("ok", "too long"), tokenizer, stop_id=0, context_length=5)


def test_long_demonstrations_are_dropped_and_counted_where_asked(caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level(logging.WARNING):
        rows = demonstrations(
            prompts("ok", "too long", "far too long"), tokenizer, stop_id=0, context_length=5, overlong="drop"
        )
    assert [row.response_ids.tolist() for row in rows] == [[111, 107, 0]]
    assert "2 of 3 rows are left out" in caplog.text


def test_dropping_every_demonstration_is_an_error() -> None:
    with pytest.raises(UserError, match="no row is left"):
        demonstrations(prompts("too long"), tokenizer, stop_id=0, context_length=5, overlong="drop")

"""The tokens that end a response: of the tokenizer, of both configs, and of the chat template."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast

from megatron_rl.convert.architecture.shape import ModelShape, read_shape
from megatron_rl.data.tokenizer import chat_end_id, stop_ids
from megatron_rl.errors import UserError
from tests.tiny_models import make_tiny_model

WORDS = ["<eos>", "<|im_start|>", "<|im_end|>", "<pad>", "user", "assistant", "?", "0123", "hello"]
CHATML = (
    "{% for m in messages %}<|im_start|> {{ m.role }} {{ m.content }} <|im_end|> {% endfor %}"
    "{% if add_generation_prompt %}<|im_start|> assistant {% endif %}"
)


def tokenizer(template: str | None = None) -> Any:
    """Words apart by blanks; end of sequence 0, ends of turns 2."""
    words = Tokenizer(models.WordLevel({word: n for n, word in enumerate(WORDS)}, unk_token="<pad>"))
    words.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    made = PreTrainedTokenizerFast(
        tokenizer_object=words, eos_token="<eos>", additional_special_tokens=["<|im_start|>", "<|im_end|>"]
    )
    made.chat_template = template
    return made


@pytest.fixture(scope="module")
def shape(tmp_path_factory: pytest.TempPathFactory) -> ModelShape:
    return replace(
        read_shape(make_tiny_model(tmp_path_factory.mktemp("m"), "qwen3", tied=True, seed=0)), eos_token_ids=(0,)
    )


@pytest.mark.parametrize(("given", "expected"), [(5, [0, 5]), ([5, 0, 6], [0, 5, 6]), (None, [0])])
def test_ends_of_generation_config_count(tmp_path: Path, shape: ModelShape, given: Any, expected: list[int]) -> None:
    (tmp_path / "generation_config.json").write_text(json.dumps({"eos_token_id": given}))
    assert stop_ids(tokenizer(), shape, tmp_path) == expected


@pytest.mark.parametrize(
    ("text", "rule"), [("{", "cannot be read"), ('{"eos_token_id": "x"}', "neither an id nor a list"), ("[]", "cannot")]
)
def test_a_broken_generation_config_is_named(tmp_path: Path, shape: ModelShape, text: str, rule: str) -> None:
    (tmp_path / "generation_config.json").write_text(text)
    with pytest.raises(UserError, match=rule):
        stop_ids(tokenizer(), shape, tmp_path)


def test_the_end_of_a_turn_comes_first_and_is_said(tmp_path: Path, shape: ModelShape) -> None:
    said: list[str] = []
    assert stop_ids(tokenizer(CHATML), shape, tmp_path, is_chat=True, say=said.append) == [2, 0]
    assert len(said) == 1 and "<|im_end|>" in said[0] and "<eos>" in said[0]
    assert stop_ids(tokenizer(CHATML), shape, tmp_path) == [0]  # texts without the template
    assert stop_ids(tokenizer(CHATML.replace("<|im_end|>", "<eos>")), shape, tmp_path, is_chat=True) == [0]


def test_templates_that_show_no_end(shape: ModelShape) -> None:
    assert chat_end_id(tokenizer()) is None
    assert chat_end_id(tokenizer("{% for m in messages %}{{ m.content }} {% endfor %}")) is None
    assert chat_end_id(tokenizer("{{ raise_exception('no') }}")) is None


def test_a_response_that_could_never_end_is_an_error(tmp_path: Path, shape: ModelShape) -> None:
    endless = tokenizer()
    endless.eos_token = None
    with pytest.raises(UserError, match="end-of-sequence"):
        stop_ids(endless, replace(shape, eos_token_ids=()), tmp_path)

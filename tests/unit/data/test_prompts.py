"""Prompts and supervised rows: those that do not fit, chat messages, and rows that are read when their turn comes."""

from __future__ import annotations

from itertools import pairwise
from typing import Any

import pytest
import torch

from megatron_rl.config.data import DataConfig
from megatron_rl.data.prompts import LazyPrompts, PromptMaker, SupervisedRowMaker, demonstrations, tokenize_prompts
from megatron_rl.data.stream import Stream
from megatron_rl.errors import UserError
from megatron_rl.types import Problem, Prompt


class LetterTokenizer:
    """One id a character; a chat template that writes roles, and refuses two turns of one role."""

    def __init__(self, *, has_template: bool = True) -> None:
        self.chat_template = "a template" if has_template else None

    def __call__(self, texts: list[str], **_options: Any) -> dict[str, Any]:
        return {"input_ids": [[ord(character) for character in text] for text in texts]}

    def apply_chat_template(
        self, messages: Any, *, tools: Any, enable_thinking: bool = True, **_options: Any
    ) -> list[int]:
        roles = [message["role"] for message in messages]
        if any(role == other for role, other in pairwise(roles)):
            raise ValueError("roles must alternate")
        text = "".join(f"<{message['role']}>{message['content']}" for message in messages)
        text += "<tools>" * bool(tools) + "<assistant>" + "<think>" * enable_thinking
        return [ord(character) for character in text]


def maker(*, tokenizer: Any = None, context_length: int = 200, max_new_tokens: int = 2, **config: Any) -> PromptMaker:
    settings = DataConfig(task="gsm8k", train="t", **config)  # type: ignore[arg-type]
    return PromptMaker(
        tokenizer or LetterTokenizer(), settings, context_length=context_length, max_new_tokens=max_new_tokens
    )


def problem(prompt: str, solution: str = "s", **more: Any) -> Problem:
    return Problem("id", prompt, "1", solution, f"file:{len(prompt)}", **more)


def prompts(*solutions: str) -> list[Prompt]:
    return [Prompt(problem("ab", solution), torch.tensor([97, 98])) for solution in solutions]


def text_of(prompt: Prompt | None) -> str:
    assert prompt is not None
    return "".join(map(chr, prompt.prompt_ids.tolist()))


def rows_of(*solutions: str, overlong: Any = "error") -> Any:
    return demonstrations(
        prompts(*solutions), SupervisedRowMaker(LetterTokenizer(), stop_id=0, context_length=5, overlong=overlong)
    )


def test_the_file_without_a_prompt_left_is_the_one_that_is_named() -> None:
    with pytest.raises(UserError, match="no prompt is left") as caught:
        tokenize_prompts([problem("long")], maker(context_length=4, overlong_prompts="drop"), field="data.validation")
    assert caught.value.field == "data.validation"


def test_a_long_demonstration_is_an_error() -> None:
    with pytest.raises(UserError, match=r"exceed the context of 5 tokens.*data\.overlong_prompts=drop"):
        rows_of("ok", "too long")


def test_long_demonstrations_are_dropped_and_counted_where_asked() -> None:
    rows, dropped = rows_of("ok", "too long", "far too long", overlong="drop")
    assert [row.response_ids.tolist() for row in rows] == [[111, 107, 0]] and dropped == 2


def test_dropping_every_demonstration_is_an_error() -> None:
    with pytest.raises(UserError, match="no row is left"):
        rows_of("too long", overlong="drop")


CHAT = ({"role": "user", "content": "hi"},)


@pytest.mark.parametrize(
    ("given", "config", "expected"),
    [
        (problem("hi"), {}, "hi"),
        (problem("hi"), {"apply_chat_template": True}, "<user>hi<assistant><think>"),
        (problem("", messages=CHAT), {}, "<user>hi<assistant><think>"),
        (problem("", messages=CHAT), {"chat_template_kwargs": {"enable_thinking": False}}, "<user>hi<assistant>"),
        (problem("", messages=CHAT), {"system_prompt": "be"}, "<system>be<user>hi<assistant><think>"),
        (
            problem("", messages=({"role": "system", "content": "own"}, *CHAT)), {"system_prompt": "be"},
            "<system>own<user>hi<assistant><think>",
        ),
        (problem("", messages=CHAT, tools=[{"name": "f"}]), {}, "<user>hi<tools><assistant><think>"),
    ],
)  # fmt: skip
def test_texts_and_chat_messages(given: Problem, config: dict[str, Any], expected: str) -> None:
    assert text_of(maker(**config).make([given])[0]) == expected


def test_texts_and_chats_of_one_file_stay_in_order() -> None:
    made = maker().make([problem("a"), problem("", messages=CHAT), problem("b")])
    assert [text_of(prompt) for prompt in made] == ["a", "<user>hi<assistant><think>", "b"]


@pytest.mark.parametrize(
    ("given", "config", "words"),
    [
        (problem("", messages=(*CHAT, *CHAT)), {}, r"file:0 = \['user', 'user'\]: .*refuses.*ValueError: roles must alternate"),
        (problem("", messages=CHAT), {"apply_chat_template": False}, "file:0 has chat messages"),
        (problem("", messages=CHAT), {"tokenizer": LetterTokenizer(has_template=False)}, "file:0.*no chat template"),
        (problem("hi"), {"tokenizer": LetterTokenizer(has_template=False), "apply_chat_template": True}, "no chat template"),
    ],
)  # fmt: skip
def test_what_a_template_cannot_do(given: Problem, config: dict[str, Any], words: str) -> None:
    with pytest.raises(UserError, match=words):
        maker(**config).make([given])


def test_of_lazy_prompts_those_that_do_not_fit_are_passed_over() -> None:
    problems = [problem("x" * length) for length in (1, 9, 2, 9, 3)]
    lazy = LazyPrompts(problems, maker(context_length=7, overlong_prompts="drop"), lambda _: None)
    stream: Stream[Prompt] = Stream(lazy, seed=1, shuffle=False)
    assert [len(prompt.prompt_ids) for prompt in stream.take(4)] == [1, 2, 3, 1]
    stream.put_back([1, 2])
    assert [len(prompt.prompt_ids) for prompt in stream.take(3)] == [2, 3, 2]


def test_a_stream_of_nothing_usable_is_an_error() -> None:
    lazy = LazyPrompts([problem("x" * 9)], maker(context_length=7, overlong_prompts="drop"), lambda _: None)
    with pytest.raises(UserError, match="none of the 1 rows can be used"):
        Stream[Prompt](lazy, seed=1, shuffle=True).take(1)


def test_a_lazy_prompt_is_checked_when_its_turn_comes() -> None:
    def refuse(one: Problem) -> None:
        raise UserError(one.source, None, "has no answer", "give one")

    with pytest.raises(UserError, match="file:2"):
        Stream[Prompt](LazyPrompts([problem("ab")], maker(), refuse), seed=1, shuffle=False).take(1)

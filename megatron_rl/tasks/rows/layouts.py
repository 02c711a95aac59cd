"""Layouts: columns by which verl, slime, NeMo-RL, TRL, OpenRLHF and published sets store problems; a mapping of others."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

from megatron_rl.errors import UserError
from megatron_rl.tasks.rows.row import Fields, Row, shorten

Message = dict[str, Any]
ROLES = ("system", "user", "assistant", "tool", "developer")


@dataclass(frozen=True)
class Layout:
    """A known set of columns."""

    name: str
    fields: Fields
    optional: tuple[str, ...] = ()
    """Names of fields whose column need not be there."""

    def fits(self, values: Mapping[str, Any]) -> bool:
        """Tell whether a row has all columns that the layout needs."""
        needed = (column for name, column in self.fields.given().items() if name not in self.optional)
        return all(find(values, column) is not None for column in needed)

    def present(self, values: Mapping[str, Any]) -> Fields:
        """Return the fields, without optional ones that a row does not have."""
        absent = [name for name in self.optional if find(values, getattr(self.fields, name) or "") is None]
        return replace(self.fields, **dict.fromkeys(absent))


LAYOUTS: tuple[Layout, ...] = (
    Layout("DAPO-Math-17k-Processed", Fields(prompt="source_prompt", answer="reward_model.ground_truth")),
    Layout("verl", Fields(prompt="prompt", answer="reward_model.ground_truth")),
    Layout("SkyRL", Fields(prompt="prompt", answer="reward_spec.ground_truth")),
    Layout("slime", Fields(prompt="prompt", answer="label")),
    Layout("TRL, prompt and completion", Fields(prompt="prompt", solution="completion", answer="answer"), ("answer",)),
    Layout("TRL", Fields(prompt="prompt", answer="solution")),
    Layout("TRL", Fields(prompt="prompt", answer="answer")),
    Layout("TRL", Fields(prompt="prompt", answer="ground_truth")),
    Layout("OpenRLHF", Fields(prompt="context_messages", answer="label"), ("answer",)),
    Layout("OpenRLHF", Fields(question="input", answer="label")),
    Layout("OpenRLHF", Fields(question="input", answer="answer")),
    Layout("NeMo-RL", Fields(question="input", answer="output")),
    Layout(
        "NeMo-RL", Fields(question="problem", answer="expected_answer", solution="generated_solution"), ("solution",)
    ),
    Layout("chat messages", Fields(prompt="messages", answer="answer"), ("answer",)),
    Layout("OlympiadBench", Fields(question="question", answer="final_answer", solution="solution"), ("solution",)),
    Layout("question and answer", Fields(question="question", answer="answer", solution="solution"), ("solution",)),
    Layout("problem and answer", Fields(question="problem", answer="answer", solution="solution"), ("solution",)),
    Layout("problem and answer", Fields(question="Problem", answer="Answer", solution="Solution"), ("solution",)),
    Layout("problem and worked solution", Fields(question="problem", solution="solution")),
    Layout("question and worked solution", Fields(question="question", solution="solution")),
    Layout("prompts alone", Fields(prompt="prompt")),
)
"""The first that fits is taken: those that need more come before those that need less."""


def find(values: Mapping[str, Any], column: str) -> Any:
    """Return what a dotted column leads to, or None. A column whose own name has the dots comes first."""
    if column in values:
        return values[column]
    first, dot, rest = column.partition(".")
    inner = values.get(first)
    if isinstance(inner, str) and dot:  # some writers store nested values as JSON
        try:
            inner = json.loads(inner)
        except ValueError:
            return None
    return find(inner, rest) if dot and isinstance(inner, Mapping) else None


def recognise(row: Row) -> Layout:
    """Return the layout of a file by one of its rows.

    Raises:
        UserError: it is none that is known.
    """
    for layout in LAYOUTS:
        if layout.fits(row.values):
            return Layout(layout.name, layout.present(row.values), layout.optional)
    raise UserError(
        row.source,
        shorten(", ".join(row.values)),
        "has the columns of no layout that is known",
        "say which column is which: data.fields.prompt=COLUMN (or .question), data.fields.answer=COLUMN",
    )


@dataclass(frozen=True)
class Example:
    """A row by what its columns mean."""

    source: str
    prompt: str | None
    """Text that the model reads as it stands; or None, where ``messages`` or ``question`` has it."""
    messages: tuple[Message, ...] | None
    question: str | None
    answer: str | None
    solution: str | None
    metadata: dict[str, Any]
    tools: list[Any] | None


def read_example(row: Row) -> Example:
    """Read a row by its ``fields``, else by the layout that it fits.

    Raises:
        UserError: a column is not there, or holds something else than it should.
    """
    mapping = row.fields or recognise(row).fields
    used = {column.partition(".")[0] for column in mapping.given().values()}
    prompt, messages, question = None, None, None
    solution = _solution(row, mapping.solution)
    if mapping.prompt is not None:
        value = _value(row, mapping.prompt)
        if isinstance(value, list | tuple):
            messages, last = split_messages(value, row.source, mapping.prompt)
            solution = solution or last
        else:
            prompt = _text(row, mapping.prompt, value)
    if mapping.question is not None:
        question = _text(row, mapping.question, _value(row, mapping.question))
    answer = None if mapping.answer is None else answer_text(_value(row, mapping.answer), row, mapping.answer)
    tools = None if mapping.tools is None else find(row.values, mapping.tools)
    if isinstance(tools, str):
        try:
            tools = json.loads(tools)
        except ValueError as error:
            rule = f"column {mapping.tools!r} is not JSON ({error})"
            raise UserError(
                row.source, shorten(tools), rule, "write a list of tools as JSON, or leave it null"
            ) from None
    metadata = row.rest(used - _kept(mapping))
    if mapping.metadata is not None:
        given = find(row.values, mapping.metadata)
        metadata = dict(given) if isinstance(given, Mapping) else {} if given is None else {mapping.metadata: given}
    return Example(row.source, prompt, messages, question, answer, solution, metadata, tools)


def _kept(mapping: Fields) -> set[str]:
    """Return used columns that a reward may still ask for: answers by their own name, and those used in part."""
    in_part = {column.partition(".")[0] for column in mapping.given().values() if "." in column}
    by_name = {column for column in (mapping.answer, mapping.solution) if column not in (None, "answer")}
    return in_part | by_name


def _value(row: Row, column: str) -> Any:
    value = find(row.values, column)
    if value is None:
        raise row.missing(column)
    return value


def _text(row: Row, column: str, value: Any) -> str:
    if not isinstance(value, str):
        raise UserError(row.source, shorten(value), f"column {column!r} is no text", "name a column of texts")
    if not value.strip():
        raise UserError(row.source, value, f"column {column!r} is empty", "fill it in or remove the row")
    return row.encodable(value, column)


def _solution(row: Row, column: str | None) -> str | None:
    value = None if column is None else find(row.values, column)
    if isinstance(value, list | tuple) and value and isinstance(value[-1], Mapping):
        value = value[-1].get("content")
    return None if value is None or column is None else _text(row, column, value)


def answer_text(value: Any, row: Row, column: str) -> str:
    """Return a reference answer as a text: a number by its digits, a list of one by its item, other values as JSON."""
    if isinstance(value, list | tuple) and len(value) == 1:
        value = value[0]
    if isinstance(value, str):
        return _text(row, column, value)
    if isinstance(value, float) and value.is_integer():
        value = int(value)
    return json.dumps(value, ensure_ascii=False)


def _content(value: Any, source: str, column: str) -> str | None:
    """Return the text of a turn: a text as it is, parts ``{"type": "text", "text": ...}`` joined."""
    if value is None or isinstance(value, str):
        return value
    found = [part.get("text") if isinstance(part, Mapping) else None for part in value]
    texts = [text for text in found if isinstance(text, str)]
    if len(texts) < len(found):
        rule = f"column {column!r}: the last turn of the assistant has parts that are no text"
        raise UserError(source, shorten(value), rule, "leave such rows out")
    return "".join(texts)


def split_messages(value: Sequence[Any], source: str, column: str) -> tuple[tuple[Message, ...], str | None]:
    """Check chat messages; return those that the model reads, and the text of an assistant's turn that ends them.

    Raises:
        UserError: they are none, or have no user's turn to answer.
    """
    fix = 'write [{"role": "user", "content": "..."}]'
    messages: list[Message] = []
    for number, message in enumerate(value):
        if not isinstance(message, Mapping) or "role" not in message:
            raise UserError(source, shorten(message), f"column {column!r}: message {number} has no role", fix)
        if message["role"] not in ROLES:
            rule = f"column {column!r}: message {number} is of none of {', '.join(ROLES)}"
            raise UserError(source, message["role"], rule, fix)
        # A table has every message's keys in all of them.
        messages.append({name: inner for name, inner in message.items() if inner is not None})
    last = None
    if messages and messages[-1]["role"] == "assistant":
        last = _content(messages.pop().get("content"), source, column)
    if not any(message["role"] == "user" and message.get("content") for message in messages):
        raise UserError(source, shorten(value), f"column {column!r} has no user's turn to answer", fix)
    return tuple(messages), last

"""One row of a problem file, and the checks of its values."""

from __future__ import annotations

import datetime
import decimal
import difflib
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, fields
from typing import Any

from megatron_rl.errors import UserError


@dataclass(frozen=True)
class Fields:
    """Columns of a problem file by what they hold; a dot leads into a column: ``reward_model.ground_truth``."""

    prompt: str | None = None
    """The text or the chat messages that the model reads as they stand."""
    question: str | None = None
    """A text that goes into ``data.template``, in place of ``prompt``."""
    answer: str | None = None
    """The reference answer: a text, a number, or anything else, which then becomes JSON. Without one only a reward of one's
    own can judge."""
    solution: str | None = None
    """A worked answer, which supervised training learns from: a text, or an assistant's message."""
    metadata: str | None = None
    """A column of further values for the reward; None gives it all columns that have no other use."""
    tools: str | None = None
    """Descriptions of tools, for the chat template."""

    def __bool__(self) -> bool:
        return bool(self.given())

    def given(self) -> dict[str, str]:
        """Return the columns that are named."""
        found = {field.name: getattr(self, field.name) for field in fields(self)}
        return {name: column for name, column in found.items() if column is not None}

    def described(self) -> str:
        """Say them: ``prompt <- prompt, answer <- label``."""
        return ", ".join(f"{name} <- {column}" for name, column in self.given().items())


@dataclass(frozen=True)
class Row:
    """One row, with its place for error messages."""

    source: str
    """``file:line`` of a file of lines, ``file row 12`` of others, counted from 0."""
    values: Mapping[str, Any]
    """Column -> JSON value."""
    fields: Fields | None = None
    """The meaning of the columns; None where nobody has said."""

    def text(self, name: str) -> str:
        """Return a column that every row holds as a text with something in it.

        Raises:
            UserError: it is missing, no text, empty, or cannot be encoded.
        """
        if name not in self.values:
            raise self.missing(name)
        value = self.optional_text(name)
        if value is None:
            raise UserError(self.source, None, f"field {name!r} must be a string, and is null", "fill it in")
        if not value.strip():
            raise UserError(self.source, value, f"field {name!r} is empty", "fill it in or remove the row")
        return value

    def optional_text(self, name: str) -> str | None:
        """Return a column that is a text where a row has it; None where it is absent or null.

        Raises:
            UserError: it is no text, or cannot be encoded.
        """
        value = self.values.get(name)
        if value is None:
            return None
        if not isinstance(value, str):
            raise UserError(self.source, shorten(value), f"field {name!r} must be a string", "put it in quotes")
        return self.encodable(value, name)

    def encodable(self, text: str, name: str) -> str:
        """Return a text, if it has no lone surrogate such as "\\ud800": JSON may carry one, and tokenizers crash on it."""
        try:
            text.encode()
        except UnicodeEncodeError:
            rule = f"field {name!r} has half a surrogate pair"
            raise UserError(self.source, shorten(text), rule, "write the whole character") from None
        return text

    def missing(self, name: str) -> UserError:
        """Say that the row has no such column, and which are spelt alike."""
        near = difflib.get_close_matches(name, self.values, n=3, cutoff=0.4)
        fix = (
            f"did you mean {' or '.join(near)}?" if near else "add it to the row, or name another column in data.fields"
        )
        return UserError(self.source, shorten(", ".join(self.values)), f"has no field {name!r}", fix)

    def rest(self, used: Iterable[str]) -> dict[str, Any]:
        """Return the other columns."""
        return {name: value for name, value in self.values.items() if name not in set(used)}


def shorten(value: object, limit: int = 80) -> str:
    """Cut a value to the length of an error message."""
    text = value if isinstance(value, str) else repr(value)
    return text if len(text) <= limit else f"{text[:limit]}..."


def as_json(value: Any) -> Any:
    """Return a value of a table as JSON has it: times as texts, decimals as numbers; bytes (images, audio) become None."""
    if isinstance(value, Mapping):
        return {str(name): as_json(inner) for name, inner in value.items()}
    if isinstance(value, list | tuple):
        return [as_json(inner) for inner in value]
    if isinstance(value, datetime.date | datetime.time):
        return value.isoformat()
    if isinstance(value, datetime.timedelta):
        return value.total_seconds()
    if isinstance(value, decimal.Decimal):
        return int(value) if value == value.to_integral_value() else float(value)
    return value if isinstance(value, str | int | float | bool | None) else None

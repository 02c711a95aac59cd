"""The reader of problem files that tasks share: ``.jsonl``, plain or gzipped, every mistake named by file and line."""

from __future__ import annotations

import gzip
import json
import sys
import zlib
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, BinaryIO, NamedTuple, cast

from megatron_rl.errors import UserError
from megatron_rl.files import SAME_COMMAND, atomic_file, disk_errors
from megatron_rl.types import Problem


class JsonRow(NamedTuple):
    """One row of a problem file."""

    source: str
    """``file:line``."""
    fields: dict[str, str]
    """The strings that were asked for."""
    rest: dict[str, Any]
    """All other values of the row, as JSON has them: ``Problem.metadata``."""


def read_rows(path: Path, *, required: Sequence[str], optional: Sequence[str] = ()) -> Iterator[JsonRow]:
    """Read the rows of a ``.jsonl`` or ``.jsonl.gz`` file.

    Blank lines at the end are skipped; an ``optional`` field may be absent or null.

    Args:
        path: the file.
        required: fields that every row holds as a non-empty string.
        optional: fields that are strings where a row has them.

    Raises:
        UserError: at the first thing that is wrong with the file or a line of it; also when it has no row.
    """
    num_rows, blank = 0, 0
    for number, line in enumerate(_lines(path), start=1):
        if not line.strip():
            blank = blank or number
            continue
        if blank:  # something was cut out here, or the file was put together wrongly
            raise UserError(f"{path}:{blank}", None, "is an empty line between rows", "remove it, or restore the row")
        source = f"{path}:{number}"
        row = _parse(line, source)
        # Interned names: each is one string in memory, however many rows have it.
        rest = {sys.intern(name): value for name, value in row.items() if name not in (*required, *optional)}
        yield JsonRow(source, _fields(row, source, required, optional), rest)
        num_rows += 1
    if num_rows == 0:
        raise UserError(str(path), None, "has no row", "give a file with one JSON object a line")


def copy_rows(problems: Sequence[Problem], target: Path) -> None:
    """Write the rows that problems were read from, as they stand there, to another ``.jsonl`` file: whole or not at all.

    Raises:
        UserError: a file cannot be read, or the other not be written.
    """
    wanted: dict[str, set[int]] = {}
    for problem in problems:
        path, _, line = problem.source.rpartition(":")
        wanted.setdefault(path, set()).add(int(line))
    with (
        disk_errors(target, fix=SAME_COMMAND),
        atomic_file(target) as temporary,
        temporary.open("w", encoding="utf-8") as file,
    ):
        for path, numbers in wanted.items():
            for number, line in enumerate(_lines(Path(path)), start=1):
                if number in numbers:
                    file.write(line.rstrip("\r\n") + "\n")


def shorten(value: object, limit: int = 80) -> str:
    """Cut a value to the length of an error message."""
    text = value if isinstance(value, str) else repr(value)
    return text if len(text) <= limit else f"{text[:limit]}..."


def _lines(path: Path) -> Iterator[str]:
    if not path.name.endswith((".jsonl", ".jsonl.gz")):
        raise UserError(str(path), None, "must be a .jsonl or .jsonl.gz file", "name a problem file")
    number = 0
    try:
        with _open(path) as file:
            for number, line in enumerate(file, start=1):
                # Editors on Windows put a byte-order mark first, which json refuses.
                yield line.decode("utf-8-sig" if number == 1 else "utf-8")
    except UnicodeDecodeError as error:
        raise UserError(f"{path}:{number}", None, f"is not UTF-8 ({error.reason})", "save the file as UTF-8") from error
    except (EOFError, gzip.BadGzipFile, zlib.error) as error:  # before OSError: BadGzipFile is one
        raise UserError(
            f"{path}:{number + 1}", None, f"is not whole gzip data ({error})", "compress it again"
        ) from error
    except OSError as error:
        raise UserError(
            str(path), None, f"cannot be read ({error.strerror})", "give the path of a readable file"
        ) from error


def _open(path: Path) -> BinaryIO:
    return cast(BinaryIO, gzip.open(path)) if path.name.endswith(".gz") else path.open("rb")


def _parse(line: str, source: str) -> dict[str, Any]:
    try:
        row = json.loads(line, object_pairs_hook=lambda pairs: _without_repeats(pairs, source))
    except UserError:
        raise
    except (ValueError, RecursionError) as error:  # ValueError also covers integers of more than 4300 digits
        raise UserError(
            source, shorten(line.strip()), f"is not JSON ({error})", "write one JSON object a line"
        ) from error
    if not isinstance(row, dict):
        raise UserError(source, shorten(row), "is not a JSON object", "write one object {...} a line")
    return row


def _without_repeats(pairs: list[tuple[str, Any]], source: str) -> dict[str, Any]:
    """Refuse a repeated key, of which json would keep the last one in silence."""
    row = dict(pairs)
    if len(row) < len(pairs):
        names = [name for name, _ in pairs]
        repeated = next(name for name in names if names.count(name) > 1)
        raise UserError(source, repeated, "occurs twice in the row", "keep one of the two fields")
    return row


def _fields(row: dict[str, Any], source: str, required: Sequence[str], optional: Sequence[str]) -> dict[str, str]:
    fields: dict[str, str] = {}
    for name in (*required, *optional):
        value = row.get(name)
        if value is None and name in optional:
            continue
        if name not in row:
            raise UserError(
                source, shorten(", ".join(row)), f"has no field {name!r}", f"add it; rows need {', '.join(required)}"
            )
        if not isinstance(value, str):
            raise UserError(source, shorten(value), f"field {name!r} must be a string", "put it in quotes")
        if name in required and not value.strip():
            raise UserError(source, value, f"field {name!r} is empty", "fill it in or remove the row")
        if not _is_encodable(value):
            raise UserError(
                source, shorten(value), f"field {name!r} has half a surrogate pair", "write the whole character"
            )
        fields[name] = value
    return fields


def _is_encodable(text: str) -> bool:
    """Tell text from a lone surrogate such as "\\ud800", which JSON may carry and on which tokenizers crash later."""
    try:
        text.encode()
    except UnicodeEncodeError:
        return False
    return True

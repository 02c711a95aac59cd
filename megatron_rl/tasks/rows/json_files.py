"""Rows of ``.jsonl``, ``.jsonl.gz`` and ``.json`` files; every mistake is named by file and line."""

from __future__ import annotations

import gzip
import json
import os
import zlib
from array import array
from collections.abc import Sequence
from itertools import islice
from pathlib import Path
from typing import Any

from megatron_rl.errors import UserError
from megatron_rl.tasks.rows.row import Row, shorten

READABLE = "give the path of a readable file"


class JsonLines(Sequence[Row]):
    """The rows of a file with one JSON object a line. Rows are read when they are asked for: only their places are kept.

    Of a compressed file, which has no places, the lines are kept.
    """

    def __init__(self, path: Path, *, at_most: int | None = None) -> None:
        """Find the lines. Blank ones at the end are left out.

        Args:
            path: the file.
            at_most: lines that are looked for; None looks for all.

        Raises:
            UserError: the file cannot be read, or has an empty line between rows.
        """
        self._path = path
        self._starts = array("q")
        """Offset of each line of a plain file, and of its end."""
        self._lines: list[bytes] = []
        """All lines of a compressed file."""
        is_plain = not path.name.endswith(".gz")
        number = blank = 0
        try:
            with path.open("rb") if is_plain else gzip.open(path) as file:
                self._starts.append(0)
                for number, line in enumerate(islice(file, at_most), start=1):
                    if not line.strip():
                        blank = blank or number
                        continue
                    if blank:  # something was cut out here, or the file was put together wrongly
                        rule = "is an empty line between rows"
                        raise UserError(f"{path}:{blank}", None, rule, "remove it, or restore the row")
                    if is_plain:
                        self._starts.append(self._starts[-1] + len(line))
                    else:
                        self._lines.append(line)
        except (EOFError, gzip.BadGzipFile, zlib.error) as error:  # before OSError: BadGzipFile is one
            rule = f"is not whole gzip data ({error})"
            raise UserError(f"{path}:{number + 1}", None, rule, "compress it again") from error
        except OSError as error:
            raise UserError(str(path), None, f"cannot be read ({error.strerror})", READABLE) from error

    def __len__(self) -> int:
        return len(self._starts) - 1 if not self._lines else len(self._lines)

    def __getitem__(self, index: Any) -> Any:
        index = range(len(self))[index]
        return Row(self.source(index), parse(self.line(index), self.source(index)))

    def source(self, index: int) -> str:
        """Name a row."""
        return f"{self._path}:{index + 1}"

    def line(self, index: int) -> str:
        """Return the text of a row as it stands in the file, without the line's end.

        Raises:
            UserError: it is not UTF-8, or the file cannot be read any more.
        """
        try:
            data = self._lines[index] if self._lines else self._read(self._starts[index], self._starts[index + 1])
            # Editors on Windows put a byte-order mark first, which json refuses.
            return data.decode("utf-8-sig" if index == 0 else "utf-8").rstrip("\r\n")
        except UnicodeDecodeError as error:
            rule = f"is not UTF-8 ({error.reason})"
            raise UserError(self.source(index), None, rule, "save the file as UTF-8") from error
        except OSError as error:
            raise UserError(str(self._path), None, f"cannot be read ({error.strerror})", READABLE) from error

    def _read(self, start: int, end: int) -> bytes:
        file = os.open(self._path, os.O_RDONLY)
        try:
            return os.pread(file, end - start, start)
        finally:
            os.close(file)


class JsonArray(Sequence[Row]):
    """The rows of a file that is one JSON array of objects, or of columns of equal length. All of it is kept in memory."""

    def __init__(self, path: Path) -> None:
        """Read the file.

        Raises:
            UserError: it cannot be read, or is nothing of the kind.
        """
        self._path = path
        try:
            loaded = json.loads(path.read_text(encoding="utf-8-sig"), object_pairs_hook=_unrepeated(str(path)))
        except UnicodeDecodeError as error:
            raise UserError(str(path), None, f"is not UTF-8 ({error.reason})", "save the file as UTF-8") from error
        except OSError as error:
            raise UserError(str(path), None, f"cannot be read ({error.strerror})", READABLE) from error
        except (ValueError, RecursionError) as error:
            raise UserError(str(path), None, f"is not JSON ({error})", "correct it, or write .jsonl") from error
        if isinstance(loaded, dict):  # as pandas writes one
            columns = list(loaded.values())
            if columns and all(isinstance(column, list) and len(column) == len(columns[0]) for column in columns):
                loaded = [dict(zip(loaded, values)) for values in zip(*columns)]
        if not isinstance(loaded, list):
            raise UserError(str(path), shorten(loaded), "is not an array of rows", "write [{...}, {...}], or .jsonl")
        self._rows: list[Any] = loaded

    def __len__(self) -> int:
        return len(self._rows)

    def __getitem__(self, index: Any) -> Any:
        index = range(len(self))[index]
        source, row = f"{self._path} row {index}", self._rows[index]
        if not isinstance(row, dict):
            raise UserError(source, shorten(row), "is not a JSON object", "write an object {...} for each row")
        return Row(source, row)


def open_json(path: Path) -> Sequence[Row]:
    """Open a ``.json`` file, which may be an array, or have an object a line as ``.jsonl``."""
    try:
        with path.open("rb") as file:
            first, second = (file.readline().lstrip(b"\xef\xbb\xbf").strip() for _ in range(2))
    except OSError as error:
        raise UserError(str(path), None, f"cannot be read ({error.strerror})", READABLE) from error
    is_lines = first.startswith(b"{") and first.endswith(b"}") and second.startswith(b"{")
    return JsonLines(path) if is_lines else JsonArray(path)


def parse(line: str, source: str) -> dict[str, Any]:
    """Parse one line.

    Raises:
        UserError: it is not a JSON object, or has a key twice.
    """
    try:
        row = json.loads(line, object_pairs_hook=_unrepeated(source))
    except (ValueError, RecursionError) as error:  # ValueError also covers integers of more than 4300 digits
        shown = shorten(line.strip())
        raise UserError(source, shown, f"is not JSON ({error})", "write one JSON object a line") from error
    if not isinstance(row, dict):
        raise UserError(source, shorten(row), "is not a JSON object", "write one object {...} a line")
    return row


def _unrepeated(source: str) -> Any:
    """Return a hook that refuses a repeated key, of which json would keep the last one in silence."""

    def check(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
        row = dict(pairs)
        if len(row) < len(pairs):
            names = [name for name, _ in pairs]
            repeated = next(name for name in names if names.count(name) > 1)
            raise UserError(source, repeated, "occurs twice in the row", "keep one of the two fields")
        return row

    return check

"""Problem files opened: each form by its reader, slices cut, several files one after the other."""

from __future__ import annotations

from bisect import bisect_right
from collections.abc import Iterator, Sequence
from itertools import accumulate
from pathlib import Path
from typing import Any

from megatron_rl.errors import UserError
from megatron_rl.tasks.rows.json_files import JsonLines, open_json
from megatron_rl.tasks.rows.row import Row
from megatron_rl.tasks.rows.spec import Spec, parse_spec


class RowSlice(Sequence[Row]):
    """Rows from one to another."""

    def __init__(self, rows: Sequence[Row], start: int | None, stop: int | None) -> None:
        """Cut as Python does."""
        self._rows, self._range = rows, range(len(rows))[start:stop]

    def __len__(self) -> int:
        return len(self._range)

    def __getitem__(self, index: Any) -> Any:
        return self._rows[self._range[index]]


class Joined(Sequence[Row]):
    """The rows of several files, one after the other."""

    def __init__(self, parts: Sequence[Sequence[Row]]) -> None:
        """Take the files in order."""
        self.parts = parts
        self._ends = list(accumulate(map(len, parts)))

    def __len__(self) -> int:
        return self._ends[-1]

    def __getitem__(self, index: Any) -> Any:
        index = range(len(self))[index]
        number = bisect_right(self._ends, index)
        return self.parts[number][index - (self._ends[number] - len(self.parts[number]))]

    def __iter__(self) -> Iterator[Row]:
        for part in self.parts:
            yield from part


def open_rows(texts: Sequence[str], *, field: str, split: str = "train") -> Joined:
    """Open what a config key names.

    Args:
        texts: paths and ids, as ``parse_spec`` takes them.
        field: config key, for errors.
        split: of sets that have several.

    Raises:
        UserError: something cannot be read, or has no row.
    """
    return Joined([_open(parse_spec(text, field), field, split) for text in texts])


def first_row(spec: Spec) -> Row | None:
    """Return the first row of a file, quickly; None of a folder or a set on the hub.

    Raises:
        UserError: the file cannot be read, or has no row.
    """
    path = Path(spec.path)
    if not path.is_file():
        return None
    if path.name.endswith(".parquet"):
        from megatron_rl.tasks.rows.tables import first_parquet_row

        return Row(f"{spec.path} row 0", first_parquet_row(path))
    rows = open_json(path) if path.name.endswith(".json") else JsonLines(path, at_most=1)
    if len(rows) == 0:
        raise UserError(spec.text, None, "has no row", "give a file that has some")
    return rows[0]


def check_lines(spec: Spec, *, at_most: int) -> None:
    """Parse the first lines of a ``.jsonl`` file of which all rows are wanted; other files are left alone.

    Raises:
        UserError: naming the line that is no row.
    """
    path = Path(spec.path)
    if path.name.endswith((".jsonl", ".jsonl.gz")) and path.is_file() and spec.start is None and spec.stop is None:
        for _ in JsonLines(path, at_most=at_most):
            pass


def _open(spec: Spec, field: str, split: str) -> Sequence[Row]:
    path = Path(spec.path)
    if not path.is_file() or path.name.endswith(".parquet"):
        from megatron_rl.tasks.rows.tables import open_table

        rows: Sequence[Row] = open_table(spec, field=field, split=split)
    else:
        rows = open_json(path) if path.name.endswith(".json") else JsonLines(path)
    if len(rows) == 0:
        raise UserError(spec.text, None, "has no row", "give a file that has some")
    if spec.start is None and spec.stop is None:
        return rows
    rows = RowSlice(rows, spec.start, spec.stop)
    if len(rows) == 0:
        raise UserError(field, spec.text, "takes no row of the file", "correct the slice")
    return rows

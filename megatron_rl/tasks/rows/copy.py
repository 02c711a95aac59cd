"""Some rows of problem files, copied to a file of their own."""

from __future__ import annotations

import json
from collections.abc import Container, Sequence
from pathlib import Path

from megatron_rl.files import SAME_COMMAND, atomic_file, disk_errors
from megatron_rl.tasks.rows.json_files import JsonLines
from megatron_rl.tasks.rows.open import open_rows


def copy_rows(files: Sequence[str], sources: Container[str], target: Path, *, field: str) -> None:
    """Write rows to a ``.jsonl`` file, whole or not at all: lines as they stand, rows of tables as JSON.

    Args:
        files: that ``open_rows`` takes.
        sources: which rows, by ``Row.source``.
        target: the file.
        field: config key of ``files``, for errors.

    Raises:
        UserError: a file cannot be read, or the other not be written.
    """
    rows = open_rows(files, field=field)
    with (
        disk_errors(target, fix=SAME_COMMAND),
        atomic_file(target) as temporary,
        temporary.open("w", encoding="utf-8") as file,
    ):
        for part in rows.parts:
            for index, row in enumerate(part):
                if row.source in sources:
                    line = (
                        part.line(index)
                        if isinstance(part, JsonLines)
                        else json.dumps(dict(row.values), ensure_ascii=False)
                    )
                    file.write(line + "\n")

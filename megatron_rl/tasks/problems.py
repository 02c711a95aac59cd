"""The problems of a run: rows of files, made into problems by a task, all at once or each when it is asked for."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from megatron_rl.errors import UserError
from megatron_rl.tasks import get_task
from megatron_rl.tasks.base import Task, unique_problems
from megatron_rl.tasks.rows.layouts import recognise
from megatron_rl.tasks.rows.open import Joined, open_rows
from megatron_rl.tasks.rows.row import Fields, Row
from megatron_rl.types import Problem

MAX_LOADED = 100_000
"""Rows that are read, checked and kept as a whole; of more, each is read when its turn comes."""


class Problems(Sequence[Problem]):
    """Problems of files, each made when it is asked for."""

    def __init__(self, rows: Joined, name: str, task: Task, template: str | None, fields: Fields | None) -> None:
        """Take opened files.

        Args:
            rows: of all files.
            name: of the task in the config, by which scoring workers find it.
            task: makes the problems.
            template: of the prompts.
            fields: what the columns hold; None where the task reads them itself.
        """
        self._rows, self._name, self._task, self._template, self._fields = rows, name, task, template, fields

    def __len__(self) -> int:
        return len(self._rows)

    def __getitem__(self, index: Any) -> Any:
        return self._made(self._rows[index])

    def __iter__(self) -> Iterator[Problem]:
        yield from map(self._made, self._rows)

    def _made(self, row: Row) -> Problem:
        return replace(problem_of(row, self._task, self._template, self._fields), task=self._name)


def problem_of(row: Row, task: Task, template: str | None, fields: Fields | None) -> Problem:
    """Make a problem of one row; arguments as ``Problems``.

    Raises:
        UserError: the row or the template is wrong.
    """
    return task.problem(replace(row, fields=fields) if fields else row, template=template)


def open_problems(
    task: str,
    files: Sequence[str],
    *,
    template: str | None = None,
    fields: Fields | None = None,
    field: str = "data.train",
    split: str = "train",
    say: Callable[[str], None] = lambda _: None,
) -> Sequence[Problem]:
    """Open problem files.

    Args:
        task: its name in the config.
        files: paths, folders, ids on the hub, slices of them.
        template: the prompt with ``{question}`` in it; None takes the task's own.
        fields: what the columns hold; None, or none named, recognises the layout, for tasks that take any.
        field: config key, for errors.
        split: of sets that have several.
        say: is told which layout was recognised.

    Returns:
        A list without repetitions of up to ``MAX_LOADED`` rows; of more rows a ``Problems``.

    Raises:
        UserError: a file, a row, the mapping or the template is wrong; the files have different layouts.
    """
    found = get_task(task)
    rows = open_rows(files, field=field, split=split)
    if not fields and takes_layouts(found):
        fields = layout_of([part[0] for part in rows.parts], files, field, say)
    problems = Problems(rows, task, found, template, fields)
    if len(problems) > MAX_LOADED:
        return problems
    return unique_problems(problems)


def check_answer(problem: Problem) -> None:
    """Raise ``UserError`` for a problem without a reference answer."""
    if not problem.answer:
        raise UserError(
            problem.source,
            None,
            "has no reference answer to compare with",
            "map its column (data.fields.answer=COLUMN), or judge by a reward of your own (data.reward)",
        )


def takes_layouts(task: Task) -> bool:
    """Tell whether a task takes every layout that is known, without a mapping of columns."""
    return bool(getattr(task, "takes_layouts", False))


def layout_of(first_rows: Sequence[Row], files: Sequence[str], field: str, say: Callable[[str], None]) -> Fields:
    """Return the layout that all files have, by the first row of each, and say it.

    Raises:
        UserError: one has none that is known, or not that of the others.
    """
    layouts = [recognise(row) for row in first_rows]
    for name, layout in zip(files, layouts):
        if layout != layouts[0]:
            raise UserError(
                field,
                name,
                f"has the layout {layout.name!r} ({layout.fields.described()}), and {files[0]} has {layouts[0].name!r} "
                f"({layouts[0].fields.described()})",
                "give files of one layout, or say which column is which with data.fields",
            )
    say(f"{field}: layout of {layouts[0].name}: {layouts[0].fields.described()}")
    return layouts[0].fields


def load_problems(
    task: str, *files: str | Path, template: str | None = None, fields: Fields | None = None
) -> list[Problem]:
    """Read all problems of files, however many; arguments and errors as ``open_problems``."""
    return list(open_problems(task, list(map(str, files)), template=template, fields=fields))

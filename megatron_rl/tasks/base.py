"""The interface of a task, and helpers that tasks share. Imports no torch: scoring workers import this."""

from __future__ import annotations

import logging
from collections.abc import Iterable, Sequence
from hashlib import blake2b
from typing import Protocol, runtime_checkable

from megatron_rl.errors import UserError
from megatron_rl.tasks.rows.row import Row
from megatron_rl.types import Problem, Score

logger = logging.getLogger(__name__)


@runtime_checkable
class Task(Protocol):
    """One kind of problem.

    A task of your own is any object with these four members, named in a config as ``data.task: package.module:NAME``.
    examples/five_styles/task.py is one.
    """

    @property
    def name(self) -> str:
        """A short name; it enters the ids of problems, so another name makes other ids."""
        ...

    @property
    def preload(self) -> Sequence[str]:
        """Modules that ``score`` imports; loaded once, before the scoring workers are forked. Often none."""
        ...

    def problem(self, row: Row, *, template: str | None) -> Problem:
        """Make a problem of one row of a problem file.

        Args:
            row: ``row.text("question")`` is a column that has to be a text, ``row.values`` all of them.
            template: the prompt with ``{question}`` in it; None takes the task's own.

        Raises:
            UserError: the row or the template is wrong.
        """
        ...

    def score(self, problem: Problem, response: str) -> Score:
        """Judge one response; a pure function that runs in a worker process.

        Args:
            problem: one that the task has made.
            response: decoded, without special tokens; anything at all, since a model wrote it.
        """
        ...


def fill_template(template: str, question: str) -> str:
    r"""Put the question in place of ``{question}``; other braces, as in ``\boxed{}``, stay as they are."""
    return template.replace("{question}", question)


def check_template(template: str) -> str:
    """Return the template.

    Raises:
        UserError: it has no place for the question.
    """
    if "{question}" not in template:
        raise UserError(
            "data.template", template, "must contain {question}", "write {question} where the question goes"
        )
    return template


def problem_id(task_name: str, question: str) -> str:
    """Return 16 hex digits that name a question of a task in every run, file and machine."""
    return blake2b(f"{task_name}\n{question}".encode(), digest_size=8).hexdigest()


def unique_problems(problems: Iterable[Problem]) -> list[Problem]:
    """Return the problems in order, the first of each id; the number left out is logged.

    Raises:
        UserError: one question comes with two answers.
    """
    kept: dict[str, Problem] = {}
    num_repeated = 0
    for problem in problems:
        first = kept.setdefault(problem.problem_id, problem)
        if first.answer != problem.answer:
            raise UserError(
                problem.source,
                problem.answer,
                f"answers the question of {first.source}, where the answer is {first.answer!r}",
                "remove the wrong one",
            )
        num_repeated += first is not problem
    if num_repeated:
        logger.warning("%d problems repeat an earlier one of the file and are left out", num_repeated)
    return list(kept.values())

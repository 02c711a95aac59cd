"""A task: where problems come from, how they are put to the model, how a response is judged. ``data.task: task:WORDS``."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from megatron_rl.tasks.base import problem_id
from megatron_rl.tasks.rows.row import Row
from megatron_rl.types import Problem, Score


@dataclass(frozen=True)
class Words:
    """Rows with the fields ``question`` and ``answer``; a response ends in ``#### number``."""

    name: str = "own_words"
    preload: Sequence[str] = ()

    def problem(self, row: Row, *, template: str | None) -> Problem:
        """Make a problem of a row; the prompt is the question itself."""
        question = row.text("question")
        return Problem(
            problem_id=problem_id(self.name, question),
            prompt=question,
            answer=row.text("answer"),
            source=row.source,
            question=question,
            metadata=row.rest(("question", "answer")) | {"num_people": len(question.split(" . "))},
        )

    def score(self, problem: Problem, response: str) -> Score:
        """Give 1.0 for the right number after the mark."""
        found = response.rpartition("####")[2].replace(" ", "")
        is_right = found == problem.answer
        return Score(
            float(is_right), {"correct": float(is_right)}, "correct" if is_right else "wrong", answer=found[:64]
        )


WORDS = Words()

"""A task: where problems come from, how they are put to the model, how a response is judged. ``data.task: task:WORDS``."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from megatron_rl.tasks.base import problem_id, unique_problems
from megatron_rl.tasks.jsonl import read_rows
from megatron_rl.types import Problem, Score


@dataclass(frozen=True)
class Words:
    """Rows with the fields ``question`` and ``answer``; a response ends in ``#### number``."""

    name: str = "own_words"
    preload: Sequence[str] = ()

    def load(self, path: Path, *, template: str | None) -> list[Problem]:
        """Read the problems of a file; the prompt is the question itself."""
        return unique_problems(
            Problem(
                problem_id=problem_id(self.name, row["question"]),
                prompt=row["question"],
                answer=row["answer"],
                source=source,
                question=row["question"],
                metadata=rest | {"num_people": len(row["question"].split(" . "))},
            )
            for source, row, rest in read_rows(path, required=("question", "answer"))
        )

    def score(self, problem: Problem, response: str) -> Score:
        """Give 1.0 for the right number after the mark."""
        found = response.rpartition("####")[2].replace(" ", "")
        is_right = found == problem.answer
        return Score(
            float(is_right), {"correct": float(is_right)}, "correct" if is_right else "wrong", answer=found[:64]
        )


WORDS = Words()

"""A task that a random model solves about every second time: the response has an even number of letters."""

from __future__ import annotations

from dataclasses import dataclass

from megatron_rl.tasks.gsm8k import Gsm8k
from megatron_rl.tasks.rows.row import Row
from megatron_rl.types import Problem, Score


@dataclass(frozen=True)
class Parity:
    name: str = "parity"
    preload: tuple[str, ...] = ()

    def problem(self, row: Row, *, template: str | None) -> Problem:
        return Gsm8k().problem(row, template=template)

    def score(self, problem: Problem, response: str) -> Score:
        is_even = sum(letter.isalpha() for letter in response) % 2 == 0
        return Score(float(is_even), {"correct": float(is_even)}, "even" if is_even else "odd")


@dataclass(frozen=True)
class Always(Parity):
    def score(self, problem: Problem, response: str) -> Score:
        return Score(1.0, {"correct": 1.0}, "always")


TASK, ALWAYS = Parity(), Always()

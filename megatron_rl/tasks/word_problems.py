"""Generated word problems of several arithmetic steps, for small models trained from scratch.

    question  Ana has 7 . Ben has 5 more than Ana . Cal has 3 times as many as Ben . How many has Cal ?
    solution  Ana 7 . Ben 7 + 5 = 12 . Cal 12 * 3 = 36 . #### 36
    answer    36

A problem is a chain: one start value, then one operation a person. Every value lies in 0 to 99. The *chain*, which is
the numbers and operations without names and sentence order, decides by its hash which split a problem belongs to, so
splits share no chain whatever the seeds and settings they were generated with.
"""

from __future__ import annotations

import gzip
import json
import random
import re
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from hashlib import blake2b
from pathlib import Path
from typing import Literal

from megatron_rl.errors import UserError
from megatron_rl.files import SAME_COMMAND, atomic_file, disk_errors
from megatron_rl.tasks.base import check_template, fill_template, problem_id
from megatron_rl.tasks.rows.row import Row
from megatron_rl.types import FinishReason, Problem, Score

NAMES = (
    "Ana", "Ben", "Cal", "Dan", "Eva", "Fay", "Gus", "Hal", "Ida", "Jon",
    "Kim", "Leo", "Mia", "Ned", "Oli", "Pam", "Ray", "Sue", "Tom", "Zoe",
)  # fmt: skip
Operator = Literal["+", "-", "*"]
OPERATORS: tuple[Operator, ...] = ("+", "-", "*")
MAX_VALUE = 99
MAX_ADDEND = 20
MAX_FACTOR = 5
ANSWER_MARK = "####"

Split = Literal["train", "held_out", "warm_start"]
HASH_CLASSES: dict[Split, range] = {"held_out": range(0, 1), "warm_start": range(1, 6), "train": range(6, 16)}
"""Classes of a chain's hash modulo 16: 1/16 of all chains is held out, 5/16 is for demonstrations, 10/16 for RL."""
NUM_HASH_CLASSES = 16

GeneratedProblem = dict[str, str | int]
"""A row of a problem file."""
MAX_FRUITLESS_TRIES = 20_000
"""Draws without a new problem of the split after which the space counts as used up."""

_PHRASES = {"+": "{name} has {number} more than {other} .", "-": "{name} has {number} fewer than {other} .",
            "*": "{name} has {number} times as many as {other} ."}  # fmt: skip
_FINAL_NUMBER = re.compile(r"-?\d(?: ?\d)*")
MAX_ANSWER_CHARS = 64
"""Limit of ``Score.answer``; a broken model may write 5,000 digits."""


@dataclass(frozen=True)
class Step:
    """One operation of a chain."""

    operator: Operator
    number: int

    def apply(self, value: int) -> int:
        """Return the next value."""
        if self.operator == "+":
            return value + self.number
        return value - self.number if self.operator == "-" else value * self.number

    def without_carry(self, value: int) -> int:
        """Return the result of a sum or difference that forgets the ten carried or borrowed at the units."""
        if self.operator == "+" and value % 10 + self.number % 10 >= 10:
            return self.apply(value) - 10
        if self.operator == "-" and value % 10 < self.number % 10:
            return self.apply(value) + 10
        return self.apply(value)


@dataclass(frozen=True)
class Slips:
    """Shares of steps whose stated result is wrong, in demonstrations; ``generate`` explains them."""

    share: float
    forgotten_carry_share: float


@dataclass(frozen=True)
class Chain:
    """A problem without names and sentence order; its hash decides the split."""

    start: int
    steps: tuple[Step, ...]

    @property
    def canonical(self) -> str:
        """Text such as ``7 +5 *3``."""
        return " ".join([str(self.start), *(f"{step.operator}{step.number}" for step in self.steps)])

    @property
    def hash_class(self) -> int:
        """Hash modulo 16: 0 to 15."""
        return int.from_bytes(blake2b(self.canonical.encode(), digest_size=8).digest(), "little") % NUM_HASH_CLASSES


def generate(
    num_problems: int,
    *,
    seed: int,
    num_operations: Sequence[int] = (1, 2, 3),
    slip_share: float = 0.0,
    forgotten_carry_share: float = 0.0,
    split: Split = "train",
    shuffle_statements: bool = False,
) -> Iterator[GeneratedProblem]:
    """Generate distinct problems of one split; a pure function of the arguments.

    Args:
        num_problems: rows to yield.
        seed: any integer. Other seeds give other problems, of the same split.
        num_operations: how many operations a problem has; drawn uniformly from these.
        slip_share: chance, in [0, 1), that a step of a *solution* states a wrong result, which the later steps carry on
            consistently. ``answer`` is right all the same. Two slips may cancel.
        forgotten_carry_share: chance, in [0, 1), that a step of a *solution* that carries or borrows a ten forgets it
            (17 + 5 = 12, 23 - 5 = 28). Above one half, the most likely demonstration of such a step is wrong.
        split: which hash classes of chains to draw from.
        shuffle_statements: give the statements in random order; the solution keeps the order of the chain.

    Yields:
        Rows with ``question``, ``answer``, ``solution`` (strings), ``num_operations``, ``num_slips`` (integers).

    Raises:
        UserError: an argument is out of range, or the split has fewer problems.
    """
    _check(num_problems, num_operations, slip_share, forgotten_carry_share, split)
    slips = Slips(slip_share, forgotten_carry_share)
    return _generate(num_problems, random.Random(seed), tuple(num_operations), slips, split, shuffle_statements)


def _generate(
    num_problems: int,
    rng: random.Random,
    num_operations: tuple[int, ...],
    slips: Slips,
    split: Split,
    shuffle: bool,
) -> Iterator[GeneratedProblem]:
    seen: set[tuple[Chain, tuple[str, ...]]] = set()
    while len(seen) < num_problems:
        chain, names = _draw_new(rng, num_operations, split, seen)
        seen.add((chain, names))
        results, num_slips = _worked_results(chain, slips, rng)
        yield {
            "question": _question(chain, names, rng if shuffle else None),
            "answer": str(_values(chain.start, chain.steps)[-1]),
            "solution": _solution(chain, names, results),
            "num_operations": len(chain.steps),
            "num_slips": num_slips,
        }


def _draw_new(
    rng: random.Random, num_operations: tuple[int, ...], split: Split, seen: set[tuple[Chain, tuple[str, ...]]]
) -> tuple[Chain, tuple[str, ...]]:
    for _ in range(MAX_FRUITLESS_TRIES):
        chain = _draw_chain(rng, rng.choice(num_operations))
        names = tuple(rng.sample(NAMES, len(chain.steps) + 1))
        if chain.hash_class in HASH_CLASSES[split] and (chain, names) not in seen:
            return chain, names
    raise UserError(
        "num_problems",
        len(seen) + 1,
        f"no further {split} problem with {list(num_operations)} operations was found",
        "ask for fewer, or allow more operations",
    )


def _draw_chain(rng: random.Random, num_steps: int) -> Chain:
    start = value = rng.randint(1, MAX_ADDEND)
    steps: list[Step] = []
    while len(steps) < num_steps:
        operator = rng.choice(OPERATORS)
        low, high = _operand_range(operator, value)
        if low <= high:
            steps.append(Step(operator, rng.randint(low, high)))
            value = steps[-1].apply(value)
    return Chain(start, tuple(steps))


def _operand_range(operator: str, value: int) -> tuple[int, int]:
    """Return the range of operands that keep the next value in range; empty (low > high) if there is none."""
    if operator == "+":
        return 1, min(MAX_ADDEND, MAX_VALUE - value)
    if operator == "-":
        return 1, min(MAX_ADDEND, value)
    return 2, (min(MAX_FACTOR, MAX_VALUE // value) if value else 1)  # 0 times anything teaches nothing


def _values(start: int, steps: Sequence[Step]) -> list[int]:
    """Return the start value and the result of each step."""
    values = [start]
    for step in steps:
        values.append(step.apply(values[-1]))
    return values


def _worked_results(chain: Chain, slips: Slips, rng: random.Random) -> tuple[list[int], int]:
    """Draw the results that a solution states, after the start value, and count the slips."""
    results, num_slips = [chain.start], 0
    for index, step in enumerate(chain.steps):
        result = step.apply(results[-1])
        wrong = _drawn_slip(step, results[-1], chain.steps[index + 1 :], slips, rng)
        results.append(result if wrong is None else wrong)
        num_slips += wrong is not None
    return results, num_slips


def _drawn_slip(step: Step, before: int, later_steps: Sequence[Step], slips: Slips, rng: random.Random) -> int | None:
    """Draw a wrong result of the step, or None for the right one."""
    result, forgotten = step.apply(before), step.without_carry(before)
    if rng.random() < slips.forgotten_carry_share and forgotten != result and _stays_in_range(forgotten, later_steps):
        return forgotten
    if rng.random() >= slips.share:
        return None
    possible = [v for v in range(MAX_VALUE + 1) if v != result and _stays_in_range(v, later_steps)]
    near = [value for value in possible if abs(value - result) in (1, 2, 10)]
    return rng.choice(near or possible) if possible else None


def _stays_in_range(value: int, steps: Sequence[Step]) -> bool:
    return all(0 <= v <= MAX_VALUE for v in _values(value, steps))


def _question(chain: Chain, names: Sequence[str], rng: random.Random | None) -> str:
    statements = [f"{names[0]} has {chain.start} ."]
    for step, name, other in zip(chain.steps, names[1:], names):
        statements.append(_PHRASES[step.operator].format(name=name, number=step.number, other=other))
    if rng is not None:
        rng.shuffle(statements)
    return " ".join([*statements, f"How many has {names[-1]} ?"])


def _solution(chain: Chain, names: Sequence[str], results: Sequence[int]) -> str:
    parts = [f"{names[0]} {chain.start} ."]
    for step, name, before, after in zip(chain.steps, names[1:], results, results[1:]):
        parts.append(f"{name} {before} {step.operator} {step.number} = {after} .")
    return " ".join([*parts, f"{ANSWER_MARK} {results[-1]}"])


def _check(
    num_problems: int, num_operations: Sequence[int], slip_share: float, forgotten_carry_share: float, split: str
) -> None:
    if num_problems < 1:
        raise UserError("num_problems", num_problems, "must be at least 1", "ask for one problem or more")
    if not num_operations or not all(1 <= n < len(NAMES) for n in num_operations):
        raise UserError(
            "num_operations",
            list(num_operations),
            f"must be numbers from 1 to {len(NAMES) - 1}",
            "give for example 1 2 3",
        )
    for field, share in (("slip_share", slip_share), ("forgotten_carry_share", forgotten_carry_share)):
        if not 0 <= share < 1:
            raise UserError(field, share, "must be at least 0 and below 1", "give a share such as 0.2")
    if split not in HASH_CLASSES:
        raise UserError("split", split, f"must be one of {', '.join(HASH_CLASSES)}", "choose a split")


def write_rows(path: Path, rows: Iterable[GeneratedProblem]) -> int:
    """Write a ``.jsonl`` or ``.jsonl.gz`` file, complete or not at all; return the number of rows."""
    num_rows = 0
    with (
        disk_errors(path, fix=SAME_COMMAND),
        atomic_file(path) as temporary,
        gzip.open(temporary, "wt") if path.name.endswith(".gz") else temporary.open("w") as file,
    ):
        for row in rows:
            file.write(json.dumps(row) + "\n")
            num_rows += 1
    return num_rows


@dataclass(frozen=True)
class WordProblems:
    """The task. Rows have ``question``, ``answer`` (an integer) and, for demonstrations, ``solution``."""

    name: str = "word_problems"
    preload: Sequence[str] = ()

    def problem(self, row: Row, *, template: str | None) -> Problem:
        """Make a problem; the prompt is the question alone unless a template says otherwise."""
        template = check_template("{question}" if template is None else template)
        question, answer = row.text("question"), row.text("answer")
        if not re.fullmatch(r"-?\d+", answer, re.ASCII):
            raise UserError(row.source, answer, "field 'answer' must be an integer", "write digits only")
        return Problem(
            problem_id=problem_id(self.name, question),
            prompt=fill_template(template, question),
            answer=answer,
            solution=row.optional_text("solution"),
            source=row.source,
            question=question,
            metadata=row.rest(("question", "answer", "solution")),
        )

    def score(self, problem: Problem, response: str, *, finish_reason: FinishReason = "stop") -> Score:
        """Reward 1.0 where the integer after the last ``####`` is the answer; nothing may follow it.

        Digits may be apart by one space each: a word-level tokenizer has a token a digit. So a response that was cut at the
        limit earns nothing: its number may lack its end.
        """
        if finish_reason != "stop":
            return Score(0.0, {"correct": 0.0, "format": 0.0}, "cut")
        _, mark, rest = response.rpartition(ANSWER_MARK)
        number = rest.strip()
        if not mark or not _FINAL_NUMBER.fullmatch(number):
            return Score(0.0, {"correct": 0.0, "format": 0.0}, "no answer")
        given = _digits(number)
        is_correct = given == _digits(problem.answer)
        return Score(
            float(is_correct),
            {"correct": float(is_correct), "format": 1.0},
            "correct" if is_correct else "wrong",
            answer=given[:MAX_ANSWER_CHARS],
        )


def _digits(number: str) -> str:
    """Normalise ``0 3 6`` to ``36``, as a string: ``int`` refuses the 5,000 digits that a broken model may write."""
    negative, digits = number.startswith("-"), number.lstrip("-").replace(" ", "").lstrip("0")
    return f"-{digits}" if negative and digits else digits or "0"

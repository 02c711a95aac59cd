"""Chain arithmetic whose solutions are written in one of five styles, to measure what training does to diversity.

    question  Ana 17 + 5 - 3 * 2 ?          from left to right; the name changes nothing but makes more questions
    forward   forward 17 + 5 = 22 . 22 - 3 = 19 . 19 * 2 = 38 . #### 38
    backward  backward * 2 - 3 + 5 from 17 : 22 : 19 : 38 . #### 38
    split     split units 7 tens 1 . + 5 units 2 tens 2 . - 3 units 9 tens 1 . * 2 units 8 tens 3 . #### 38
    table     table 17 : 22 : 19 : 38 . #### 38
    check     check 22 - 5 = 17 . 19 + 3 = 22 . 38 / 2 = 19 . #### 38
    answer    38

Every value lies in 0 to 99. Of word-level tokens, a question has 16 at most, a solution 41 (19 as a ``table``). The first word
is the style's tag, and the style. Demonstrations use the five equally often, and err in two ways (``Errors``):

- *Blind steps.* Each style gets the steps of one class out of five wrong, nearly always and always in the same manner
  (a ten too many). The class of a step is that of its own result, so nothing tells at the tag, short of solving the problem,
  which styles will fail: to prefer one style everywhere is easy to learn, to choose the right one for a problem is hard.
  The first step has no class, so a problem of n operations is lost on at most n - 1 styles and never on all five.
- *Slips.* A near miss now and then, another one each time, in problems of two operations or more; less often in the
  favoured style, which is therefore the best one on average.

A policy that keeps five styles solves nearly every problem in some of its samples; one that has settled on a single style
hardly ever solves those with a step to which that style is blind. This is a construction of our own for the five-style
experiment of DPH-RL (2509.07430), whose details are not published.

``TASK`` at the end is a task from outside the package, as a config names it: ``data.task: examples.five_styles.task:TASK``.
"""

from __future__ import annotations

import random
import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import NamedTuple

from megatron_rl.errors import UserError
from megatron_rl.tasks.word_problems import (
    ANSWER_MARK,
    HASH_CLASSES,
    MAX_ADDEND,
    MAX_FACTOR,
    MAX_FRUITLESS_TRIES,
    MAX_VALUE,
    NAMES,
    OPERATORS,
    Chain,
    GeneratedProblem,
    Split,
    Step,
    WordProblems,
)
from megatron_rl.tasks.word_tokenizer import END, PAD, UNKNOWN
from megatron_rl.types import Problem, Score

QUESTION_NAMES = NAMES[:18]
"""Eighteen names bring the vocabulary to 48 tokens."""
MAX_START = 49
MAX_OPERATIONS = 4
BLIND_OFFSETS = (10, -10, 5, -5, 1, -1)
"""Errors of a blind step: the first of these that keeps all later values in range. A five or a ten leaves the result in its
class modulo 5, so that a later step has the class that it would have had without the error."""
SLIP_OFFSETS = (-10, -2, -1, 1, 2, 10)

_INVERSE = {"+": "-", "-": "+", "*": "/"}


class Style(NamedTuple):
    """A way to write a solution, without its tag and the final answer."""

    write: Callable[[Chain, Sequence[int]], str]
    """Takes a chain, and its start value with the stated result of each step."""
    body: str
    """Pattern of what ``write`` returns and the space after it, for any numbers. It captures the last value stated as ``last``,
    or as ``units`` and ``tens``, because the final answer has to be that value. In ``forward`` and ``check``, which differ in
    the order of their equations, each step also has to go on from the value before it."""
    answer: str = "(?P=last)"
    """Pattern of the final answer, in terms of the groups that ``body`` captured."""


def _forward(chain: Chain, results: Sequence[int]) -> str:
    parts = [f"{a} {step.operator} {step.number} = {b} ." for step, a, b in zip(chain.steps, results, results[1:])]
    return " ".join(parts)


def _backward(chain: Chain, results: Sequence[int]) -> str:
    operations = " ".join(f"{step.operator} {step.number}" for step in reversed(chain.steps))
    return f"{operations} from {' : '.join(map(str, results))} ."


def _split(chain: Chain, results: Sequence[int]) -> str:
    operations = ["", *(f"{step.operator} {step.number} " for step in chain.steps)]
    return " ".join(f"{op}units {v % 10} tens {v // 10} ." for op, v in zip(operations, results))


def _table(chain: Chain, results: Sequence[int]) -> str:
    return f"{' : '.join(map(str, results))} ."


def _check(chain: Chain, results: Sequence[int]) -> str:
    steps = zip(chain.steps, results, results[1:])
    return " ".join(f"{b} {_INVERSE[step.operator]} {step.number} = {a} ." for step, a, b in steps)


_N = "[0-9]+"
STYLES: dict[str, Style] = {
    "forward": Style(_forward, rf"(?:{_N} [-+*] {_N} = (?P<last>{_N}) \. (?={ANSWER_MARK}|(?P=last) ))+"),
    "backward": Style(_backward, rf"(?:[-+*] {_N} )+from {_N}(?: : (?P<last>{_N}))+ \. "),
    "split": Style(
        _split,
        rf"units [0-9] tens [0-9] \. (?:[-+*] {_N} units [0-9] tens [0-9] \. )*"
        rf"[-+*] {_N} units (?P<units>[0-9]) tens (?:0|(?P<tens>[1-9])) \. ",
        "(?(tens)(?P=tens))(?P=units)",
    ),
    "table": Style(_table, rf"{_N}(?: : (?P<last>{_N}))+ \. "),
    "check": Style(_check, rf"(?:(?P<last>{_N}) [-+/] {_N} = {_N} \. (?={ANSWER_MARK}|{_N} [-+/] {_N} = (?P=last) ))+"),
}
"""By tag. The order says which class of steps a style is blind to: ``forward`` to class 0, ``check`` to class 4."""
TAGS = tuple(STYLES)
_FORMS = {tag: re.compile(f"{tag} {style.body}{ANSWER_MARK} {style.answer}") for tag, style in STYLES.items()}
VOCABULARY = (
    PAD,
    END,
    UNKNOWN,
    *"0123456789",
    *"+-*/=.:?",
    ANSWER_MARK,
    *TAGS,
    "units",
    "tens",
    "from",
    *QUESTION_NAMES,
)
"""48 entries: an even share for 2, 4, 8 or 16 tensor-parallel ranks."""


def write_solution(tag: str, chain: Chain, results: Sequence[int]) -> str:
    """Write a solution in the style of ``tag``; ``results`` are the start value and the stated result of each step."""
    return f"{tag} {STYLES[tag].write(chain, results)} {ANSWER_MARK} {results[-1]}"


def style_of(response: str) -> str:
    """Return the tag of a response that is written, as a whole, in the style of its tag; "" for any other text.

    The numbers may be wrong. But the body must be in that style, with one step or more, and must end in the value that the
    response gives as its answer. A tag before the body of another style does not count.
    """
    text = response.strip()
    tag = text.partition(" ")[0]
    return tag if tag in STYLES and _FORMS[tag].fullmatch(text) else ""


ClassOf = Callable[[Chain, int, int], int | None]
"""(chain, index of a step, value before it) -> class of that step, an index into ``STYLES``; None: no style is blind to it."""


def class_of_result(chain: Chain, index: int, before: int) -> int | None:
    """Return the step's right result modulo 5, which its last digit gives; the first step of a chain has no class."""
    return chain.steps[index].apply(before) % len(STYLES) if index else None


def class_of_start(chain: Chain, index: int, before: int) -> int | None:
    """Return the start value modulo 5 for the last of two steps or more: a class that the question shows."""
    return chain.start % len(STYLES) if 0 < index == len(chain.steps) - 1 else None


CLASSES: dict[str, ClassOf] = {"result": class_of_result, "start": class_of_start}


@dataclass(frozen=True)
class Shares:
    """Error rates of one style."""

    blind: float = 0.98
    """Chance that a step of the class to which the style is blind is wrong. At 0.8, sixteen samples in one style would still
    find the answer, and RL would soon mend the style instead of leaving it."""
    slip: float = 0.1
    """Chance that a solution of two operations or more has a slip, at one step of it."""

    def __post_init__(self) -> None:
        for name, share in vars(self).items():
            if not 0 <= share <= 1:
                raise UserError(f"{name}_share", share, "must be from 0 to 1", "give a share such as 0.1")


FAVOURED = "forward"
FAVOURED_SLIP = 0.02


def shares_by_style(
    *,
    blind: float = Shares.blind,
    slip: float = Shares.slip,
    favoured: str = FAVOURED,
    favoured_slip: float = FAVOURED_SLIP,
) -> dict[str, Shares]:
    """Return equal shares for all styles; only the favoured one has a slip share of its own.

    Raises:
        UserError: a share is out of range, or there is no such style.
    """
    if favoured not in TAGS:
        raise UserError("favoured", favoured, f"must be one of {', '.join(TAGS)}", "choose a style")
    return {tag: Shares(blind, favoured_slip if tag == favoured else slip) for tag in TAGS}


@dataclass(frozen=True)
class Errors:
    """Errors of the demonstrations: a wrong result is carried on by the later steps, so the solution is wrong as well."""

    shares: Mapping[str, Shares] = field(default_factory=shares_by_style)
    """By tag, all five."""
    class_of: ClassOf = class_of_result

    def __post_init__(self) -> None:
        if set(self.shares) != set(TAGS):
            raise UserError("shares", sorted(self.shares), f"must name {', '.join(TAGS)}", "give shares for each style")

    def without(self) -> Errors:
        """Return the same classes without any error."""
        return Errors({tag: Shares(0.0, 0.0) for tag in TAGS}, self.class_of)


NO_ERRORS = Errors().without()


def blind_tags(chain: Chain, class_of: ClassOf = class_of_result) -> tuple[str, ...]:
    """Return the styles that have a blind step in the right solution of a chain, in the order of ``STYLES``."""
    values = _values(chain.start, chain.steps)
    classes = {class_of(chain, index, values[index]) for index in range(len(chain.steps))}
    return tuple(tag for index, tag in enumerate(TAGS) if index in classes)


def generate(
    num_problems: int,
    *,
    seed: int,
    split: Split = "train",
    num_operations: Sequence[int] = (1, 2, 3, 4),
    errors: Errors = NO_ERRORS,
) -> Iterator[GeneratedProblem]:
    """Generate distinct questions of one split, each with a solution in a style drawn at random.

    A pure function of the arguments.

    Args:
        num_problems: rows to yield.
        seed: any integer. Other seeds give other questions, of the same split.
        split: which hash classes of chains to draw from, as for word problems: splits share no chain.
        num_operations: how many operations a problem has; drawn uniformly from these.
        errors: of the *solutions*; ``answer`` is right all the same. A wrong step never makes up for an earlier one, so the
            solution ends in the answer exactly where all its steps are right.

    Yields:
        Rows with ``question``, ``answer``, ``solution``, ``style``, ``blind`` (tags of the styles that are blind to a step of
        the problem, with spaces between), ``num_operations`` and ``num_wrong_steps``.

    Raises:
        UserError: an argument is out of range, or the split has fewer questions.
    """
    _check_arguments(num_problems, num_operations, split)
    return _generate(num_problems, random.Random(seed), split, tuple(num_operations), errors)


def _generate(
    num_problems: int, rng: random.Random, split: Split, num_operations: tuple[int, ...], errors: Errors
) -> Iterator[GeneratedProblem]:
    seen: set[str] = set()
    while len(seen) < num_problems:
        question, chain = _draw_new(rng, split, rng.choice(num_operations), seen)
        seen.add(question)
        tag = rng.choice(TAGS)
        results, num_wrong = _stated_results(chain, tag, errors, rng)
        yield {
            "question": question,
            "answer": str(_values(chain.start, chain.steps)[-1]),
            "solution": write_solution(tag, chain, results),
            "style": tag,
            "blind": " ".join(blind_tags(chain, errors.class_of)),
            "num_operations": len(chain.steps),
            "num_wrong_steps": num_wrong,
        }


def _draw_new(rng: random.Random, split: Split, num_steps: int, seen: set[str]) -> tuple[str, Chain]:
    for _ in range(MAX_FRUITLESS_TRIES):
        chain = _draw_chain(rng, num_steps)
        operations = " ".join(f"{step.operator} {step.number}" for step in chain.steps)
        question = f"{rng.choice(QUESTION_NAMES)} {chain.start} {operations} ?"
        if chain.hash_class in HASH_CLASSES[split] and question not in seen:
            return question, chain
    raise UserError(
        "num_problems",
        len(seen) + 1,
        f"no further {split} question with {num_steps} operation{'s' if num_steps > 1 else ''} was found",
        "ask for fewer, or for more operations",
    )


def _draw_chain(rng: random.Random, num_steps: int) -> Chain:
    start = value = rng.randint(1, MAX_START)
    steps: list[Step] = []
    while len(steps) < num_steps:
        operator = rng.choice(OPERATORS)
        low, high = {
            "+": (1, min(MAX_ADDEND, MAX_VALUE - value)),
            "-": (1, min(MAX_ADDEND, value)),
            "*": (2, min(MAX_FACTOR, MAX_VALUE // value) if value else 1),  # 0 times anything teaches nothing
        }[operator]
        if low <= high:
            steps.append(Step(operator, rng.randint(low, high)))
            value = steps[-1].apply(value)
    return Chain(start, tuple(steps))


def _stated_results(chain: Chain, tag: str, errors: Errors, rng: random.Random) -> tuple[list[int], int]:
    """Draw the results that a solution states, after the start value, and count the wrong ones."""
    shares, num_steps, answer = errors.shares[tag], len(chain.steps), _values(chain.start, chain.steps)[-1]
    slip_at = rng.randrange(num_steps) if num_steps > 1 and rng.random() < shares.slip else None
    results, num_wrong = [chain.start], 0
    for index, step in enumerate(chain.steps):
        result, later_steps = step.apply(results[-1]), chain.steps[index + 1 :]
        misses: list[int] = []
        if errors.class_of(chain, index, results[-1]) == TAGS.index(tag) and rng.random() < shares.blind:
            misses = _misses(result, BLIND_OFFSETS, later_steps, answer)[:1]
        elif index == slip_at:
            misses = _misses(result, SLIP_OFFSETS, later_steps, answer)
        results.append(rng.choice(misses or [result]))
        num_wrong += results[-1] != result
    return results, num_wrong


def _misses(result: int, offsets: Sequence[int], later_steps: Sequence[Step], answer: int) -> list[int]:
    """Return wrong results, in the order of the offsets, that keep all values in range and lead to a wrong answer."""
    paths = [_values(result + offset, later_steps) for offset in offsets]
    return [path[0] for path in paths if path[-1] != answer and all(0 <= value <= MAX_VALUE for value in path)]


def _values(start: int, steps: Sequence[Step]) -> list[int]:
    """Return the start value and the result of each step."""
    values = [start]
    for step in steps:
        values.append(step.apply(values[-1]))
    return values


def _check_arguments(num_problems: int, num_operations: Sequence[int], split: str) -> None:
    if num_problems < 1:
        raise UserError("num_problems", num_problems, "must be at least 1", "ask for one problem or more")
    if not num_operations or not all(1 <= n <= MAX_OPERATIONS for n in num_operations):
        raise UserError(
            "num_operations",
            list(num_operations),
            f"must be numbers from 1 to {MAX_OPERATIONS}",
            "give for example 1 2 3",
        )
    if split not in HASH_CLASSES:
        raise UserError("split", split, f"must be one of {', '.join(HASH_CLASSES)}", "choose a split")


@dataclass(frozen=True)
class FiveStyles(WordProblems):
    """Fields ``question``, ``answer`` (an integer) and, for demonstrations, ``solution``."""

    name: str = "five_styles"

    def score(self, problem: Problem, response: str) -> Score:
        """Reward 1.0 where the integer after the last ``####`` is the answer, whatever the style; ``style`` is ``style_of``."""
        return replace(super().score(problem, response), style=style_of(response))


TASK = FiveStyles()

"""GSM8K: grade-school word problems with integer answers (Cobbe et al., 2110.14168), in the published jsonl form."""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass, replace
from fractions import Fraction

from megatron_rl.errors import UserError
from megatron_rl.rewards.answers import find_marked_answer
from megatron_rl.rewards.math import TAIL_CHARS, score_math
from megatron_rl.rewards.notation import normalise
from megatron_rl.rewards.quantity import read_quantity
from megatron_rl.tasks.base import check_template, fill_template, problem_id
from megatron_rl.tasks.rows.row import Row, shorten
from megatron_rl.types import FinishReason, Problem, Score

TEMPLATE = (
    "{question}\n"
    "Reason step by step, one calculation a line, and finish with the final answer as a plain number in \\boxed{}.\n"
)
ANSWER_MARK = "####"

_CALCULATOR = re.compile(r"<<[^<>]*>>")
"""``48/2 = <<48/2=24>>24``: a trace of the calculator that the data's authors used."""
_NUMBER = re.compile(r"-?(\d+|\d{1,3}(,\d{3})+)(\.\d+)?", re.ASCII)
_NUMBER_IN_TEXT = re.compile(r"(?<!\d)-?\d[\d,]*(?:\.\d+)?")
_DECORATION = re.compile(r"\\\$|[\s,]")
MAX_DECIMALS = 12
"""Values with more decimals are written as fractions in ``Score.answer``."""
MAX_ANSWER_CHARS = 64
"""Limit of ``Score.answer``; a broken model may write 5,000 digits."""


@dataclass(frozen=True)
class Gsm8k:
    """The task. Rows have ``question`` and ``answer``; the answer is worked text and a last line ``#### 72``."""

    name: str = "gsm8k"
    preload: Sequence[str] = ("math_verify",)

    def problem(self, row: Row, *, template: str | None) -> Problem:
        """Make a problem: reference ``72``, demonstration ``... The answer is \\boxed{72}.``"""
        template = check_template(TEMPLATE if template is None else template)
        question = row.text("question")
        steps, number = _split_answer(row.text("answer"), row.source)
        return Problem(
            problem_id=problem_id(self.name, question),
            prompt=fill_template(template, question),
            answer=number,
            solution=f"{steps}\nThe answer is \\boxed{{{number}}}.".lstrip(),
            source=row.source,
            question=question,
            metadata=row.rest(("question", "answer")),
        )

    def score(
        self, problem: Problem, response: str, *, finish_reason: FinishReason = "stop", lenient: bool = False
    ) -> Score:
        """Reward 1.0 for an answer equal to the reference, in a box, after ``####`` or in a sentence that states it.

        Args:
            problem: one that the task has made.
            response: the whole text.
            finish_reason: a response that did not stop by itself earns nothing, unless ``lenient``.
            lenient: the last number counts where no answer is marked, as far as math-verify finds it.
        """
        score = score_math(problem.answer, response, finish_reason=finish_reason, lenient=lenient)
        return replace(score, answer=_normal_answer(problem.answer, response, score))


def _normal_answer(reference: str, response: str, score: Score) -> str:
    """Normalise the answer: a right one becomes the reference; a wrong one that is not marked is the last number."""
    if score.reason in ("no answer", "cut"):
        return ""
    if score.reward > 0:
        return _normal_form(reference)
    marked = find_marked_answer(response)
    if marked is None:
        numbers = _NUMBER_IN_TEXT.findall(response[-TAIL_CHARS:])
        marked = numbers[-1] if numbers else ""
    return _normal_form(marked)


def _normal_form(text: str) -> str:
    """Normalise ``$1,072.50`` to ``1072.5``, ``007`` to ``7``; other text only loses its blanks. At most MAX_ANSWER_CHARS."""
    text = normalise(text[:TAIL_CHARS])
    quantity = read_quantity(text)
    text = _DECORATION.sub("", text) if quantity is None else _decimal(quantity.value)
    return text[:MAX_ANSWER_CHARS]


def _decimal(value: Fraction) -> str:
    """Write a value as a decimal where that is exact, else as a fraction: ``1072.5``, ``71/6``."""
    scaled, remainder = divmod(abs(value.numerator) * 10**MAX_DECIMALS, value.denominator)
    if remainder:
        return str(value)
    digits = f"{scaled:0{MAX_DECIMALS + 1}d}"
    return f"{'-' * (value < 0)}{digits[:-MAX_DECIMALS]}.{digits[-MAX_DECIMALS:]}".rstrip("0").rstrip(".")


def _split_answer(text: str, source: str) -> tuple[str, str]:
    """Split into worked steps and the final number, without thousands separators."""
    steps, mark, number = text.rpartition(ANSWER_MARK)
    number = number.strip()
    if not mark or not _NUMBER.fullmatch(number):
        raise UserError(
            source,
            shorten(text.strip().rpartition("\n")[2]),
            f"field 'answer' must end in {ANSWER_MARK} and a number, in the digits 0 to 9",
            f"add a last line such as {ANSWER_MARK} 72",
        )
    return _CALCULATOR.sub("", steps).strip(), number.replace(",", "")

"""Mathematics in whatever layout it comes: GSM8K, MATH, DAPO-17k, AIME, OlympiadBench, or rows of your own."""

from __future__ import annotations

import json
import re
from collections.abc import Sequence
from dataclasses import dataclass

from megatron_rl.errors import UserError
from megatron_rl.rewards.answers import find_marked_answer
from megatron_rl.rewards.math import score_math
from megatron_rl.tasks.base import check_template, fill_template, problem_id
from megatron_rl.tasks.rows.layouts import Example, read_example
from megatron_rl.tasks.rows.row import Row
from megatron_rl.types import FinishReason, Problem, Score

TEMPLATE = "{question}\nReason step by step, and finish with the final answer in \\boxed{}.\n"
_WRAPPED = re.compile(r"\$+(?P<inner>[^$]+)\$+|\\boxed\{(?P<boxed>.+)\}", re.DOTALL)
_CALCULATOR = re.compile(r"<<[^<>]*>>")
"""``48/2 = <<48/2=24>>24``: a trace of the calculator in GSM8K's worked answers."""


@dataclass(frozen=True)
class Math:
    """The task that needs no name: it takes every layout of ``rows.layouts``, and rows that ``data.fields`` maps.

    A question goes into the template; a prompt that is whole already (a text, or chat messages) stays as it is.
    """

    name: str = "math"
    preload: Sequence[str] = ("math_verify",)
    takes_layouts: bool = True

    def problem(self, row: Row, *, template: str | None) -> Problem:
        """Make a problem; its answer is "" where the row has none, which only a reward of your own can judge."""
        example = read_example(row)
        if example.question is None and template is not None:
            raise UserError(
                "data.template", template, f"{row.source} has a whole prompt, which no template applies to",
                "leave it out, or map the column that holds the bare question: data.fields.question=COLUMN",
            )  # fmt: skip
        question = example.question or example.prompt or json.dumps(example.messages, ensure_ascii=False)
        prompt = example.prompt or ""
        if example.question is not None:
            prompt = fill_template(check_template(TEMPLATE if template is None else template), example.question)
        answer, solution = _reference(example)
        return Problem(
            problem_id=problem_id(self.name, question),
            prompt=prompt,
            answer=answer,
            solution=solution,
            source=row.source,
            question=example.question or "",
            metadata=example.metadata,
            messages=example.messages,
            tools=example.tools,
        )

    def score(
        self, problem: Problem, response: str, *, finish_reason: FinishReason = "stop", lenient: bool = False
    ) -> Score:
        """Reward 1.0 for an answer equal to the reference: marked, and of a response that was not cut, unless ``lenient``."""
        return score_math(problem.answer, response, finish_reason=finish_reason, lenient=lenient)


def _reference(example: Example) -> tuple[str, str | None]:
    """Return the answer, and a worked one that ends in it where there is one.

    GSM8K's answer is worked text and a last line ``#### 72``; MATH's stands in the box of its solution.
    """
    answer, solution = example.answer, example.solution
    steps, mark, last = (answer or "").rpartition("####")
    if mark and "\n" not in last.strip():
        number = last.strip().replace(",", "")
        solution = solution or f"{_CALCULATOR.sub('', steps).strip()}\nThe answer is \\boxed{{{number}}}.".lstrip()
        return number, solution
    if answer is None and solution is not None:
        answer = find_marked_answer(solution)
    answer = (answer or "").strip()
    if match := _WRAPPED.fullmatch(answer):
        answer = (match["inner"] or match["boxed"]).strip()
    return answer, solution

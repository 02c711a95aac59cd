"""GSM8K: grade-school word problems with integer answers (Cobbe et al., 2110.14168), in the published jsonl form."""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from megatron_rl.errors import UserError
from megatron_rl.rewards.math import score_math
from megatron_rl.tasks.base import check_template, fill_template, problem_id, read_rows, shorten, unique_problems
from megatron_rl.types import Problem, Score

TEMPLATE = (
    "{question}\n"
    "Reason step by step, one calculation a line, and finish with the final answer as a plain number in \\boxed{}.\n"
)
ANSWER_MARK = "####"

_CALCULATOR = re.compile(r"<<[^<>]*>>")
"""``48/2 = <<48/2=24>>24``: a trace of the calculator that the data's authors used."""
_NUMBER = re.compile(r"-?(\d+|\d{1,3}(,\d{3})+)(\.\d+)?")


@dataclass(frozen=True)
class Gsm8k:
    """Fields ``question`` and ``answer``; the answer is worked text and a last line ``#### 72``."""

    name: str = "gsm8k"
    preload: Sequence[str] = ("math_verify",)

    def load(self, path: Path, *, template: str | None) -> list[Problem]:
        """Read problems: reference ``72``, demonstration ``... The answer is \\boxed{72}.``"""
        template = check_template(TEMPLATE if template is None else template)
        problems = []
        for source, row in read_rows(path, required=("question", "answer")):
            steps, number = _split_answer(row["answer"], source)
            problems.append(
                Problem(
                    problem_id=problem_id(self.name, row["question"]),
                    prompt=fill_template(template, row["question"]),
                    answer=number,
                    solution=f"{steps}\nThe answer is \\boxed{{{number}}}.".lstrip(),
                    source=source,
                )
            )
        return unique_problems(problems)

    def score(self, answer: str, response: str) -> Score:
        """1.0 for an answer equal to the reference."""
        return score_math(answer, response)


def _split_answer(text: str, source: str) -> tuple[str, str]:
    """(worked steps, final number without thousands separators)."""
    steps, mark, number = text.rpartition(ANSWER_MARK)
    number = number.strip()
    if not mark or not _NUMBER.fullmatch(number):
        raise UserError(
            source,
            shorten(text.strip().rpartition("\n")[2]),
            f"field 'answer' must end in {ANSWER_MARK} and a number",
            f"add a last line such as {ANSWER_MARK} 72",
        )
    return _CALCULATOR.sub("", steps).strip(), number.replace(",", "")

"""Final answers that tasks extract: normalised, bounded, and the same on every rank after scoring in workers."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import pytest
import torch
import torch.distributed as dist

from megatron_rl.scoring.scorer import Scorer
from megatron_rl.tasks import get_task
from megatron_rl.tasks.gsm8k import Gsm8k
from megatron_rl.types import Completion, Problem, Prompt, Score
from tests.forked import run_ranks


def gsm8k_score(response: str, **options: Any) -> Score:
    return Gsm8k().score(Problem("id", "text", "72"), response, **options)


@pytest.mark.parametrize(
    ("response", "answer"),
    [
        (r"\boxed{72}", "72"), (r"\boxed{144/2}", "72"), (r"\boxed{72.00 clips}", "72"),  # right ones
        (r"\boxed{\$1,071.50}", "1071.5"), (r"\boxed{1{,}071.5}", "1071.5"), ("#### 0071", "71"), (r"\boxed{71.0}", "71"),
        ("\\boxed{\N{MINUS SIGN}7}", "-7"), (r"\boxed{-0}", "0"), (r"\boxed{+.50}", "0.5"), (r"\boxed{x + 1}", "x+1"),
        (r"\boxed{71.50 \text{ dollars}}", "71.5"), (r"\boxed{5 \text{ dozen}}", "60"), (r"\boxed{11 5/6}", "71/6"),
        ("The answer is 1,071 clips.", "1071"), ("That makes 1,071.", ""), ("none", ""), ("", ""), (r"\boxed{.}", ""),
        (r"\boxed{" + "1" * 5000 + "}", "1" * 64), (r"\boxed{" + "x" * 5000 + "}", "x" * 64),
    ],
)  # fmt: skip
def test_answers_of_gsm8k_are_normalised(response: str, answer: str) -> None:
    assert gsm8k_score(response).answer == answer


def test_unmarked_answers_of_gsm8k_are_the_last_number_if_lenient() -> None:
    answers = [gsm8k_score(text, lenient=True).answer for text in ("That makes 1,071.", "so 15-5", "so 70 + 2", "none")]
    assert answers == ["1071", "5", "72", ""]


def test_cut_responses_of_gsm8k_have_no_answer() -> None:
    score = gsm8k_score(r"\boxed{72}", finish_reason="length")
    assert (score.reward, score.reason, score.answer) == (0.0, "cut", "")


@pytest.mark.parametrize(
    ("response", "answer"),
    [("#### 3 6", "36"), ("#### 036", "36"), ("#### -5", "-5"), ("#### six", ""), ("#### " + "1" * 5000, "1" * 64)],
)
def test_answers_of_word_problems_are_normalised(response: str, answer: str) -> None:
    assert get_task("word_problems").score(Problem("id", "text", "36"), response).answer == answer


class Bytes:
    """A token a byte."""

    def batch_decode(self, rows: Sequence[Sequence[int]], *, skip_special_tokens: bool) -> list[str]:
        return [bytes(row).decode() for row in rows]


def score_in_workers(texts: Sequence[str]) -> list[Score]:
    group = dist.group.WORLD
    assert group is not None
    scorer = Scorer(["word_problems"], Bytes(), num_workers=1, timeout_s=5.0, cpu_group=group)
    prompt = Prompt(Problem("id", "text", "36", task="word_problems"), torch.tensor([1]))
    completions = [Completion(torch.tensor(list(text.encode())), torch.zeros(1), "stop", 0) for text in texts]
    try:
        return scorer.score([prompt] * len(texts), completions)
    finally:
        scorer.close()


def test_answers_travel_from_the_workers_to_every_rank() -> None:
    first, second = run_ranks(score_in_workers, 2, ["#### 3 6", "#### 7", "none"])
    assert first == second
    assert [(score.answer, score.reward) for score in first] == [("36", 1.0), ("7", 0.0), ("", 0.0)]

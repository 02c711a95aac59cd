"""Equality of final answers, and what a response earns. The files hold answers of models and their right verdicts."""

from __future__ import annotations

import json
import threading
import time
from pathlib import Path
from typing import Any

import pytest

from megatron_rl.rewards.math import score_math

HERE = Path(__file__).parent
NOTHING = {"correct": 0.0, "format": 0.0}


def rows(name: str) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (HERE / name).read_text().splitlines()]


def boxed(answer: str) -> str:
    return f"Some steps.\nThe answer is $\\boxed{{{answer}}}$."


PAIRS = [(row["answer"], row["response"], row["reward"]) for row in rows("math_pairs.jsonl")]
KINDS = rows("math_answers.jsonl")
EQUAL = [(row["kind"], row["answer"], given) for row in KINDS for given in row["equal"]]
DIFFERENT = [(row["kind"], row["answer"], given) for row in KINDS for given in row["different"]]


@pytest.mark.parametrize(("answer", "response", "reward"), PAIRS)
def test_pairs_of_a_reference_and_a_response(answer: str, response: str, reward: int) -> None:
    score = score_math(answer, response)
    assert (score.reward, score.parts["correct"]) == (reward, reward)
    assert not score.is_failure


@pytest.mark.parametrize(("kind", "answer", "given"), EQUAL)
def test_equal_answers(kind: str, answer: str, given: str) -> None:
    score = score_math(answer, boxed(given))
    assert (score.reward, score.parts, score.reason) == (1.0, {"correct": 1.0, "format": 1.0}, "correct")


@pytest.mark.parametrize(("kind", "answer", "given"), DIFFERENT)
def test_different_answers(kind: str, answer: str, given: str) -> None:
    score = score_math(answer, boxed(given))
    assert (score.reward, score.parts, score.reason) == (0.0, {"correct": 0.0, "format": 1.0}, "wrong")


def test_value_after_the_last_equals_sign_counts() -> None:
    response = boxed(r"5 \text{ km} + 6 \text{ km} = 11 \text{ km}")
    assert [score_math(answer, response).reward for answer in ("11", "5", "6")] == [1.0, 0.0, 0.0]


def test_scale_words_multiply() -> None:
    for words, value in (
        (r"5\text{ dozen}", "60"),
        (r"5\text{ million}", "5000000"),
        ("5万", "50000"),
        ("5 tenths", "0.5"),
    ):
        assert [score_math(answer, boxed(words)).reward for answer in ("5", value)] == [0.0, 1.0]


@pytest.mark.parametrize(
    "given", [r"5 \text{ feet } 6 \text{ inches}", r"5\text{ apples and }6\text{ oranges}", "5'6\"", r"5 \text{ or } 6"]
)
def test_several_quantities_equal_none_of_them_nor_their_sum(given: str) -> None:
    assert not any(score_math(answer, boxed(given)).reward for answer in ("5", "6", "11", "56"))
    assert score_math(given, boxed(given)).reward == 1.0


@pytest.mark.parametrize(
    "relation", [r"\neq", r"\geq", r"\leq", "<", ">", r"\not=", "≠", "≥", r"\sim", r"\pm", r"\lnot"]
)
@pytest.mark.parametrize("answer", ["5", r"\sqrt{5}", "x+1"])
def test_a_relation_is_not_what_it_relates_to(relation: str, answer: str) -> None:
    assert score_math(answer, boxed(f"{relation} {answer}")).reward == 0.0
    assert score_math(answer, boxed(answer)).reward == 1.0


def test_decimals_are_compared_in_both_absolute_and_relative_size() -> None:
    assert [score_math(r"\frac{1}{3}", boxed(given)).reward for given in ("0.333333", "0.33333")] == [1.0, 0.0]
    assert [score_math("0.000002", boxed(given)).reward for given in ("2e-6", "0.0000021")] == [1.0, 0.0]
    assert [score_math("1000000", boxed(given)).reward for given in ("1000000.0", "1000000.1")] == [1.0, 0.0]


def test_huge_powers_are_not_computed() -> None:
    start = time.monotonic()
    for given in ("9^{9^{9^9}}", "10^{10^{10}}", "(10^9)!", "2^{-10^{12}}", r"\sqrt{9^{9^{9^9}}}", "x^{9^{9^{9^9}}}"):
        assert score_math(r"\sqrt{2}", boxed(given)).reward == 0.0
    assert time.monotonic() - start < 5


def test_different_formulas_are_told_apart_without_a_search() -> None:
    """Simplifying the difference of these two takes math-verify over six seconds."""
    start = time.monotonic()
    answer = r"\frac{\cos (2 t)}{15}+C_{1} e^{t}+C_{2} e^{-t}+C_{3} \cos (t)+C_{4} \sin (t)"
    assert score_math(answer, boxed(r"\frac{a M^{1 / 3}}{G M^{2 / 3}+b}")).reward == 0.0
    assert time.monotonic() - start < 5


@pytest.mark.parametrize(
    "given", ["9" * 100_000, "(" * 50, "7" * 900, "72" + "0" * 1000, "a " * 400, "(" * 400 + ")" * 400]
)
def test_long_answers_are_wrong_within_a_second(given: str) -> None:
    start = time.monotonic()
    assert score_math("72", boxed(given)).reason == "wrong"
    assert time.monotonic() - start < 2


@pytest.mark.parametrize("response", ["", " ", "no number", "\\boxed{}", "####", "\x00", "\N{PILE OF POO}" * 10_000])
@pytest.mark.parametrize("lenient", [False, True])
def test_no_answer(response: str, lenient: bool) -> None:
    score = score_math("72", response, lenient=lenient)
    assert (score.reward, score.parts, score.reason) == (0.0, NOTHING, "no answer")


UNMARKED = ["It is 72.", "so 70 + 2 = 72", "= $72", "clips: 1,000 - 928 = 72 clips", "#### 1. Compute\nIt is 72"]


@pytest.mark.parametrize("response", UNMARKED)
def test_unmarked_answer_counts_only_if_lenient(response: str) -> None:
    strict, lenient = (score_math("72", response, lenient=lenient) for lenient in (False, True))
    assert (strict.reward, strict.parts, strict.reason) == (0.0, NOTHING, "no answer")
    assert (lenient.reward, lenient.parts) == (1.0, {"correct": 1.0, "format": 0.0})


def test_unmarked_answer_is_the_last_number() -> None:
    assert score_math("72", "It is 72. No, it is 71.", lenient=True).reason == "wrong"
    assert score_math("72", "It is 72. " + "Let me think. " * 1000, lenient=True).reason == "no answer"


@pytest.mark.parametrize("finish_reason", ["length", "abort"])
@pytest.mark.parametrize("response", [r"\boxed{72}", "#### 72", "The answer is 72", "so 72", ""])
def test_cut_response_earns_nothing_whatever_is_in_it(finish_reason: Any, response: str) -> None:
    score = score_math("72", response, finish_reason=finish_reason)
    assert (score.reward, score.parts, score.reason) == (0.0, NOTHING, "cut")
    assert score_math("72", response, finish_reason=finish_reason, lenient=True) == score_math(
        "72", response, lenient=True
    )


@pytest.mark.parametrize("lenient", [False, True])
def test_box_that_was_cut_holds_no_answer(lenient: bool) -> None:
    score = score_math("7", r"First \boxed{5}. Wait, I redo it: \boxed{7", lenient=lenient)
    assert (score.reward, score.reason) == (0.0, "no answer")


def test_works_outside_the_main_thread() -> None:
    rewards = []
    thread = threading.Thread(target=lambda: rewards.append(score_math(r"\sqrt{2}", r"\boxed{2^{1/2}}").reward))
    thread.start()
    thread.join()
    assert rewards == [1.0]

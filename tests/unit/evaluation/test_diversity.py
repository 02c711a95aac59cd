"""Diversity of samples, keep and explore rates, and the evaluator that reports them: numbers that can be checked by hand."""

from __future__ import annotations

import json
import math
from collections.abc import Sequence
from fractions import Fraction
from itertools import combinations
from pathlib import Path
from typing import Any, cast

import pytest
import torch
import torch.distributed as dist

from megatron_rl.config.data import EvalConfig
from megatron_rl.errors import UserError
from megatron_rl.evaluation.diversity import answer_metrics, distinct, entropy, keep_and_explore, style_metrics
from megatron_rl.evaluation.evaluator import (
    EvalResults,
    Evaluator,
    ProblemResult,
    keep_and_explore_rates,
    results_path,
    save_results,
)
from megatron_rl.evaluation.pass_at_k import pass_at_k
from megatron_rl.rollout.collect import Collector, Sampling
from megatron_rl.scoring.scorer import Scorer
from megatron_rl.tasks import get_task
from megatron_rl.types import Completion, Problem, Prompt, Rollout, RolloutGroup, Score
from tests.forked import run_ranks

# ---- counting


def test_distinct_leaves_out_what_is_no_answer() -> None:
    assert distinct(["36", "36", "7", ""]) == 2
    assert distinct([""]) == distinct([]) == 0


@pytest.mark.parametrize(
    ("labels", "nats"),
    [
        (["a", "a", "b"], 2 / 3 * math.log(1.5) + 1 / 3 * math.log(3)),  # 0.636514
        (["a", "b", "", ""], math.log(2)),
        (list("abcde"), math.log(5)),
        (["a"] * 7, 0.0),
        ([""], 0.0),
        ([], 0.0),
    ],
    ids=repr,
)
def test_entropy_in_nats(labels: list[str], nats: float) -> None:
    assert entropy(labels) == pytest.approx(nats, abs=1e-12)
    assert math.copysign(1, entropy(labels)) == 1, "no entropy is 0.0, not -0.0"


BEFORE = {"a": True, "b": True, "c": True, "d": False, "e": False}


@pytest.mark.parametrize(
    ("before", "after", "rates"),
    [
        (BEFORE, BEFORE, {"keep_rate": 1.0, "explore_rate": 0.0}),
        (BEFORE, BEFORE | {"b": False, "e": True}, {"keep_rate": 2 / 3, "explore_rate": 1 / 2}),
        (BEFORE, dict.fromkeys(BEFORE, True), {"keep_rate": 1.0, "explore_rate": 1.0}),
        ({"a": True}, {"a": False}, {"keep_rate": 0.0}),
        ({"a": False}, {"a": True}, {"explore_rate": 1.0}),
        ({}, {}, {}),
    ],
    ids=["same", "mixed", "all solved", "nothing failed", "nothing solved", "nothing"],
)
def test_keep_and_explore(before: dict[str, bool], after: dict[str, bool], rates: dict[str, float]) -> None:
    assert keep_and_explore(before, after) == rates


def test_keep_and_explore_go_by_problem_and_not_by_place() -> None:
    assert keep_and_explore({"a": True, "b": False}, {"b": False, "a": True}) == {"keep_rate": 1.0, "explore_rate": 0.0}
    with pytest.raises(AssertionError, match="same problems"):
        keep_and_explore({"a": True}, {"b": True})


def test_answers_are_counted_by_problem() -> None:
    metrics = answer_metrics([["1", "1", "2", ""], ["3", "3", "3", "3"], ["", "", "", ""]])
    assert metrics["distinct_answers"] == 1.0  # 2, 1 and 0
    assert metrics["answer_entropy"] == pytest.approx((2 / 3 * math.log(1.5) + 1 / 3 * math.log(3)) / 3)


def test_nothing_is_said_of_answers_that_cannot_differ_or_are_not_there() -> None:
    assert answer_metrics([["1"], ["2"]]) == answer_metrics([["", ""], ["", ""]]) == answer_metrics([]) == {}
    assert style_metrics([["", ""]]) == style_metrics([]) == {}


def test_styles_of_a_problem_and_of_all_together() -> None:
    """Two problems, one style each, but not the same one: no entropy within them, ln 2 over them."""
    metrics = style_metrics([["table"] * 3, ["split"] * 3])
    assert metrics == {
        "style/split": 0.5, "style/table": 0.5, "style_entropy_pooled": pytest.approx(math.log(2)),
        "distinct_styles": 1.0, "style_entropy": 0.0, "styles_ge_3": 0.0,
    }  # fmt: skip


def test_shares_of_styles_are_of_all_samples() -> None:
    metrics = style_metrics([["a", "b", "c", ""], ["a", "a", "b", "b"]])
    assert metrics["style/a"] == metrics["style/b"] == 3 / 8 and metrics["style/c"] == 1 / 8
    assert metrics["styles_ge_3"] == 0.5 and metrics["distinct_styles"] == 2.5
    assert metrics["style_entropy"] == pytest.approx((math.log(3) + math.log(2)) / 2)


def test_too_few_samples_leave_out_what_they_cannot_show() -> None:
    assert style_metrics([["a"], ["b"]]).keys() == {"style/a", "style/b", "style_entropy_pooled"}
    assert "styles_ge_3" not in style_metrics([["a", "b"]])


# ---- what tasks extract


@pytest.mark.parametrize(
    ("response", "answer"),
    [
        (r"\boxed{72}", "72"), (r"\boxed{144/2}", "72"), (r"\boxed{72.00 clips}", "72"),  # right ones
        (r"\boxed{\$1,071.50}", "1071.5"), (r"\boxed{1{,}071.5}", "1071.5"), ("#### 0071", "71"), (r"\boxed{71.0}", "71"),
        ("\\boxed{\N{MINUS SIGN}7}", "-7"), (r"\boxed{-0}", "0"), (r"\boxed{+.50}", "0.5"), (r"\boxed{x + 1}", "x+1"),
        ("That makes 1,071.", "1071"), ("so 15-5", "5"), ("none", ""), ("", ""), (r"\boxed{.}", ""),
        (r"\boxed{" + "1" * 5000 + "}", "1" * 64), (r"\boxed{" + "x" * 5000 + "}", "x" * 64),
    ],
)  # fmt: skip
def test_answers_of_gsm8k_are_normalised(response: str, answer: str) -> None:
    assert get_task("gsm8k").score(Problem("id", "text", "72"), response).answer == answer


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


# ---- pass@k


def test_a_grid_of_k_is_exact() -> None:
    for num_correct in (0, 1, 3, 31, 32, 33, 60, 64):
        for k in (1, 2, 4, 8, 16, 32, 64):
            exact = 1 - Fraction(math.comb(64 - num_correct, k), math.comb(64, k))
            assert pass_at_k(64, num_correct, k) == pytest.approx(float(exact), rel=1e-12, abs=1e-15)
    draws = list(combinations([True] * 3 + [False] * 7, 5))
    assert pass_at_k(10, 3, 5) == pytest.approx(sum(map(any, draws)) / len(draws)) == pytest.approx(0.916667, abs=1e-6)


# ---- the evaluator


class Planted:
    """A collector whose model says what the test says: by problem, samples and a greedy response, each (answer, style)."""

    def __init__(self, samples: dict[str, list[tuple[str, str]]], greedy: dict[str, str]) -> None:
        self.samples, self.greedy = samples, greedy
        self.purposes: list[str] = []

    def collect(
        self, prompts: Sequence[Prompt], *, num_generations: int, sampling: Sampling, purpose: str
    ) -> list[RolloutGroup]:
        self.purposes.append(purpose)
        groups = []
        for prompt in prompts:
            name = prompt.problem.problem_id
            said = [(self.greedy[name], "")] if sampling.temperature == 0 else self.samples[name][:num_generations]
            assert len(said) == num_generations
            scores = [
                Score(float(answer == prompt.problem.answer), answer=answer, style=style) for answer, style in said
            ]
            completion = Completion(torch.zeros(4, dtype=torch.int64), torch.zeros(4), "stop", 0)
            groups.append(RolloutGroup(prompt, [Rollout(completion, score) for score in scores]))
        return groups


def evaluator_of(names: str = "ab", **config: Any) -> Evaluator:
    prompts = [Prompt(Problem(name, "text", "1"), torch.tensor([1])) for name in names]
    return Evaluator(prompts, EvalConfig(**({"num_samples": 4, "k_values": [1, 2, 4]} | config)), 16)


SAMPLES = {
    "a": [("1", "x"), ("1", "y"), ("2", "z"), ("3", "x")],
    "b": [("", ""), ("2", "x"), ("2", "x"), ("", "")],
}


def planted(greedy: str = "12") -> Collector:
    return cast(Collector, Planted(SAMPLES, dict(zip("ab", greedy))))


def test_evaluation_counts_by_hand() -> None:
    collector = planted()
    evaluation = evaluator_of().evaluate(collector, step=3, num_samples=4)
    assert cast(Planted, collector).purposes == ["eval/3", "eval/3/greedy"]
    answers = (2 * math.log(2) / 4 + 2 * math.log(4) / 4 + 0) / 2  # of a: 1/2, 1/4, 1/4
    styles = (2 * math.log(2) / 4 + 2 * math.log(4) / 4 + 0) / 2  # of a: x, y, z as 2, 1, 1
    pooled = 4 / 6 * math.log(6 / 4) + 2 * math.log(6) / 6  # x, y, z as 4, 1, 1
    assert evaluation.metrics == pytest.approx(
        {
            "eval/pass@1": 1 / 4, "eval/pass@2": (1 - 1 / 6) / 2, "eval/pass@4": 1 / 2, "eval/avg@4": 1 / 4,
            "eval/greedy": 1 / 2, "eval/response_length": 4.0,
            "eval/distinct_answers": 2.0, "eval/answer_entropy": answers,
            "eval/style/x": 4 / 8, "eval/style/y": 1 / 8, "eval/style/z": 1 / 8,
            "eval/distinct_styles": 2.0, "eval/style_entropy": styles, "eval/style_entropy_pooled": pooled,
            "eval/styles_ge_3": 1 / 2,
        }
    )  # fmt: skip
    assert evaluation.results == EvalResults(
        3, 4, 1.0, 1.0, [ProblemResult("a", 2, is_greedy_correct=True), ProblemResult("b", 0, is_greedy_correct=False)]
    )


def test_fewer_samples_leave_out_the_larger_k() -> None:
    metrics = evaluator_of(greedy=False).evaluate(planted(), step=0, num_samples=1).metrics
    assert metrics.keys() == {
        "eval/pass@1", "eval/avg@1", "eval/response_length", "eval/style/x", "eval/style_entropy_pooled",
    }  # fmt: skip


# ---- against the baseline


def results(*outcomes: tuple[int, bool | None], num_samples: int = 4, temperature: float = 1.0) -> EvalResults:
    problems = [ProblemResult(name, correct, greedy) for name, (correct, greedy) in zip("abcdef", outcomes)]
    return EvalResults(0, num_samples, temperature, 1.0, problems)


def test_both_readings_of_solved() -> None:
    before = results((4, True), (1, False), (0, False), (2, True))
    after = results((4, True), (0, True), (1, False), (1, False))
    assert keep_and_explore_rates(before, after) == {
        "eval/keep_rate_greedy": 1 / 2, "eval/explore_rate_greedy": 1 / 2,
        "eval/keep_rate_any": 2 / 3, "eval/explore_rate_any": 1.0,
    }  # fmt: skip


def test_only_what_was_measured_alike_is_compared() -> None:
    before = results((4, True), (0, False))
    greedy = {"eval/keep_rate_greedy": 1.0, "eval/explore_rate_greedy": 0.0}
    assert keep_and_explore_rates(before, results((1, True), (0, False), num_samples=1)) == greedy
    assert keep_and_explore_rates(before, results((4, True), (0, False), temperature=0.6)) == greedy
    of_any = {"eval/keep_rate_any": 1.0, "eval/explore_rate_any": 0.0}
    assert keep_and_explore_rates(before, results((4, None), (0, None))) == of_any


def test_results_come_back_from_their_file(tmp_path: Path) -> None:
    evaluator = evaluator_of()
    found = evaluator.evaluate(planted(), step=0, num_samples=4).results
    save_results(tmp_path, results((0, None)))
    save_results(tmp_path, found)
    assert results_path(tmp_path, 0) == tmp_path / "eval/step_00000000.json"
    assert evaluator.read_results(results_path(tmp_path, 0), field="eval") == found
    assert [path.name for path in (tmp_path / "eval").iterdir()] == ["step_00000000.json"]
    problem = {"problem_id": "a", "num_correct": 2, "is_greedy_correct": True}
    assert json.loads(results_path(tmp_path, 0).read_text())["problems"][0] == problem


def test_a_baseline_is_read_where_one_is_named(tmp_path: Path) -> None:
    assert evaluator_of().read_baseline() is None
    save_results(tmp_path, results((4, True), (0, False)))
    assert evaluator_of(baseline=str(results_path(tmp_path, 0))).read_baseline() == results((4, True), (0, False))


@pytest.mark.parametrize(
    ("text", "words"),
    [
        (None, "cannot be read (No such file or directory)"),
        ("{", "holds no results of an evaluation"),
        ("[]", "holds no results of an evaluation"),
        ('{"step": 0, "num_samples": 4, "temperature": 1, "top_p": 1, "problems": [{}]}', "problems.0.problem_id"),
    ],
)
def test_a_baseline_that_is_none_is_refused(tmp_path: Path, text: str | None, words: str) -> None:
    path = tmp_path / "baseline.json"
    if text is not None:
        path.write_text(text)
    with pytest.raises(UserError) as caught:
        evaluator_of(baseline=str(path)).read_baseline()
    assert caught.value.field == "eval.baseline" and caught.value.value == str(path) and words in caught.value.rule


def test_a_baseline_of_other_problems_is_refused_with_numbers(tmp_path: Path) -> None:
    save_results(tmp_path, results((4, True), (0, False), (1, True)))
    with pytest.raises(UserError) as caught:
        evaluator_of("aefg", baseline=str(results_path(tmp_path, 0))).read_baseline()
    assert "3 of the 4 evaluated here are not in it, and 2 of its 3 are not evaluated here" in caught.value.rule


def test_results_that_cannot_be_written_say_so(tmp_path: Path) -> None:
    (tmp_path / "eval").touch()
    with pytest.raises(UserError, match=r"exp_manager\.exp_dir = .*could not be written"):
        save_results(tmp_path, results((0, None)))

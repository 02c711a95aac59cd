"""Figures of `megatron-rl eval`, against definitions written out."""

from __future__ import annotations

from itertools import combinations
from math import comb

import numpy as np
import pytest

from megatron_rl.errors import UserError
from megatron_rl.evaluation.figures import Outcomes, figures, intervals, majority_at, pass_at
from megatron_rl.evaluation.samples import check_columns, outcomes_of
from megatron_rl.types import Problem

NAN = np.nan


def test_pass_at_k_is_its_definition_and_leaves_out_what_was_not_judged() -> None:
    correct = np.array([[1, 0, 0, 1.0], [0, 0, 0, 0], [1, NAN, 0, 0], [NAN, NAN, NAN, 1]])
    for k in (1, 2, 3):
        expected = [1 - comb(2, k) / comb(4, k), 0.0, 1 - comb(2, k) / comb(3, k), 1.0 if k == 1 else NAN]
        np.testing.assert_allclose(pass_at(correct, k), expected)


def by_hand(correct: list[float], votes: list[int], k: int) -> float:
    """The mean over all subsets of the share of right ones among the most frequent answers."""
    chances = []
    for chosen in combinations(range(len(votes)), k):
        counts = {v: sum(votes[i] == v for i in chosen) for v in {votes[i] for i in chosen} if v >= 0}
        top = [v for v, count in counts.items() if count == max(counts.values())]
        right = [max(correct[i] for i in chosen if votes[i] == v) for v in top]
        chances.append(sum(right) / len(top) if top else 0.0)
    return float(np.mean(chances))


@pytest.mark.parametrize(
    ("correct", "votes"),
    [
        ([1.0, 1, 0, 0, 0], [0, 0, 1, 2, 3]),
        ([1.0, 1, 0, 0, 0], [0, 0, 1, 1, 1]),
        ([1.0, 0, 0, 0, 0], [0, 1, -1, -1, -1]),
        ([0.0, 0, 0, 0, 0], [-1, -1, -1, -1, -1]),
    ],
)
def test_the_majority_is_right_as_often_as_by_hand(correct: list[float], votes: list[int]) -> None:
    found = {k: majority_at(np.array([correct]), np.array([votes]), k, 0)[0] for k in (3, 5)}
    assert found[5] == pytest.approx(by_hand(correct, votes, 5))  # all there are
    many = majority_at(np.array([correct] * 400), np.array([votes] * 400), 3, 0).mean()  # 64 subsets each
    assert many == pytest.approx(by_hand(correct, votes, 3), abs=0.02)


def test_an_interval_holds_the_mean_of_other_problems_nineteen_times_in_twenty() -> None:
    rng = np.random.default_rng(1)
    hits = 0
    for seed in range(200):
        low, high = intervals((rng.random((80, 1)) < 0.3).astype(float), seed)
        hits += low[0] <= 0.3 <= high[0]
    assert 175 <= hits <= 199


def test_figures_count_their_problems() -> None:
    correct = np.array([[1.0, 0.0], [NAN, NAN], [1.0, NAN]])
    lengths = np.full((3, 2), 10.0)
    outcomes = Outcomes(
        correct, np.zeros((3, 2), int), lengths, np.array([[1.0, 0], [0, 0], [0, 0]]), np.array([1.0, 0.0, NAN])
    )
    found = figures(outcomes, [1, 2], seed=0)
    assert {name: at["num_problems"] for name, at in found.items()} == {
        "greedy": 2, "pass@1": 2, "pass@2": 1, "avg@2": 2, "maj@2": 1, "cut_frac": 3, "response_length": 3,
    }  # fmt: skip
    assert found["pass@1"]["value"] == 0.75 and found["cut_frac"]["value"] == pytest.approx(1 / 6)


def test_a_problem_that_a_large_file_holds_twice_counts_twice() -> None:
    rows = [
        {"source": source, "kind": kind, "answer": "4", "correct": correct, "response_tokens": 3, "finish": "stop"}
        for source, correct in (("f:1", True), ("f:2", False))
        for kind in ("sample", "sample", "greedy")
    ]
    outcomes = outcomes_of(rows, ["f:1", "f:2"])
    assert outcomes.correct.tolist() == [[1, 1], [0, 0]]
    assert outcomes.greedy.tolist() == [1, 0]


def test_a_column_that_no_problem_has_is_named_before_anything_is_sampled() -> None:
    problems = [Problem("a", "?", "1"), Problem("b", "?", "1", metadata={"extra": {"level": 0}})]
    check_columns(problems, ["extra", "extra.level"])  # one set may have it, and another not
    with pytest.raises(UserError, match=r"eval\.by = 'level': is no column .* has extra"):
        check_columns(problems, ["level"])

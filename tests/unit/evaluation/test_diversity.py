"""Diversity of samples, and keep and explore rates: numbers that can be checked by hand."""

from __future__ import annotations

import math

import pytest

from megatron_rl.evaluation.diversity import answer_metrics, distinct, entropy, keep_and_explore, style_metrics


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

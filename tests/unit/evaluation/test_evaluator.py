"""The evaluator on a planted model, its result files, and rates against a baseline."""

from __future__ import annotations

import json
import math
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any, cast

import pytest
import torch

from megatron_rl.config.data import EvalConfig
from megatron_rl.errors import UserError
from megatron_rl.evaluation.evaluator import (
    EvalResults,
    Evaluation,
    Evaluator,
    ProblemResult,
    keep_and_explore_rates,
    results_path,
    save_results,
)
from megatron_rl.rollout.collect import Collector, Sampling
from megatron_rl.types import Completion, Problem, Prompt, Rollout, RolloutGroup, Score


class Planted:
    """A collector whose model says what the test says: by problem, samples and a greedy response, each (answer, style).

    The scorer fails on an answer that says so: ``timeout`` or ``crash``.
    """

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
                Score(0.0, reason=answer, is_failure=True)
                if answer in ("timeout", "crash")
                else Score(float(answer == prompt.problem.answer), answer=answer, style=style)
                for answer, style in said
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


def evaluate(evaluator: Evaluator, collector: Collector, *, step: int = 0, num_samples: int = 4) -> Evaluation:
    """Evaluate where nothing is to be said."""
    said: list[str] = []
    evaluation = evaluator.evaluate(collector, step=step, num_samples=num_samples, say=said.append)
    assert said == []
    return evaluation


def test_evaluation_counts_by_hand() -> None:
    collector = planted()
    evaluation = evaluate(evaluator_of(), collector, step=3)
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
        3, 4, 1.0, 1.0, [ProblemResult("a", 2, True, 4), ProblemResult("b", 0, False, 4)]
    )


def test_fewer_samples_leave_out_the_larger_k() -> None:
    metrics = evaluate(evaluator_of(greedy=False), planted(), num_samples=1).metrics
    assert metrics.keys() == {
        "eval/pass@1", "eval/avg@1", "eval/response_length", "eval/style/x", "eval/style_entropy_pooled",
    }  # fmt: skip


UNJUDGED = {
    "a": [("1", "x"), ("timeout", ""), ("2", "y"), ("1", "x")],  # two of three right
    "b": [("timeout", ""), ("crash", ""), ("timeout", ""), ("2", "z")],  # none of one
    "c": [("timeout", "")] * 4,
    "d": [("1", "x"), ("1", "x"), ("2", "x"), ("2", "x")],  # two of four
}
GREEDY = {"a": "1", "b": "timeout", "c": "2", "d": "1"}


def test_what_could_not_be_judged_is_left_out_counted_and_said_once() -> None:
    said: list[str] = []
    collector = cast(Collector, Planted(UNJUDGED, GREEDY))
    evaluation = evaluator_of("abcd", k_values=[1, 2, 3, 4]).evaluate(collector, step=5, num_samples=4, say=said.append)
    answers, pair = math.log(3) - 2 / 3 * math.log(2), math.log(2)  # entropy of 2/3 and 1/3; of 1/2 and 1/2
    assert evaluation.metrics == pytest.approx(
        {
            "eval/pass@1": (2 / 3 + 0 + 1 / 2) / 3, "eval/dropped/pass@1": 1,
            "eval/pass@2": (1 + 5 / 6) / 2, "eval/dropped/pass@2": 2,
            "eval/pass@3": (1 + 1) / 2, "eval/dropped/pass@3": 2,
            "eval/pass@4": 1.0, "eval/dropped/pass@4": 3,
            "eval/avg@4": (2 / 3 + 0 + 1 / 2) / 3, "eval/dropped/avg@4": 1,
            "eval/greedy": 2 / 3, "eval/dropped/greedy": 1,
            "eval/dropped/score_timeout": 8, "eval/dropped/score_crash": 1,
            "eval/response_length": 4.0,
            "eval/distinct_answers": 2.0, "eval/answer_entropy": (answers + pair) / 2,
            "eval/style/x": 6 / 8, "eval/style/y": 1 / 8, "eval/style/z": 1 / 8,
            "eval/distinct_styles": 1.5, "eval/style_entropy": answers / 2,
            "eval/style_entropy_pooled": 6 / 8 * math.log(8 / 6) + 2 / 8 * math.log(8),
            "eval/styles_ge_3": 0.0,
        }
    )  # fmt: skip
    assert evaluation.results.problems == [
        ProblemResult("a", 2, True, 3), ProblemResult("b", 0, None, 1), ProblemResult("c", 0, False, 0),
        ProblemResult("d", 2, True, 4),
    ]  # fmt: skip
    assert len(said) == 1 and "9 of 20 responses could not be judged (timeout 8, crash 1)" in said[0]


def test_an_evaluation_of_nothing_but_failures_has_no_accuracy() -> None:
    collector = cast(Collector, Planted({"c": [("timeout", "")] * 4}, {"c": "crash"}))
    metrics = evaluator_of("c").evaluate(collector, step=0, num_samples=4, say=lambda _: None).metrics
    assert {name for name in metrics if not name.startswith("eval/dropped/")} == {"eval/response_length"}
    assert metrics["eval/dropped/greedy"] == metrics["eval/dropped/pass@4"] == 1.0


# ---- against the baseline


def results(
    *outcomes: tuple[int, bool | None], num_samples: int = 4, temperature: float = 1.0, judged: str = "444444"
) -> EvalResults:
    """Results of problems a, b, c, ...: right samples, greedy verdict and, of ``num_samples``, the number that was judged."""
    problems = [
        ProblemResult(name, correct, greedy, min(int(count), num_samples))
        for name, (correct, greedy), count in zip("abcdef", outcomes, judged)
    ]
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


def test_only_what_both_could_judge_is_compared() -> None:
    """Greedily that is a, c and d; by all four samples it is b and d."""
    before = results((4, True), (1, None), (0, False), (2, True), judged="4434")
    after = results((3, True), (0, True), (1, True), (0, False), judged="3444")
    assert keep_and_explore_rates(before, after) == {
        "eval/keep_rate_greedy": 1 / 2, "eval/explore_rate_greedy": 1.0, "eval/keep_rate_any": 0.0,
    }  # fmt: skip
    nothing = results((0, None), (0, None), (0, None), (0, None), judged="0000")
    assert keep_and_explore_rates(before, nothing) == {}


def test_in_files_of_earlier_versions_all_samples_count(tmp_path: Path) -> None:
    saved = results((4, True), (0, None))
    save_results(tmp_path, {"": saved})
    path = results_path(tmp_path, 0)
    older = json.loads(path.read_text())
    for problem in older["problems"]:
        assert problem.pop("num_samples") == 4
    path.write_text(json.dumps(older))
    assert evaluator_of().read_results(path, field="eval") == saved


def test_results_come_back_from_their_file(tmp_path: Path) -> None:
    evaluator = evaluator_of()
    found = evaluate(evaluator, planted()).results
    save_results(tmp_path, {"": results((0, None))})
    save_results(tmp_path, {"": found})
    assert results_path(tmp_path, 0) == tmp_path / "eval/step_00000000.json"
    assert evaluator.read_results(results_path(tmp_path, 0), field="eval") == found
    assert [path.name for path in (tmp_path / "eval").iterdir()] == ["step_00000000.json"]
    problem = {"problem_id": "a", "num_correct": 2, "is_greedy_correct": True, "num_samples": 4}
    assert json.loads(results_path(tmp_path, 0).read_text())["problems"][0] == problem


def test_a_baseline_is_read_where_one_is_named(tmp_path: Path) -> None:
    assert evaluator_of().read_baseline() is None
    save_results(tmp_path, {"": results((4, True), (0, False))})
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
    save_results(tmp_path, {"": results((4, True), (0, False), (1, True))})
    with pytest.raises(UserError) as caught:
        evaluator_of("aefg", baseline=str(results_path(tmp_path, 0))).read_baseline()
    assert "3 of the 4 evaluated here are not in it, and 2 of its 3 are not evaluated here" in caught.value.rule


def test_results_that_cannot_be_written_say_so(tmp_path: Path) -> None:
    (tmp_path / "eval").touch()
    with pytest.raises(UserError, match=r"exp_manager\.exp_dir = .*could not be written"):
        save_results(tmp_path, {"": results((0, None))})


def test_a_named_set_has_metrics_draws_and_results_of_its_own(tmp_path: Path) -> None:
    named = replace(evaluator_of(), name="aime")
    collector = planted()
    found = evaluate(named, collector, step=3)
    assert cast(Planted, collector).purposes == ["eval/aime/3", "eval/aime/3/greedy"]
    plain = evaluate(evaluator_of(), planted(), step=3)
    assert found.metrics == {f"eval/aime/{name.removeprefix('eval/')}": x for name, x in plain.metrics.items()}
    other = EvalResults(3, 4, 1.0, 1.0, [ProblemResult("z", 1, None, 4)])
    save_results(tmp_path, {"aime": found.results, "other": other})
    path = results_path(tmp_path, 3)
    assert named.read_results(path, field="eval") == found.results
    with pytest.raises(UserError, match=r"has no results of a set without a name; it has aime, other"):
        evaluator_of().read_results(path, field="eval")
    save_results(tmp_path, {"": found.results})
    assert named.read_results(path, field="eval") == found.results, "a set alone needs no name on one side"
    rates = named.rates(found.results, found.results, run_dir=tmp_path, say=print)
    assert rates["eval/aime/keep_rate_any"] == 1.0

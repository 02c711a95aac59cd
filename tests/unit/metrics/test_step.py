"""Numbers of a step that can be checked by hand."""

from __future__ import annotations

import pytest
import torch

from megatron_rl.metrics.step import rollout_metrics, sample_metrics, update_metrics
from megatron_rl.types import Completion, Problem, Prompt, Rollout, RolloutGroup, RowKind, Score, TrainingSample


def rollout(correct: float, tokens: int, *, version: int = 5, reason: str = "", cut: bool = False) -> Rollout:
    ids = torch.zeros(tokens, dtype=torch.int64)
    score = Score(2 * correct - 1, {"correct": correct}, reason, is_failure=bool(reason))
    return Rollout(Completion(ids, torch.zeros(tokens), "length" if cut else "stop", version), score)


def group(*rollouts: Rollout) -> RolloutGroup:
    return RolloutGroup(Prompt(Problem("id", "text", "1"), torch.tensor([1])), list(rollouts))


def test_rollout_metrics() -> None:
    groups = [
        group(rollout(1, 4), rollout(0, 2), rollout(0, 2), rollout(0, 8, cut=True)),
        group(rollout(0, 1, version=3), rollout(0, 1), rollout(0, 1, reason="timeout"), rollout(0, 5)),
    ]
    metrics = rollout_metrics(groups, version=5)
    assert metrics["reward/mean"] == pytest.approx(-0.75)
    assert metrics["reward/correct"] == metrics["pass@1"] == pytest.approx(1 / 8)
    assert metrics["pass@4"] == 0.5
    assert (metrics["groups/all_right_frac"], metrics["groups/all_wrong_frac"]) == (0.0, 0.5)
    assert metrics["response_length/mean"] == 3.0 and metrics["response_length/max"] == 8.0
    assert metrics["response_length/cut_frac"] == 1 / 8
    assert metrics["rollout/staleness"] == 2 / 8
    assert metrics["dropped/score_timeout"] == 1.0


def test_sample_metrics() -> None:
    sample = TrainingSample(torch.tensor([1]), torch.tensor([2, 3]), RowKind.RL)
    sample.old_log_probs, sample.rollout_log_probs = torch.tensor([-1.0, -3.0]), torch.tensor([-1.5, -3.0])
    sample.advantages = torch.tensor([1.0, -1.0])
    metrics = sample_metrics([sample])
    assert metrics["mismatch/log_prob_abs_diff"] == 0.25 and metrics["mismatch/log_prob_abs_diff_max"] == 0.5
    assert metrics["cov/mean"] == 1.0  # (1 * 1 + -1 * -1) / 2: likely tokens are rewarded
    assert metrics["num_tokens"] == 3 and metrics["num_response_tokens"] == 2


def test_rows_without_any_response_token_have_sizes_only() -> None:
    sample = TrainingSample(torch.tensor([1]), torch.tensor([], dtype=torch.int64), RowKind.RL)
    sample.old_log_probs = sample.rollout_log_probs = sample.advantages = torch.zeros(0)
    assert sample_metrics([sample]) == {"num_tokens": 1.0, "num_response_tokens": 0.0}


def test_a_name_with_max_in_it_is_no_maximum() -> None:
    assert update_metrics([{"advantage/softmax": 1.0}, {"advantage/softmax": 3.0}]) == {"advantage/softmax": 2.0}


def test_update_metrics_average_and_take_maxima() -> None:
    updates = [
        {"loss": 1.0, "ratio/max": 1.0, "ratio/max_abs_log_ratio": 0.0},
        {"loss": 3.0, "ratio/max": 1.4, "ratio/max_abs_log_ratio": 0.2},
    ]
    assert update_metrics(updates) == {
        "loss": 2.0, "ratio/max": 1.4, "ratio/max_abs_log_ratio": 0.2, "ratio/first_update_max_abs_log_ratio": 0.0,
    }  # fmt: skip

"""Numbers of a step that can be checked by hand."""

from __future__ import annotations

import pytest
import torch
import torch.distributed as dist

from megatron_rl.metrics import step
from megatron_rl.metrics.step import rollout_metrics, sample_metrics, update_metrics
from megatron_rl.types import (
    Completion,
    Problem,
    Prompt,
    Rollout,
    RolloutGroup,
    RowKind,
    Score,
    TrainingSample,
    TreeNode,
)
from tests.forked import run_ranks


def rollout(correct: float, tokens: int, *, version: int = 5, failure: str = "", cut: bool = False) -> Rollout:
    ids = torch.zeros(tokens, dtype=torch.int64)
    score = Score(0.0, reason=failure, is_failure=True) if failure else Score(2 * correct - 1, {"correct": correct})
    return Rollout(Completion(ids, torch.zeros(tokens), "length" if cut else "stop", version), score)


def group(*rollouts: Rollout, tree: TreeNode | None = None) -> RolloutGroup:
    return RolloutGroup(Prompt(Problem("id", "text", "1"), torch.tensor([1])), list(rollouts), tree)


def test_rollout_metrics() -> None:
    groups = [
        group(rollout(1, 4), rollout(0, 2), rollout(0, 2), rollout(0, 8, cut=True)),
        group(rollout(0, 1, version=3), rollout(0, 1), rollout(0, 1), rollout(0, 5)),
    ]
    metrics = rollout_metrics(groups, version=5)
    assert metrics["reward/mean"] == pytest.approx(-0.75)
    assert metrics["reward/correct"] == metrics["pass@1"] == pytest.approx(1 / 8)
    assert metrics["pass@4"] == 0.5
    assert (metrics["groups/all_right_frac"], metrics["groups/all_wrong_frac"]) == (0.0, 0.5)
    assert metrics["response_length/mean"] == 3.0 and metrics["response_length/max"] == 8.0
    assert metrics["response_length/cut_frac"] == 1 / 8
    assert metrics["rollout/staleness"] == 2 / 8
    assert not any(name.startswith("dropped/") for name in metrics)


def test_what_could_not_be_judged_is_neither_right_nor_wrong() -> None:
    timeout, crash = rollout(0, 9, failure="timeout"), rollout(0, 9, failure="crash: KeyError: 'c'")
    right, wrong = rollout(1, 1), rollout(0, 1)
    groups = [group(right, timeout, timeout, crash), group(right, wrong, wrong, timeout), group(*[timeout] * 4)]
    metrics = rollout_metrics([*groups, group(right, wrong, wrong, wrong)], version=5)
    assert metrics["pass@1"] == metrics["reward/correct"] == pytest.approx((1 + 1 / 3 + 1 / 4) / 3)
    assert metrics["reward/mean"] == pytest.approx((1 - 1 / 3 - 2 / 4) / 3)
    assert (metrics["groups/all_right_frac"], metrics["groups/all_wrong_frac"]) == (1 / 3, 0.0)
    assert metrics["pass@4"] == 1.0 and metrics["dropped/pass@4"] == 3.0  # of the last group alone
    assert metrics["dropped/score_timeout"] == 7.0 and metrics["dropped/score_crash"] == 1.0
    assert metrics["num_rollouts"] == 16.0 and metrics["response_length/max"] == 9.0
    of_nothing = rollout_metrics([group(*[timeout] * 4)], version=5)
    assert not {"reward/mean", "pass@1", "pass@4", "groups/all_wrong_frac"} & of_nothing.keys()


def test_a_tree_s_mean_is_its_root_s_value() -> None:
    """An early leaf weighs as much as a subtree; of the subtree one leaf was judged, and another one not at all."""
    leaves = [rollout(1, 1), rollout(0, 1), rollout(0, 1, failure="timeout"), rollout(0, 1, failure="timeout")]
    nodes = [TreeNode(None, [], leaf.score) for leaf in leaves]
    root = TreeNode(None, [nodes[0], TreeNode(None, [nodes[1], nodes[2]]), TreeNode(None, [nodes[3]])])
    metrics = rollout_metrics([group(*leaves, tree=root)], version=5)
    assert metrics["pass@1"] == 1 / 2 and metrics["reward/mean"] == 0.0
    assert metrics["dropped/score_timeout"] == 2.0 and "pass@4" not in metrics


def test_sample_metrics() -> None:
    sample = TrainingSample(torch.tensor([1]), torch.tensor([2, 3]), RowKind.RL)
    sample.old_log_probs, sample.rollout_log_probs = torch.tensor([-1.0, -3.0]), torch.tensor([-1.5, -3.0])
    sample.advantages = torch.tensor([1.0, -1.0])
    metrics = sample_metrics([sample])
    assert metrics["mismatch/log_prob_abs_diff"] == 0.25 and metrics["mismatch/log_prob_abs_diff_max"] == 0.5
    assert metrics["cov/mean"] == 1.0  # (1 * 1 + -1 * -1) / 2: likely tokens are rewarded
    assert metrics["num_tokens"] == 3 and metrics["num_response_tokens"] == 2


def test_rows_without_the_engine_s_log_probs_have_no_mismatch() -> None:
    told, untold = (TrainingSample(torch.tensor([1]), torch.tensor([2, 3]), RowKind.RL) for _ in range(2))
    told.old_log_probs, told.rollout_log_probs = torch.tensor([-1.0, -3.0]), torch.tensor([-1.5, -3.0])
    untold.old_log_probs = torch.tensor([-2.0, -2.0])
    told.advantages, untold.advantages = torch.tensor([1.0, -1.0]), torch.tensor([3.0, 1.0])
    both, alone = sample_metrics([told, untold]), sample_metrics([untold])
    assert both["mismatch/log_prob_abs_diff"] == 0.25 and both["mismatch/log_prob_abs_diff_max"] == 0.5
    assert both["advantages/abs_mean"] == 1.5 and alone["advantages/abs_mean"] == 2.0
    assert "mismatch/log_prob_abs_diff" not in alone and "mismatch/log_prob_abs_diff_max" not in alone


def rows_of_all_kinds(masked: bool) -> list[TrainingSample]:
    torch.manual_seed(3)
    rows = []
    for number in range(40):
        kind, size = RowKind(number % 5), number % 7
        row = TrainingSample(torch.zeros(3, dtype=torch.int64), torch.zeros(size, dtype=torch.int32), kind)
        if kind in (RowKind.RL, RowKind.EDGE):
            row.old_log_probs, row.rollout_log_probs = -5 - torch.rand(size), -5 - torch.rand(size)
            row.advantages = 100 + torch.randn(size)  # far from 0: raw sums would lose digits
            row.loss_mask = torch.rand(size) < 0.5 if masked and number % 2 else None
        rows.append(row)
    return rows


@pytest.mark.parametrize("masked", [False, True])
def test_shares_of_the_rows_give_what_all_rows_give(masked: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    rows = rows_of_all_kinds(masked)
    sampled = [row for row in rows if row.kind in (RowKind.RL, RowKind.EDGE)]
    old, rollout, advantages = (
        torch.cat([getattr(row, name) for row in sampled]).double()
        for name in ("old_log_probs", "rollout_log_probs", "advantages")
    )
    in_loss = torch.cat(
        [torch.ones(len(row.response_ids)).bool() if row.loss_mask is None else row.loss_mask for row in sampled]
    )
    old_in_loss, advantages = old[in_loss], advantages[in_loss]
    covariance = (old_in_loss - old_in_loss.mean()) * (advantages - advantages.mean())
    expected = {
        "num_tokens": float(sum(row.num_tokens for row in rows)),
        "num_response_tokens": float(sum(row.num_response_tokens for row in rows)),
        "mismatch/log_prob_abs_diff": float((old - rollout).abs().mean()),
        "mismatch/log_prob_abs_diff_max": float((old - rollout).abs().max()),
        "cov/mean": float(covariance.mean()),
        "advantages/abs_mean": float(advantages.abs().mean()),
    }
    assert sample_metrics(rows) == expected  # one block on one rank: the same operations
    monkeypatch.setattr(step, "BLOCK_TOKENS", 10)
    assert sample_metrics(rows) == pytest.approx(expected, rel=1e-12)
    by_rank = run_ranks(lambda: sample_metrics(rows, dist.group.WORLD), 3)
    assert by_rank[0] == by_rank[1] == by_rank[2] == pytest.approx(expected, rel=1e-12)
    of_few = run_ranks(lambda: sample_metrics(rows[1:4], dist.group.WORLD), 4)[0]  # one row for rank 2, none for rank 3
    assert of_few == pytest.approx(sample_metrics(rows[1:4]), rel=1e-12)


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

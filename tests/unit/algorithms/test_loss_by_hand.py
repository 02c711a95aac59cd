"""The one number that an update lowers, from rewards on: advantages, weights and loss together, worked out by hand.

``doctor.exactness`` takes weights and loss from the method itself, so that a wrong formula or denominator would pass it.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import pytest
import torch

from megatron_rl.algorithms.base import OnlineAlgorithm
from megatron_rl.algorithms.grpo import GRPO
from megatron_rl.data.pack import pack
from megatron_rl.types import (
    Completion,
    Problem,
    Prompt,
    Rollout,
    RolloutGroup,
    RowKind,
    Score,
    SegmentStart,
    TrainingSample,
    TreeNode,
)
from tests.policy_case import tiny_config
from tests.unit.algorithms.test_dph_rl import dph_rl, model
from tests.unit.algorithms.test_rlep import PROMPTS, make_pool, rlep
from tests.unit.algorithms.test_spo import chain, tree

__all__ = ["model"]
PROMPT = Prompt(Problem("p", "?", "1"), torch.tensor([1]))
RAW = "algorithm.whitening=none"


def row(
    reward: float, ratios: Sequence[float], *, kind: RowKind = RowKind.RL, to_reference: Sequence[float] | None = None
) -> TrainingSample:
    """A rollout whose tokens have become so many times as likely as they were, and as under the reference."""
    made = TrainingSample(torch.tensor([1]), torch.arange(len(ratios)), kind, reward, group_index=0)
    made.extra = {"log_ratio": torch.tensor(ratios).log()}
    made.old_log_probs = torch.full((len(ratios),), -3.0)
    if to_reference is not None:
        made.ref_log_probs = -3.0 + torch.tensor(ratios).log() - torch.tensor(to_reference).log()
    return made


def loss(algorithm: OnlineAlgorithm, rows: list[TrainingSample]) -> float:
    """Return the loss of an update on these rows; where they have no ``old_log_probs``, the policy has not moved."""
    for each in rows:
        if each.old_log_probs is None and each.kind is not RowKind.REHEARSAL:
            each.old_log_probs = torch.full((each.num_response_tokens,), -3.0)
        each.extra.setdefault("log_ratio", torch.zeros(each.num_response_tokens))
    algorithm.assign_advantages(rows)
    algorithm.assign_weights(rows)
    batch = pack(rows, list(reversed(range(len(rows)))))
    vectors = batch.vectors
    start = torch.where(batch.kind == RowKind.REHEARSAL, vectors.get("ref_log_probs", 0.0), vectors["old_log_probs"])
    terms = algorithm.loss(start + vectors["log_ratio"], torch.zeros_like(start), batch)
    return float((terms.loss * vectors["weights"])[batch.loss_mask].sum())


def group_of_four() -> list[TrainingSample]:
    """One of four is right: advantages 1.5 and -0.5. Ratios beyond the clip range on both sides, and one far beyond."""
    return [row(1.0, [2.0]), row(0.0, [1.0, 0.5]), row(0.0, [1.0, 12.0, 1.0]), row(0.0, [1.0] * 4)]


def grpo(model: Path, *overrides: str) -> GRPO:
    settings = ("algorithm.overlong.buffer=0", "algorithm.ratio_clip_max=0.28", "algorithm.ratio_clip_c=3")
    sizes = ("algorithm.num_prompts_per_step=1", "policy.train_global_batch_size=4", "rollout.max_new_tokens=12")
    return GRPO(tiny_config(model, "algorithm.kl.coef=0", *settings, *sizes, *overrides))


FIRST, SECOND, THIRD, LAST = -1.5 * 1.28, 0.5 + 0.5 * 0.8, 0.5 + 0.5 * 3 + 0.5, 4 * 0.5
"""The terms of each row, summed: clipped above; clipped below; bounded by dual clip; as they are."""


@pytest.mark.parametrize(
    ("aggregation", "expected"),
    [
        ("token-mean", (FIRST + SECOND + THIRD + LAST) / 10),
        ("seq-mean-token-mean", (FIRST + SECOND / 2 + THIRD / 3 + LAST / 4) / 4),
        ("seq-mean-token-sum-norm", (FIRST + SECOND + THIRD + LAST) / (4 * 12)),
    ],
)
def test_grpo_under_each_aggregation(model: Path, aggregation: str, expected: float) -> None:
    found = loss(grpo(model, f"algorithm.loss_aggregation={aggregation}"), group_of_four())
    assert found == pytest.approx(expected, rel=1e-5)


def test_dr_grpo_and_rloo(model: Path) -> None:
    """Advantages are 0.75 and -0.25, and with the others' mean as baseline 1 and -1/3; no ratio has moved."""
    rows = [row(1.0, [1.0]), row(0.0, [1.0] * 2), row(0.0, [1.0] * 3), row(0.0, [1.0] * 4)]
    plain = grpo(model, "algorithm.normalize_rewards=false", "algorithm.loss_aggregation=seq-mean-token-sum-norm")
    assert loss(plain, rows) == pytest.approx((-0.75 + 0.25 * 9) / 48)
    rloo = grpo(model, "algorithm.normalize_rewards=false", "algorithm.use_leave_one_out_baseline=true")
    assert loss(rloo, rows) == pytest.approx((-1 + 9 / 3) / 10)


@pytest.mark.parametrize(
    ("estimator", "divergence"), [("k2", 0.240227), ("k3", 0.193147)], ids=["log(2)^2 / 2", "1/2 - 1 + log 2"]
)
def test_kl_in_the_loss_is_weighted_as_the_policy_term(model: Path, estimator: str, divergence: float) -> None:
    """Rewards are equal, so KL is all there is: of two tokens in ten, twice as likely as under the reference."""
    kl = (f"algorithm.kl={{coef: 0.1, placement: loss, estimator: {estimator}}}",)
    rows = [row(1.0, [1.0] * 4, to_reference=[2, 1, 1, 1]), row(1.0, [1.0] * 6, to_reference=[1, 2, 1, 1, 1, 1])]
    assert loss(grpo(model, *kl), rows) == pytest.approx(0.1 * divergence * 2 / 10, rel=1e-5)
    by_row = grpo(model, *kl, "algorithm.loss_aggregation=seq-mean-token-mean")
    assert loss(by_row, rows) == pytest.approx(0.1 * divergence * (1 / 4 + 1 / 6) / 2, rel=1e-5)


def test_kl_in_the_reward_has_the_size_of_its_coefficient(model: Path) -> None:
    """KLs of log 2 and 0: advantages of -+0.05 log 2 on one token and three."""
    algorithm = grpo(model, "algorithm.kl={coef: 0.1, placement: reward, estimator: k1}")
    rows = [row(1.0, [1.0], to_reference=[2]), row(1.0, [1.0] * 3, to_reference=[1, 1, 1])]
    assert loss(algorithm, rows) == pytest.approx(0.05 * 0.693147 * (1 - 3) / 4, rel=1e-5)


@pytest.mark.parametrize(("divergence", "values"), [("js", (0.084950, 0.169899)), ("forward_kl", (0.193147, 0.306853))])
def test_dph_rl_adds_eta_times_a_mean_over_stored_tokens(
    model: Path, divergence: str, values: tuple[float, float]
) -> None:
    """Four stored tokens at u = 1/2 and one at u = 2; of four rollouts the one of a single token is right."""
    algorithm = dph_rl(model, f"algorithm.rehearsal.divergence={divergence}", "algorithm.rehearsal.coef=0.3")
    stored = [row(9.0, [0.5] * 4, kind=RowKind.REHEARSAL), row(9.0, [2.0], kind=RowKind.REHEARSAL)]
    for each in stored:
        each.ref_log_probs, each.old_log_probs = each.old_log_probs, None
    rollouts = [row(1.0, [1.0]), row(0.0, [1.0] * 2), row(0.0, [1.0] * 3), row(0.0, [1.0] * 4)]
    expected = (-1.5 + 0.5 * 9) / 10 + 0.3 * (4 * values[0] + values[1]) / 5
    assert loss(algorithm, [*rollouts, *stored]) == pytest.approx(expected, rel=1e-5)


def test_rlep_of_sixteen_failures_and_two_replays(model: Path, tmp_path: Path) -> None:
    """Advantages -0.34359 and 2.74874; failures have two tokens, replays three, and all 38 weigh the same."""
    algorithm = rlep(model, "algorithm.replay.source=pool", f"algorithm.replay.pool={tmp_path / 'pool'}")
    algorithm.stored.use_pool(make_pool(tmp_path / "pool", {1: 2}, length=3), PROMPTS)
    completions = [Completion(torch.tensor([1, 2]), torch.zeros(2), "stop", 0) for _ in range(16)]
    group = RolloutGroup(PROMPTS[0], [Rollout(completion, Score(0.0)) for completion in completions])
    rows = algorithm.samples([group], 0)
    assert loss(algorithm, rows) == pytest.approx(-(6 * 2.74874 - 32 * 0.34359) / 38, rel=1e-4)


def test_spo_chain_over_the_tokens_of_which_the_policy_was_not_sure(model: Path) -> None:
    """Values 1/2 before token 1 and 1/4 before token 4, reward 1; tokens 1, 3, 4 and 6 were below 0.9."""
    probabilities = torch.tensor([0.99, 0.5, 0.95, 0.4, 0.3, 0.99, 0.2])
    completion = Completion(torch.arange(7), probabilities.log(), "stop", 0)
    algorithm = chain(model, "algorithm.partition.size=2", RAW)
    borders = algorithm.rollouts.borders(completion.response_ids, completion.log_probs)
    assert borders == [1, 4]
    states = tuple(SegmentStart(border, value) for border, value in zip(borders, (0.5, 0.25)))
    rows = algorithm.samples([RolloutGroup(PROMPT, [Rollout(completion, Score(1.0), states)])], 0)
    assert loss(algorithm, rows) == pytest.approx(-(2 * (0.25 - 0.5) + 2 * (1 - 0.25)) / 4)


def test_spo_tree_over_the_edges_that_are_worth_something(model: Path) -> None:
    """Leaves 1, 0 under a first child and 0, 0 under a second one. Edges have 1 to 4 tokens, in the order of the tree."""
    leaves = [node(3, 1.0), node(4, 0.0), node(5, 0.0), node(6, 0.0)]
    root = TreeNode(None, [node(1, 0.5, *leaves[:2]), node(2, 0.0, *leaves[2:])], value=0.25)
    sizes = ("algorithm.branch_factors=[2,2]", "algorithm.num_edges_per_step=4", "policy.train_global_batch_size=4")
    algorithm = tree(model, *sizes, RAW)
    rows = algorithm.samples([RolloutGroup(PROMPT, [], root)], 0)
    assert sorted(each.num_response_tokens for each in rows) == [1, 2, 3, 4]
    assert loss(algorithm, rows) == pytest.approx(-(0.25 * 1 - 0.25 * 2 + 0.5 * 3 - 0.5 * 4) / 10)


def node(num_tokens: int, value: float, *children: TreeNode) -> TreeNode:
    completion = Completion(torch.arange(num_tokens), torch.full((num_tokens,), 0.5).log(), "stop", 0)
    return TreeNode(completion, list(children), value=value)

"""Parts of methods go together: a choice of tokens works with stored rows, whichever method brings them."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path

import pytest
import torch

from megatron_rl.algorithms import build_algorithm
from megatron_rl.algorithms.base import OnlineAlgorithm
from megatron_rl.algorithms.grpo import GRPO
from megatron_rl.algorithms.parts.base import TokenSelection
from megatron_rl.algorithms.parts.credit import GroupCredit, SegmentCredit, whiten
from megatron_rl.algorithms.parts.objective import ClippedObjective
from megatron_rl.algorithms.parts.replay import ReplayedRows
from megatron_rl.algorithms.parts.trees import TreeRollouts
from megatron_rl.algorithms.rlep import RLEP
from megatron_rl.config import Config, load_config
from megatron_rl.errors import UserError
from megatron_rl.losses.terms import TokenTerms
from megatron_rl.metrics.step import update_metrics
from megatron_rl.types import (
    Completion,
    MicroBatch,
    Problem,
    Prompt,
    Rollout,
    RolloutGroup,
    RowKind,
    Score,
    TrainingSample,
)
from tests.unit.algorithms.test_dph_rl import model, with_rows
from tests.unit.algorithms.test_spo import load

__all__ = ["model"]
TINY = Path(__file__).parents[2] / "tiny.yaml"
MASK = "algorithm.selection.max_probability=0.6"
LIKELY, UNLIKELY = 0.7, 0.5


def rlep(model: Path, *overrides: str) -> RLEP:
    settings = [
        f"policy.model_path={model}", "policy.train_global_batch_size=2", "algorithm.name=rlep",
        "algorithm.replay.source=online", "algorithm.num_prompts_per_step=1", "algorithm.num_generations_per_prompt=2",
        "algorithm.overlong.buffer=0", "algorithm.kl.coef=0",
    ]  # fmt: skip
    return RLEP(load_config(TINY, [*settings, *overrides]))


def group() -> RolloutGroup:
    """A failure, and a success; the first token of each was likely, the second was not."""
    log_probs = torch.tensor([LIKELY, UNLIKELY]).log()
    completions = [Completion(torch.tensor([1, number]), log_probs, "stop", 0) for number in (2, 3)]
    rollouts = [Rollout(c, Score(r, {"correct": r})) for c, r in zip(completions, (0.0, 1.0))]
    return RolloutGroup(Prompt(Problem("p", "?", "1"), torch.tensor([5, 7])), rollouts)


def test_a_mask_on_replays_asks_the_policy_of_today(model: Path) -> None:
    """The probabilities with which a replay was sampled are not known; those of rollouts are."""
    algorithm = rlep(model, MASK)
    assert "old_log_probs" in algorithm.needed_ahead and not rlep(model).needed_ahead
    algorithm.samples([group()], 0)
    rows = algorithm.samples([group()], 1)
    assert [row.kind for row in rows] == [RowKind.RL, RowKind.RL, RowKind.REPLAY]
    assert [row.loss_mask.tolist() for row in rows[:2]] == [[False, True]] * 2 and rows[2].loss_mask is None
    assert algorithm.passes_ahead(rows) == [[0, 1, 2]]
    for row in rows:  # by now the policy is sure of the second token, and not of the first
        row.old_log_probs = torch.tensor([UNLIKELY, LIKELY]).log()
    algorithm.assign_advantages(rows)
    assert [row.loss_mask.tolist() for row in rows] == [[False, True]] * 2 + [[True, False]]
    algorithm.assign_weights(rows)
    assert torch.cat([row.weights for row in rows]).tolist() == pytest.approx([0, 1 / 3, 0, 1 / 3, 1 / 3, 0])


def test_a_mask_on_rehearsal_leaves_stored_rows_whole(model: Path, tmp_path: Path) -> None:
    algorithm, rows = with_rows(model, tmp_path, MASK)
    for row in rows:
        if row.kind is RowKind.RL:  # their engine was sure of every token
            assert row.loss_mask is not None and not row.loss_mask.any()
            row.loss_mask[-1] = True
    algorithm.assign_advantages(rows)
    first = [rows[row] for row in algorithm.mini_batches(rows)[0]]
    algorithm.assign_weights(first)
    stored = [row for row in first if row.kind is RowKind.REHEARSAL]
    assert all(row.loss_mask is None for row in stored)
    assert float(sum(row.weights.sum() for row in first if row.kind is RowKind.RL)) == pytest.approx(1.0)
    assert float(sum(row.weights.sum() for row in stored)) == pytest.approx(0.5)  # eta


def test_an_update_without_rollouts_in_its_loss_is_logged_and_whitened(model: Path, tmp_path: Path) -> None:
    """A mask may leave nothing but stored rows in one update of a step."""
    assert update_metrics([{"loss": 1.0, "ratio/mean": 3.0}, {"loss": 2.0}]) == {"loss": 1.5, "ratio/mean": 3.0}
    _, rows = with_rows(model, tmp_path, MASK)
    masked = [row for row in rows if row.kind is RowKind.RL]
    for row in masked:
        row.advantages = torch.ones(row.num_response_tokens)
    whiten(masked, subtract_mean=True)
    assert all(bool(row.advantages.eq(1.0).all()) for row in masked)


def test_parts_keep_their_state_apart(model: Path) -> None:
    """Edges that wait and successes that were found both have ids and rewards."""
    algorithm = rlep(model)
    algorithm.samples([group()], 0)
    state = algorithm.state()
    assert state and all(name.startswith("stored/") for name in state)
    again = rlep(model)
    again.load_state(state | {"rollouts/rewards": torch.zeros(3)})
    assert again.state().keys() == state.keys()


class ByEntropy(TokenSelection):
    """Keeps the tokens of which the policy was least sure."""

    needs = frozenset({"entropy"})

    def mask_rows(self, samples: Sequence[TrainingSample]) -> None:
        for sample in samples:
            sample.loss_mask = sample.entropy > 0.5


class Counting(ClippedObjective):
    """Remembers how often it was asked."""

    count = 0

    def __call__(self, log_probs: torch.Tensor, entropy: torch.Tensor, batch: MicroBatch) -> TokenTerms:
        self.count += 1
        self.metrics = {"count": float(self.count)}
        return super().__call__(log_probs, entropy, batch)

    def state(self) -> dict[str, torch.Tensor]:
        return {"count": torch.tensor(self.count)}

    def load_state(self, state: Mapping[str, torch.Tensor]) -> None:
        self.count = int(state["count"])


def config_of(model: Path, *overrides: str) -> Config:
    settings = (f"policy.model_path={model}", "policy.train_global_batch_size=2", "algorithm.num_prompts_per_step=2")
    return load_config(TINY, [*settings, "algorithm.num_generations_per_prompt=2", *overrides])


def row_of(kind: RowKind = RowKind.RL, **fields: object) -> TrainingSample:
    return TrainingSample(torch.tensor([1]), torch.tensor([2, 3]), kind, **fields)


def test_one_part_asks_and_the_method_needs(model: Path) -> None:
    config = config_of(model, "algorithm.kl.coef=0.1")
    assert GRPO(config).needs == {"old_log_probs", "ref_log_probs"} and GRPO(config).needed_ahead == {"ref_log_probs"}
    algorithm = GRPO(config, selection=ByEntropy())
    assert algorithm.needs == {"old_log_probs", "ref_log_probs", "entropy"}
    rows = [row_of(group_index=number // 2, reward=float(number % 2)) for number in range(4)]
    assert GRPO(config).passes_ahead(rows) == [[2, 3]] and algorithm.passes_ahead(rows) == [[0, 1], [2, 3]]
    for row in rows:
        row.entropy = torch.tensor([0.4, 0.6])
    algorithm.assign_advantages(rows)
    assert [row.loss_mask.tolist() for row in rows] == [[False, True]] * 4


def test_what_nothing_fills_is_refused_when_the_method_is_built(model: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(GRPO, "needs", frozenset({"values", "entropy"}))
    with pytest.raises(UserError, match=r"needs values\. Fix: nothing fills that"):
        build_algorithm(config_of(model))


def test_every_part_has_metrics_and_a_state(model: Path) -> None:
    config = config_of(model)
    objective = Counting(config.algorithm)
    algorithm = GRPO(config, objective=objective)
    objective.count, objective.metrics = 3, {"count": 3.0}
    assert algorithm.step_metrics()["count"] == 3.0
    again = GRPO(config, objective=Counting(config.algorithm))
    again.load_state(algorithm.state())
    assert again.objective.count == 3


def test_an_update_never_splits_a_unit(model: Path) -> None:
    algorithm = GRPO(config_of(model))
    assert algorithm.mini_batches([row_of(unit=n // 2) for n in range(4)]) == [[0, 1], [2, 3]]
    with pytest.raises(UserError, match=r"policy\.train_global_batch_size = 2: would split rows that are one unit"):
        algorithm.mini_batches([row_of(), *(row_of(unit=0) for _ in range(2)), row_of()])


def test_parts_that_do_not_go_together_are_refused(model: Path) -> None:
    config = rlep(model).config
    stored, credit = ReplayedRows(config, config.algorithm.replay), SegmentCredit(load(model, "spo_tree").algorithm)
    with pytest.raises(
        UserError, match="puts ReplayedRows beside SegmentCredit, which has no use for rows from a pool"
    ):
        GRPO(config, credit=credit, stored=stored)
    tree = load(model, "spo_tree")
    with pytest.raises(UserError, match="puts ReplayedRows beside TreeRollouts"):
        OnlineAlgorithm(
            tree,
            rollouts=TreeRollouts(tree, ByEntropy()),
            selection=ByEntropy(),
            credit=GroupCredit(config.algorithm),
            stored=stored,
        )


def test_truncated_ratio_weighs_what_the_engine_sampled(model: Path) -> None:
    """Weights 1/6 for each of six tokens, times min(old / rollout, 1.5); a replay has no engine's log-probs."""
    algorithm = GRPO(config_of(model, "algorithm.correction.max_ratio=1.5"))
    assert "old_log_probs" in algorithm.needed_ahead and GRPO(config_of(model)).correction is None
    rows = [row_of(), row_of(), row_of(RowKind.REPLAY)]
    ratios = ([0.5, 1.5], [2.0, 1.0])
    for row, ratio in zip(rows, ratios):
        row.rollout_log_probs = torch.tensor([-1.0, -2.0])
        row.old_log_probs = row.rollout_log_probs + torch.tensor(ratio).log()
    rows[2].old_log_probs = torch.tensor([-1.0, -1.0])
    rows[0].loss_mask = torch.tensor([True, True])
    algorithm.assign_weights(rows)
    weights = torch.cat([row.weights for row in rows]) * 6
    torch.testing.assert_close(weights, torch.tensor([0.5, 1.5, 1.5, 1.0, 1.0, 1.0]))
    assert algorithm.step_metrics()["correction/weight_mean"] == pytest.approx(4.5 / 4)
    assert algorithm.step_metrics()["correction/truncated_frac"] == pytest.approx(1 / 4)
    algorithm.assign_weights(rows)  # the second epoch over the same rows
    torch.testing.assert_close(torch.cat([row.weights for row in rows]) * 6, weights)

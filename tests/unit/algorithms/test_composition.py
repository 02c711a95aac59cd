"""Parts of methods go together: a choice of tokens works with stored rows, whichever method brings them."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from megatron_rl.algorithms.base import pay_kl
from megatron_rl.algorithms.parts.credit import whiten
from megatron_rl.algorithms.rlep import RLEP
from megatron_rl.config import load_config
from megatron_rl.metrics.step import update_metrics
from megatron_rl.types import Completion, Problem, Prompt, Rollout, RolloutGroup, RowKind, Score, TrainingSample
from tests.unit.algorithms.test_dph_rl import model, with_rows

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
    assert algorithm.needs_old_log_probs and not rlep(model).needs_old_log_probs
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


def test_kl_in_the_reward_is_paid_whatever_gives_credit() -> None:
    rows = [
        TrainingSample(torch.tensor([1]), torch.tensor([2, 3]), kind, 1.0) for kind in (RowKind.RL, RowKind.REHEARSAL)
    ]
    for row in rows:
        row.old_log_probs, row.ref_log_probs = torch.tensor([-1.0, -2.0]), torch.tensor([-1.5, -3.0])
    pay_kl(rows, 0.1)
    assert [row.reward for row in rows] == pytest.approx([1 - 0.1 * 1.5, 1.0])

"""Parts of methods go together: a choice of tokens works with stored rows, whichever method brings them."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from megatron_rl.algorithms.rlep import RLEP
from megatron_rl.config import load_config
from megatron_rl.types import Completion, Problem, Prompt, Rollout, RolloutGroup, RowKind, Score
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

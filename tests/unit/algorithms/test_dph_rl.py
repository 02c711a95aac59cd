"""Rollouts and rehearsal rows in one update: who is averaged with whom, in which order rows come, what is refused."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from megatron_rl.algorithms.dph_rl import DPHRL
from megatron_rl.config import load_config
from megatron_rl.data.pack import pack
from megatron_rl.data.pool import Pool, PoolWriter, Provenance, Trajectory, merge
from megatron_rl.errors import UserError
from megatron_rl.losses.f_divergence import f_divergence
from megatron_rl.types import Completion, Problem, Prompt, Rollout, RolloutGroup, RowKind, Score, TrainingSample
from tests.tiny_models import make_tiny_model

TINY = Path(__file__).parents[2] / "tiny.yaml"


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_tiny_model(tmp_path_factory.mktemp("dph_rl"), "qwen3", tied=True, seed=1)


def make_pool(directory: Path, lengths: list[int], *, temperature: float = 1.0, ref: bool = True) -> Pool:
    provenance = Provenance("t", "m", "k", {"log_prob_temperature": temperature})
    with PoolWriter(directory, provenance) as writer:
        for number, length in enumerate(lengths):
            ids = torch.full((length,), number)
            log_probs = torch.linspace(-3, -1, length) if ref else None
            writer.add(Trajectory(f"p{number}", torch.tensor([1]), ids, 1.0, ref_log_probs=log_probs))
    return Pool(directory)


def dph_rl(model: Path, *overrides: str) -> DPHRL:
    settings = [
        f"policy.model_path={model}", "policy.train_global_batch_size=4", "algorithm.name=dph_rl",
        "algorithm.rehearsal.pool=p", "algorithm.rehearsal.num_rows_per_update=3", "algorithm.rehearsal.coef=0.5",
        "algorithm.num_prompts_per_step=4", "algorithm.num_generations_per_prompt=2", "algorithm.overlong.buffer=0",
        "algorithm.kl.coef=0",
    ]  # fmt: skip
    return DPHRL(load_config(TINY, [*settings, *overrides]))


def groups() -> list[RolloutGroup]:
    made = []
    for number in range(4):
        completions = [Completion(torch.tensor([1] * (number + 1)), torch.zeros(number + 1), "stop", 0) for _ in "ab"]
        rollouts = [Rollout(c, Score(r)) for c, r in zip(completions, (1.0, 0.0))]
        made.append(RolloutGroup(Prompt(Problem(str(number), "?", "1"), torch.tensor([number])), rollouts))
    return made


def with_rows(model: Path, tmp_path: Path, *overrides: str) -> tuple[DPHRL, list[TrainingSample]]:
    algorithm = dph_rl(model, *overrides)
    algorithm.stored.use_pool(make_pool(tmp_path / "pool", [2, 3, 4, 5, 6]), [])
    return algorithm, algorithm.samples(groups(), 0)


def test_every_update_has_its_share_of_stored_rows(model: Path, tmp_path: Path) -> None:
    algorithm, samples = with_rows(model, tmp_path)
    batches = algorithm.mini_batches(samples)
    assert [row for batch in batches for row in batch] == list(range(14))
    for batch in batches:
        assert [samples[row].kind for row in batch] == [RowKind.RL] * 4 + [RowKind.REHEARSAL] * 3
    assert algorithm.step_metrics()["rehearsal/rows_frac"] == pytest.approx(6 / 14)


def test_every_row_comes_once_before_any_comes_again_and_the_order_follows_from_the_update(
    model: Path, tmp_path: Path
) -> None:
    algorithm, _ = with_rows(model, tmp_path)
    assert algorithm.stored.rehearsal is not None

    def rows(update: int) -> list[int]:
        return [int(sample.response_ids[0]) for sample in algorithm.stored.rehearsal.rows(update=update)]  # type: ignore[union-attr]

    seen = [row for update in range(5) for row in rows(update)]
    assert sorted(seen[:5]) == sorted(seen[5:10]) == sorted(seen[10:]) == [0, 1, 2, 3, 4]
    assert rows(3) == seen[9:12] and seen[:5] != seen[5:10]
    other = dph_rl(model, "trainer.seed=8")
    other.stored.use_pool(Pool(tmp_path / "pool"), [])
    assert [int(s.response_ids[0]) for u in range(5) for s in other.stored.rehearsal.rows(update=u)] != seen  # type: ignore[union-attr]


def test_stored_rows_enter_no_group_mean_and_get_no_advantage(model: Path, tmp_path: Path) -> None:
    """The released code gave them rewards and groups of one."""
    algorithm, samples = with_rows(model, tmp_path, "algorithm.normalize_rewards=false")
    for row in samples:
        if row.kind is RowKind.REHEARSAL:
            row.reward, row.group_index = 100.0, 0
    algorithm.assign_advantages(samples)
    for row in samples:
        if row.kind is RowKind.REHEARSAL:
            assert row.advantages is None
        else:
            assert row.advantages is not None and row.advantages.tolist() == [0.5 if row.reward else -0.5] * len(
                row.advantages
            )


def test_the_two_means_are_separate(model: Path, tmp_path: Path) -> None:
    algorithm, samples = with_rows(model, tmp_path)
    for rows in algorithm.mini_batches(samples):
        batch = [samples[row] for row in rows]
        algorithm.assign_weights(batch)
        for kind, total in ((RowKind.RL, 1.0), (RowKind.REHEARSAL, 0.5)):
            weights = torch.cat([row.weights for row in batch if row.kind is kind])  # type: ignore[misc]
            assert weights.sum().item() == pytest.approx(total) and len(set(weights.tolist())) == 1


@pytest.mark.parametrize("divergence", ["forward_kl", "js", "alpha", "reverse_kl", "likelihood"])
def test_each_row_of_a_pack_gets_the_loss_of_its_kind(model: Path, tmp_path: Path, divergence: str) -> None:
    algorithm, samples = with_rows(
        model, tmp_path, f"algorithm.rehearsal.divergence={divergence}", "algorithm.rehearsal.alpha=0.3"
    )
    algorithm.assign_advantages(samples)
    rows = algorithm.mini_batches(samples)[1]
    mini_batch = [samples[row] for row in rows]
    algorithm.assign_weights(mini_batch)
    for row in mini_batch:
        if row.kind is RowKind.RL:
            row.old_log_probs = torch.full((row.num_response_tokens,), -2.0)
    batch = pack(mini_batch, [5, 0, 6, 1])
    log_probs = torch.where(batch.loss_mask, torch.linspace(-2, -1, len(batch.labels)), 0.0).requires_grad_()
    terms = algorithm.loss(log_probs, torch.zeros_like(log_probs), batch)
    is_stored = batch.kind == RowKind.REHEARSAL
    stored = f_divergence(log_probs, batch.vectors["ref_log_probs"], divergence, alpha=0.3)  # type: ignore[arg-type]
    ratio = (log_probs - batch.vectors["old_log_probs"]).exp()
    advantages = batch.vectors["advantages"]
    rollouts = torch.maximum(-advantages * ratio, -advantages * ratio.clamp(0.8, 1.28))
    capped = torch.minimum(rollouts, torch.where(advantages < 0, -3 * advantages, torch.inf))
    expected, mask = torch.where(is_stored, stored, capped), batch.loss_mask
    torch.testing.assert_close(terms.loss[mask], expected[mask])
    gradient = torch.autograd.grad(terms.loss[mask].sum(), log_probs)[0]
    assert gradient.isfinite().all() and (gradient[mask & is_stored] != 0).all()


def test_definition_form_keeps_the_reference_and_acts_on_rollouts(model: Path) -> None:
    assert dph_rl(model, "algorithm.rehearsal.divergence=js_definition").needed_ahead == {"ref_log_probs"}
    assert not dph_rl(model, "algorithm.rehearsal.divergence=js").needed_ahead


def test_rows_that_are_too_long_are_left_out_and_counted(model: Path, tmp_path: Path) -> None:
    algorithm = dph_rl(model, "policy.train_micro_batch_tokens=40")
    line = algorithm.stored.use_pool(make_pool(tmp_path / "pool", [2, 60, 3]), [])
    assert "2 rows" in line and "1 left out as too long" in line
    with pytest.raises(UserError, match="has no row of at most 40 tokens"):
        algorithm.stored.use_pool(make_pool(tmp_path / "long", [60]), [])


def test_other_pools_are_refused(model: Path, tmp_path: Path) -> None:
    algorithm = dph_rl(model)
    with pytest.raises(UserError, match=r"log-probs at temperature 0\.5"):
        algorithm.stored.use_pool(make_pool(tmp_path / "cold", [2], temperature=0.5), [])
    with pytest.raises(UserError, match="3 of 3 rows have no log-probs of the reference"):
        algorithm.stored.use_pool(make_pool(tmp_path / "bare", [2, 3, 4], ref=False), [])


def test_every_shard_of_a_merged_pool_must_fit(model: Path, tmp_path: Path) -> None:
    make_pool(tmp_path / "warm", [2, 3])
    make_pool(tmp_path / "cold", [4, 5], temperature=0.5)
    merge([tmp_path / "warm", tmp_path / "cold"], tmp_path / "both")
    with pytest.raises(UserError, match=r"log-probs at temperature 0\.5"):
        dph_rl(model).stored.use_pool(Pool(tmp_path / "both"), [])

"""KL in the reward: what it costs a rollout, and that its policy gradient is the reverse KL's whatever the rewards are."""

from __future__ import annotations

import itertools
from pathlib import Path

import pytest
import torch

from megatron_rl.algorithms.grpo import GRPO
from megatron_rl.config import load_config
from megatron_rl.types import RowKind, TrainingSample

TINY = Path(__file__).parents[2] / "tiny.yaml"
LOGITS = torch.tensor([0.3, -0.7, 1.1], dtype=torch.float64)
REFERENCE = torch.tensor([0.9, 0.2, -0.4], dtype=torch.float64).log_softmax(0)
LEAVE_ONE_OUT = "algorithm.use_leave_one_out_baseline=true"


def grpo(*overrides: str, coef: float = 0.02) -> GRPO:
    settings = ["policy.model_path=m", "policy.train_global_batch_size=4", "algorithm.overlong.buffer=0"]
    settings += ["algorithm.num_prompts_per_step=2", "algorithm.num_generations_per_prompt=2"]
    settings += [f"algorithm.kl={{coef: {coef}, placement: reward, estimator: k1}}"]
    return GRPO(load_config(TINY, [*settings, *overrides]))


def row(
    reward: float, policy: list[float], reference: list[float], *, group: int = 0, kind: RowKind = RowKind.RL
) -> TrainingSample:
    made = TrainingSample(torch.tensor([1]), torch.arange(len(policy)), kind, reward, group_index=group)
    made.old_log_probs, made.ref_log_probs = torch.tensor(policy), torch.tensor(reference)
    return made


def advantages(algorithm: GRPO, rows: list[TrainingSample]) -> list[float]:
    """Return the advantage of each row; all its tokens have the same."""
    algorithm.assign_advantages(rows)
    values = [set(row.advantages.tolist()) for row in rows if row.advantages is not None]
    assert all(len(value) == 1 for value in values)
    return [value.pop() for value in values]


def test_a_response_pays_its_summed_kl_less_the_groups_mean_after_the_normalisation() -> None:
    """Rewards 1 and 0 are +-0.70711 apart from a mean of 1/2 in units of their std; KLs are 1.5 and -0.5, their mean 0.5."""
    rows = [row(1.0, [-1.0, -2.0], [-1.5, -3.0]), row(0.0, [-1.0], [-0.5])]
    found = advantages(grpo(coef=0.1), rows)
    assert found == pytest.approx([0.70711 - 0.1 * 1.0, -0.70711 + 0.1 * 1.0], abs=1e-5)
    assert [row.reward for row in rows] == [1.0, 0.0]  # what the task gave stays what it was
    assert advantages(grpo(LEAVE_ONE_OUT, "algorithm.normalize_rewards=false", coef=0.1), rows) == pytest.approx(
        [1.0 - 0.1 * 2.0, -1.0 + 0.1 * 2.0]
    )


@pytest.mark.parametrize("coef", [0.001, 0.02, 0.1])
@pytest.mark.parametrize("reward", [0.0, 1.0])
def test_where_rewards_are_equal_the_coefficient_still_has_its_size(coef: float, reward: float) -> None:
    generator = torch.Generator().manual_seed(0)
    noise = (0.05 * torch.randn(8, 10, generator=generator)).tolist()
    rows = [row(reward, drawn, [0.0] * 10) for drawn in noise]
    kls = [sum(drawn) for drawn in noise]
    found = advantages(grpo(coef=coef), rows)
    assert found == pytest.approx([-coef * (kl - sum(kls) / 8) for kl in kls], abs=1e-7)
    assert max(map(abs, found)) < coef


def test_who_is_not_judged_pays_nothing_and_counts_for_nobody() -> None:
    rows = [row(0.0, [-1.0], [-2.0]), row(0.0, [-1.0], [-9.0]), row(0.0, [-1.0], [-4.0])]
    rows[1].has_reward = False
    stored = row(0.0, [-1.0], [-9.0], kind=RowKind.REHEARSAL)
    assert advantages(grpo(coef=0.1), [*rows, stored]) == pytest.approx([0.1, 0.0, -0.1])
    assert stored.advantages is None


def test_rows_of_two_groups_may_be_mixed() -> None:
    rows = [row(float(i == 0), [-1.0], [-1.0 - i], group=i % 2) for i in range(4)]  # KLs 0, 2 and 1, 3
    found = advantages(grpo("algorithm.normalize_rewards=false", coef=0.1), rows)
    assert found == pytest.approx([0.5 + 0.1, 0.1, -0.5 - 0.1, -0.1])


@pytest.mark.parametrize("normalize", ["true", "false"])
@pytest.mark.parametrize("leave_one_out", [True, False])
def test_the_expected_policy_gradient_is_that_of_the_reverse_kl(normalize: str, leave_one_out: bool) -> None:
    """The expectation is over all pairs of one-token responses; both rollouts of a pair are equally right."""
    settings = [f"algorithm.normalize_rewards={normalize}", *([LEAVE_ONE_OUT] if leave_one_out else [])]
    algorithm, logits = grpo(*settings, coef=0.3), LOGITS.clone().requires_grad_()
    log_probs = logits.log_softmax(0)
    known = log_probs.detach()
    total = torch.zeros((), dtype=torch.float64)
    for pair in itertools.product(range(3), repeat=2):
        rows = [row(1.0, [known[token].item()], [REFERENCE[token].item()]) for token in pair]
        chance = known[list(pair)].sum().exp()
        for token, advantage in zip(pair, advantages(algorithm, rows)):
            total = total + chance * advantage * log_probs[token] / 2
    found = torch.autograd.grad(-total, logits)[0]
    log_probs = logits.log_softmax(0)
    true = torch.autograd.grad(0.3 * (log_probs.exp() * (log_probs - REFERENCE)).sum(), logits)[0]
    torch.testing.assert_close(found, true * (1.0 if leave_one_out else 0.5), atol=1e-6, rtol=0)

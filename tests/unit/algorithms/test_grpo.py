"""What GRPO says about a step beside its rows and its loss."""

from __future__ import annotations

from pathlib import Path
from typing import cast

import pytest
import torch

from megatron_rl.algorithms.grpo import GRPO
from megatron_rl.algorithms.parts.groups import _has_contrast
from megatron_rl.config import load_config
from megatron_rl.data.stream import Stream
from megatron_rl.metrics.step import MAXIMA
from megatron_rl.rollout.collect import Collector
from megatron_rl.types import Completion, MicroBatch, Problem, Prompt, Rollout, RolloutGroup, Score

TINY = Path(__file__).parents[2] / "tiny.yaml"


FAILED = Score(0.0, reason="timeout", is_failure=True)


class ScriptedCollector:
    """Groups whose rewards a test gives, one list of groups a round; None where the scorer failed."""

    def __init__(self, *rounds: list[list[float | None]]) -> None:
        self.rounds = list(rounds)

    def collect_first(self, num_groups, prompts, **_how):
        groups = []
        for prompt, rewards in zip(prompts, self.rounds.pop(0), strict=True):
            completion = Completion(torch.tensor([1, 2, 3]), torch.zeros(3), "stop", 0)
            scores = [FAILED if r is None else Score(r, {"correct": r}) for r in rewards]
            groups.append(RolloutGroup(prompt, [Rollout(completion, score) for score in scores]))
        return groups


def grpo(*overrides: str) -> GRPO:
    small = ["algorithm.num_prompts_per_step=2", "algorithm.num_generations_per_prompt=2"]
    return GRPO(load_config(TINY, ["policy.model_path=m", "policy.train_global_batch_size=4", *small, *overrides]))


def collect(algorithm: GRPO, *rounds: list[list[float | None]]) -> list[RolloutGroup]:
    prompts = Stream([Prompt(Problem(str(n), "?", "1"), torch.tensor([n])) for n in range(8)], 1, False)
    return algorithm.collect(prompts, cast(Collector, ScriptedCollector(*rounds)), 0)


def test_dynamic_sampling_counts_what_it_throws_away_and_reports_the_policys_own_accuracy() -> None:
    algorithm = grpo("algorithm.use_dynamic_sampling=true", "algorithm.overlong.buffer=0")
    kept = collect(algorithm, [[1, 1], [1, 0]], [[1, 0], [0, 1]])
    assert [[rollout.score.reward for rollout in group.rollouts] for group in kept] == [[1, 0], [1, 0]]
    algorithm.samples(kept, 0)
    assert algorithm.step_metrics() == {
        "dropped/equal_rewards": 1.0,
        "dropped/surplus_groups": 1.0,
        "rollout/generation_rounds": 2.0,
        "reward/mean": 5 / 8,
        "reward/correct": 5 / 8,
        "pass@1": 5 / 8,
        "pass@2": 1.0,
        "groups/all_right_frac": 1 / 4,
        "groups/all_wrong_frac": 0.0,
    }


def test_without_dynamic_sampling_there_is_nothing_to_add() -> None:
    algorithm = grpo("algorithm.overlong.buffer=0")
    algorithm.samples(collect(algorithm, [[1, 1], [1, 0]]), 0)
    assert algorithm.step_metrics() == {}


def test_the_shaped_reward_is_reported_where_shaping_is_on() -> None:
    algorithm = grpo("rollout.max_new_tokens=4", "algorithm.overlong.buffer=2")  # 3 tokens lose half of 0.5
    algorithm.samples(collect(algorithm, [[1, 1], [1, 0]]), 0)
    assert algorithm.step_metrics() == {"reward/shaped_mean": pytest.approx(0.5)}


@pytest.mark.parametrize(("setting", "is_reported"), [("null", False), ("3", True)])
def test_the_loss_reports_means_and_known_maxima(setting: str, is_reported: bool) -> None:
    algorithm = grpo(f"algorithm.ratio_clip_c={setting}", "algorithm.kl.coef=0")
    vectors = {"old_log_probs": torch.zeros(2), "advantages": -torch.ones(2)}
    batch = MicroBatch(
        *[torch.zeros(2)] * 4,
        2,
        *[torch.ones(2, dtype=torch.bool)] * 2,
        [0],
        torch.arange(2),
        *[torch.zeros(2)] * 2,
        torch.zeros(2, dtype=torch.int64),
        vectors,
    )
    terms = algorithm.loss(torch.tensor([5.0, 0.5]).log(), torch.zeros(2), batch)
    assert set(terms.maxima) == MAXIMA
    assert ("dual_clip_frac" in terms.means) == is_reported
    assert terms.means["clip_frac"].tolist() == [0.0, 1.0]


def test_a_rollout_whose_scorer_failed_gets_no_advantage_and_moves_no_baseline() -> None:
    algorithm = grpo("algorithm.overlong.buffer=0", "algorithm.kl.coef=0", "algorithm.normalize_rewards=false")
    group = collect(algorithm, [[1, None, 0], [1, 0, 0]])[0]
    samples = algorithm.samples([group], 0)
    algorithm.assign_advantages(samples)
    assert [sample.advantages.tolist() for sample in samples] == [[0.5] * 3, [0.0] * 3, [-0.5] * 3]


def test_under_dynamic_sampling_failed_scores_count_for_nothing_but_themselves() -> None:
    """Two of the four pairs have one score that failed, and so nothing to compare."""
    algorithm = grpo("algorithm.use_dynamic_sampling=true", "algorithm.overlong.buffer=2", "rollout.max_new_tokens=4")
    kept = collect(algorithm, [[0, None], [1, 0]], [[1, 0], [1, None]])
    assert len(kept) == 2
    algorithm.samples(kept, 0)
    metrics = algorithm.step_metrics()
    assert metrics["pass@1"] == metrics["reward/mean"] == (0 + 1 / 2 + 1 / 2 + 1) / 4
    assert (metrics["pass@2"], metrics["dropped/pass@2"], metrics["dropped/score_timeout"]) == (1.0, 2.0, 2.0)
    assert metrics["dropped/equal_rewards"] == 2.0
    kept[0].rollouts[0] = Rollout(kept[0].rollouts[0].completion, FAILED)
    algorithm.samples(kept, 0)
    assert algorithm.step_metrics()["reward/shaped_mean"] == pytest.approx(1 / 3 - 0.25)


def test_dynamic_sampling_sees_no_contrast_in_a_failed_score() -> None:
    algorithm = grpo("algorithm.use_dynamic_sampling=true")
    kept = collect(algorithm, [[1, 0], [1, 0]])
    assert _has_contrast(kept[0])
    kept[0].rollouts[1] = Rollout(kept[0].rollouts[1].completion, FAILED)
    assert not _has_contrast(kept[0])

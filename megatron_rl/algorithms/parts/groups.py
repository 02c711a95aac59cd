"""GroupRollouts: G independent rollouts of each prompt, and dynamic sampling."""

from __future__ import annotations

import math
from collections.abc import Sequence

from megatron_rl.algorithms.parts.base import Rollouts, TokenSelection
from megatron_rl.algorithms.parts.rows import RowMaker
from megatron_rl.config import Config, GroupConfig
from megatron_rl.data.stream import Stream
from megatron_rl.errors import UserError
from megatron_rl.metrics.step import accuracy_metrics
from megatron_rl.rollout.collect import Collector
from megatron_rl.types import Prompt, RolloutGroup, TrainingSample


class GroupRollouts(Rollouts):
    """G rollouts per prompt; a row each."""

    def __init__(self, config: Config, selection: TokenSelection) -> None:
        super().__init__()
        assert isinstance(config.algorithm, GroupConfig)
        self.config, self.settings, self.make = config, config.algorithm, RowMaker(config)
        self.selection = selection

    def collect(self, prompts: Stream[Prompt], collector: Collector, step: int) -> list[RolloutGroup]:
        """Collect ``num_prompts_per_step`` groups; under dynamic sampling only such that can teach something.

        Raises:
            UserError: after ``max_generation_batches`` rounds there are too few of those.
        """
        settings = self.settings
        groups: list[RolloutGroup] = []
        seen: list[RolloutGroup] = []
        self.metrics = {}
        for generation_round in range(settings.max_generation_batches if settings.use_dynamic_sampling else 1):
            started = collector.collect_first(
                settings.num_prompts_per_step,
                prompts.take(math.ceil(settings.num_prompts_per_step * self.config.rollout.over_sampling)),
                num_generations=settings.num_generations_per_prompt,
                sampling=self.make.sampling(),
                purpose=f"train/{step}/{generation_round}",
            )
            used = [i for i, group in enumerate(started) if group is not None][: settings.num_prompts_per_step]
            prompts.put_back([i for i in range(len(started)) if i not in used])
            fresh = [group for i in used if (group := started[i]) is not None]
            seen += fresh
            groups += [group for group in fresh if not settings.use_dynamic_sampling or _has_contrast(group)]
            if len(groups) >= settings.num_prompts_per_step:
                if settings.use_dynamic_sampling:
                    # The groups that are trained on were chosen for being neither solved nor failed throughout, which says
                    # little about the policy: the figures of all that it was asked take the place of theirs.
                    self.metrics = accuracy_metrics(seen) | {
                        "dropped/equal_rewards": float(len(seen) - len(groups)),
                        "dropped/surplus_groups": float(len(groups) - settings.num_prompts_per_step),
                        "rollout/generation_rounds": float(generation_round + 1),
                    }
                return groups[: settings.num_prompts_per_step]
        raise UserError(
            "algorithm.max_generation_batches",
            settings.max_generation_batches,
            f"gave only {len(groups)} of {settings.num_prompts_per_step} groups with unequal rewards in step {step + 1}",
            "raise it, or train on problems that are neither always nor never solved",
        )

    def rows(self, groups: Sequence[RolloutGroup], step: int) -> list[TrainingSample]:
        """Make one row of each rollout; the reward is shaped here."""
        samples = [
            self.make.of_rollout(
                rollout,
                group.prompt.prompt_ids,
                index,
                reward=self.make.shaped(rollout.score.reward, len(rollout.completion.response_ids)),
                loss_mask=self.selection.mask_of(rollout.completion.log_probs),
            )
            for index, group in enumerate(groups)
            for rollout in group.rollouts
        ]
        judged = [sample.reward for sample in samples if sample.has_reward]
        if self.settings.overlong.buffer > 0 and judged:
            self.metrics |= {"reward/shaped_mean": sum(judged) / len(judged)}
        return samples


def _has_contrast(group: RolloutGroup) -> bool:
    """Tell whether rewards differ: equal ones teach nothing, every advantage is zero."""
    return len({rollout.score.reward for rollout in group.rollouts if not rollout.score.is_failure}) > 1

"""Group Relative Policy Optimization (arXiv 2402.03300), and the variants that are settings of it.

    DAPO      (2503.14476)  ratio_clip_max 0.28, token-mean, use_dynamic_sampling, overlong, no KL
    Dr. GRPO  (2503.20783)  normalize_rewards false, seq-mean-token-sum-norm
    RLOO      (2402.14740)  use_leave_one_out_baseline, normalize_rewards false

Deviations from the paper: standard deviations are unbiased and get +1e-6; KL is off unless asked for; the KL term of the
loss gets the same token weights as the policy term.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from itertools import groupby

import torch

from megatron_rl.advantages.group import group_advantages
from megatron_rl.algorithms.clipped import ClippedAlgorithm
from megatron_rl.config import Config, GroupConfig, MaskConfig
from megatron_rl.data.stream import Stream
from megatron_rl.errors import UserError
from megatron_rl.losses.kl import kl_estimate
from megatron_rl.rewards.correct import is_correct
from megatron_rl.rollout.collect import Collector
from megatron_rl.types import POLICY_GRADIENT_KINDS, Prompt, RolloutGroup, RowKind, TrainingSample


class GRPO(ClippedAlgorithm):
    """G rollouts per prompt, each judged against the others of its group."""

    def __init__(self, config: Config) -> None:
        super().__init__(config)
        assert isinstance(config.algorithm, GroupConfig)
        self.settings = config.algorithm
        masks = isinstance(self.settings, MaskConfig) and self.settings.mask_threshold is not None
        self.needs_old_log_probs = (self.needs_reference and self.settings.kl.placement == "reward") or (
            masks and self.asks_policy
        )

    # ---- rollouts

    def collect(self, prompts: Stream[Prompt], collector: Collector, step: int) -> list[RolloutGroup]:
        """``num_prompts_per_step`` groups; under dynamic sampling only such that can teach something."""
        settings = self.settings
        groups: list[RolloutGroup] = []
        seen: list[RolloutGroup] = []
        self._metrics = {}
        for generation_round in range(settings.max_generation_batches if settings.use_dynamic_sampling else 1):
            started = collector.collect_first(
                settings.num_prompts_per_step,
                prompts.take(math.ceil(settings.num_prompts_per_step * self.config.rollout.over_sampling)),
                num_generations=settings.num_generations_per_prompt,
                sampling=self.sampling(),
                purpose=f"train/{step}/{generation_round}",
            )
            used = [i for i, group in enumerate(started) if group is not None][: settings.num_prompts_per_step]
            prompts.put_back([i for i in range(len(started)) if i not in used])
            fresh = [group for i in used if (group := started[i]) is not None]
            seen += fresh
            groups += [group for group in fresh if not settings.use_dynamic_sampling or _has_contrast(group)]
            if len(groups) >= settings.num_prompts_per_step:
                if settings.use_dynamic_sampling:
                    self._metrics = _sampling_metrics(
                        seen,
                        num_rounds=generation_round + 1,
                        num_useful=len(groups),
                        num_needed=settings.num_prompts_per_step,
                    )
                return groups[: settings.num_prompts_per_step]
        raise UserError(
            "algorithm.max_generation_batches",
            settings.max_generation_batches,
            f"gave only {len(groups)} of {settings.num_prompts_per_step} groups with unequal rewards in step {step + 1}",
            "raise it, or train on problems that are neither always nor never solved",
        )

    def samples(self, groups: Sequence[RolloutGroup], step: int) -> list[TrainingSample]:
        """One row per rollout; the reward is shaped here."""
        samples = [
            TrainingSample(
                prompt_ids=group.prompt.prompt_ids,
                response_ids=rollout.completion.response_ids,
                kind=RowKind.RL,
                reward=self.shaped(rollout.score.reward, len(rollout.completion.response_ids)),
                has_reward=not rollout.score.is_failure,
                group_index=index,
                finish_reason=rollout.completion.finish_reason,
                weight_version=rollout.completion.weight_version,
                rollout_log_probs=rollout.completion.log_probs,
                experts=self.replayed_experts(rollout.completion),
                loss_mask=self.mask_of(rollout.completion.log_probs),
            )
            for index, group in enumerate(groups)
            for rollout in group.rollouts
        ]
        if self.settings.overlong.buffer > 0:
            self._metrics |= {"reward/shaped_mean": _mean([sample.reward for sample in samples])}
        return samples

    # ---- credit

    def assign_advantages(self, samples: Sequence[TrainingSample]) -> None:
        """One advantage per rollout, the same for all its tokens; 0 where the scorer failed. Other rows are in no group."""
        self.mask_by_policy(samples)
        grouped = [sample for sample in samples if sample.kind in POLICY_GRADIENT_KINDS]
        for _, rows in groupby(grouped, key=lambda sample: sample.group_index):
            group = list(rows)
            judged = [sample for sample in group if sample.has_reward]
            for sample in group:
                sample.advantages = torch.zeros(sample.num_response_tokens)
            if len(judged) < 2:  # nobody to compare with
                continue
            advantages = group_advantages(
                torch.tensor([self._reward(sample) for sample in judged]),
                normalize=self.settings.normalize_rewards,
                leave_one_out=self.settings.use_leave_one_out_baseline,
            )
            for sample, advantage in zip(judged, advantages):
                sample.advantages = advantage.expand(sample.num_response_tokens).clone()

    def _reward(self, sample: TrainingSample) -> float:
        """The rollout's reward, less the KL of its whole response where KL is part of the reward."""
        kl = self.settings.kl
        if kl.coef == 0 or kl.placement == "loss":
            return sample.reward
        assert sample.old_log_probs is not None and sample.ref_log_probs is not None
        return sample.reward - kl.coef * float(kl_estimate(sample.old_log_probs, sample.ref_log_probs, "k1").sum())


def _sampling_metrics(
    seen: Sequence[RolloutGroup], *, num_rounds: int, num_useful: int, num_needed: int
) -> dict[str, float]:
    """What dynamic sampling did, and how good the policy is on all that it was asked.

    The groups that are trained on were chosen for being neither solved nor failed throughout: their mean says little about
    the policy, so these means replace those of ``rollout_metrics``, over all ``seen`` groups of the step.
    """
    scores = [[rollout.score for rollout in group.rollouts] for group in seen]
    rows = [score for group in scores for score in group]
    size = len(scores[0])
    metrics = {
        "dropped/equal_rewards": float(len(seen) - num_useful),
        "dropped/surplus_groups": float(num_useful - num_needed),
        "rollout/generation_rounds": float(num_rounds),
        "reward/mean": _mean([score.reward for score in rows]),
        "pass@1": _mean([is_correct(score) for score in rows]),
        f"pass@{size}": _mean([any(map(is_correct, group)) for group in scores]),
    }
    for part in sorted({name for score in rows for name in score.parts}):
        metrics[f"reward/{part}"] = _mean([score.parts.get(part, 0.0) for score in rows])
    return metrics


def _mean(values: Sequence[float]) -> float:
    return float(sum(values) / len(values))


def _has_contrast(group: RolloutGroup) -> bool:
    """Equal rewards teach nothing: every advantage is zero."""
    return len({rollout.score.reward for rollout in group.rollouts if not rollout.score.is_failure}) > 1

"""Sections that methods share: KL, penalty for length, choice of tokens, the clipped ratio, groups of rollouts.

Defaults are the vetted setting of the method's paper. A coefficient says what it is multiplied by.
"""

from __future__ import annotations

from dataclasses import replace
from typing import Literal, Self

from pydantic import Field, NonNegativeFloat, NonNegativeInt, PositiveFloat, PositiveInt

from megatron_rl.config.methods.base import MethodConfig, OtherSections
from megatron_rl.config.rollout import RolloutConfig
from megatron_rl.config.section import section
from megatron_rl.errors import UserError


@section
class KLConfig:
    """KL to the frozen reference, the policy that the run started from. Off at ``coef: 0`` (no reference is kept then)."""

    coef: NonNegativeFloat = 0.0
    """In the loss it multiplies the estimate of each token, in nats, which has the same weights as the policy term. In the
    reward it multiplies the KL of a whole response, and one unit of the product is one unit of advantage: under
    ``normalize_rewards`` one standard deviation of the group's rewards."""
    placement: Literal["loss", "reward"] = "loss"
    """``reward`` subtracts coef * (KL_i - the group's mean KL) from the advantage of rollout i, KL_i being k1 summed over its
    response. Its policy gradient is that of KL(policy || reference) of whole responses. It is subtracted after the reward is
    normalised. verl subtracts before (use_kl_in_reward), and so divides its coefficient by the standard deviation of a group:
    among equal rewards that leaves an advantage of size 1, whatever the coefficient is."""
    estimator: Literal["k1", "k2", "k3"] = "k3"
    """Estimator. Added to the loss, k1 has zero expected gradient, k2 per token that of the reverse KL, k3 that of the
    *forward* KL, up to its clamp at 10 (``losses/kl.py``). In the reward only k1 is right."""

    def __post_init__(self) -> None:
        if self.coef > 0 and self.placement == "reward" and self.estimator != "k1":
            raise UserError(
                "algorithm.kl.estimator",
                self.estimator,
                "KL in the reward is defined for k1 only",
                "set algorithm.kl.estimator=k1, or algorithm.kl.placement=loss",
            )
        if self.coef > 0 and self.placement == "loss" and self.estimator == "k1":
            raise UserError(
                "algorithm.kl.estimator",
                self.estimator,
                "k1 added to the loss has no gradient in expectation",
                "use k2 (reverse KL), k3 (forward KL), or algorithm.kl.placement=reward",
            )


@section
class OverlongConfig:
    """Soft penalty for long responses (DAPO, arXiv 2503.14476, eq. 13): linear from 0 to ``-penalty`` over the last
    ``buffer`` tokens before ``rollout.max_new_tokens``. Off at ``buffer: 0``."""

    buffer: NonNegativeInt = 0
    penalty: NonNegativeFloat = 0.5
    """The reward that a response at the limit loses: half of the difference between a right and a wrong one. DAPO and RLEP
    subtract 1 from rewards of 1 and -1; our tasks give 1 and 0, for which 0.5 makes the same normalised advantages."""


@section
class SelectionConfig:
    """Choice of the tokens that enter the loss; with null everywhere, all do."""

    max_probability: float | None = Field(default=None, gt=0, le=1)
    """Keep tokens that were sampled with a probability below this (SPO's mask, 0.9 there)."""
    probabilities: Literal["auto", "rollout", "policy"] = "auto"
    """Source of the probabilities, for SPO's cut points as well. ``rollout``: the engine's, at the sampling temperature.
    ``policy``: a forward pass of the trainer. ``auto``: ``policy`` where top_p or top_k cut the distribution."""

    def probabilities_from(self, rollout: RolloutConfig) -> Literal["rollout", "policy"]:
        """Resolve ``auto``."""
        if self.probabilities != "auto":
            return self.probabilities
        return "policy" if rollout.top_p < 1 or rollout.top_k > 0 else "rollout"


@section
class CorrectionConfig:
    """Correction of the gap between the trainer's log-probs and the engine's: truncated importance sampling (TIS)."""

    max_ratio: PositiveFloat | None = None
    """Multiply each token's weight by min(trainer's probability / engine's, max_ratio). It multiplies the loss term after the
    aggregation, which is not normalised again. 2 is common; null is off."""


@section
class ClippedConfig(MethodConfig):
    """Settings of every method with a clipped ratio."""

    num_prompts_per_step: PositiveInt = 64
    num_epochs: PositiveInt = 1
    """Passes over each rollout batch. Updates per step = epochs * rows / policy.train_global_batch_size."""
    ratio_clip_min: PositiveFloat = 0.2
    """Ratios below 1 - ratio_clip_min are clipped."""
    ratio_clip_max: PositiveFloat = 0.2
    """Ratios above 1 + ratio_clip_max are clipped; 0.28 is DAPO's clip-higher."""
    ratio_clip_c: float | None = None
    """Dual clip: for negative advantages the loss is at most -c * advantage. 3 and 10 are common; null is off."""
    kl: KLConfig = Field(default_factory=KLConfig)
    overlong: OverlongConfig = Field(default_factory=OverlongConfig)
    selection: SelectionConfig = Field(default_factory=SelectionConfig)
    correction: CorrectionConfig = Field(default_factory=CorrectionConfig)

    def __post_init__(self) -> None:
        if self.ratio_clip_min >= 1:
            raise UserError(
                "algorithm.ratio_clip_min",
                self.ratio_clip_min,
                "1 - ratio_clip_min must stay above 0",
                "0.2 is common",
            )
        if self.ratio_clip_c is not None and self.ratio_clip_c <= 1 + self.ratio_clip_max:
            raise UserError(
                "algorithm.ratio_clip_c",
                self.ratio_clip_c,
                "must exceed 1 + ratio_clip_max, else it cuts the ordinary range",
                "use 3 or 10, or null to switch dual clip off",
            )

    def num_updates(self, batch_size: int) -> int:
        """Return the optimizer updates of one step."""
        return self.num_epochs * (self.num_rows or 0) // batch_size

    def check(self, others: OtherSections) -> None:
        """Check that the length penalty fits the response length."""
        limit = others.rollout.max_new_tokens
        if self.overlong.buffer > limit:
            raise UserError(
                "algorithm.overlong.buffer",
                self.overlong.buffer,
                f"must not exceed rollout.max_new_tokens = {limit}",
                "shorten the buffer",
            )


@section
class GroupConfig(ClippedConfig):
    """Settings of every method with groups of rollouts."""

    num_generations_per_prompt: PositiveInt = 8
    normalize_rewards: bool = True
    """Divide the advantage by the group's unbiased standard deviation (+1e-6). Dr. GRPO: false."""
    use_leave_one_out_baseline: bool = False
    """RLOO: the baseline of a rollout is the mean of the others."""
    use_dynamic_sampling: bool = False
    """DAPO: groups whose rewards are all equal are thrown away and replaced by those of further prompts."""
    max_generation_batches: PositiveInt = 10
    """Bound on the generation rounds of one step under dynamic sampling; reaching it with too few groups is an error."""

    @property
    def num_rows(self) -> int:
        """Rollouts of one step."""
        return self.num_prompts_per_step * self.num_generations_per_prompt

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.num_generations_per_prompt < 2:
            raise UserError(
                "algorithm.num_generations_per_prompt",
                self.num_generations_per_prompt,
                "a group needs at least 2 rollouts to have a baseline",
                "use 2 or more; 8 and 16 are common",
            )

    def scaled_down(self, num_rows: int, *, num_stored: int) -> Self:
        """Return the same method with groups of two rollouts."""
        return replace(self, num_prompts_per_step=num_rows // 2, num_generations_per_prompt=2)

"""One section per algorithm; ``algorithm.name`` picks the class that owns the rest.

These classes stand here and not in ``algorithms/<name>.py`` because a config is checked before torch is imported, and an
algorithm cannot be imported without torch. Defaults are the vetted setting of the method's paper.
"""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import Field, NonNegativeFloat, NonNegativeInt, PositiveFloat, PositiveInt

from megatron_rl.config.section import section
from megatron_rl.errors import UserError

Aggregation = Literal["token-mean", "seq-mean-token-mean", "seq-mean-token-sum-norm"]


@section
class KLConfig:
    """KL to the frozen reference, the policy that the run started from. Off at ``coef: 0`` (no reference is kept then)."""

    coef: NonNegativeFloat = 0.0
    placement: Literal["loss", "reward"] = "loss"
    """``reward`` subtracts coef * (k1 summed over the response) from the rollout's reward, before the group baseline; its
    policy gradient is that of KL(policy || reference)."""
    estimator: Literal["k1", "k2", "k3"] = "k3"
    """As a loss, k1 has zero expected gradient, k2 the reverse KL's, k3 the *forward* KL's. In the reward only k1 is right."""

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
    penalty: NonNegativeFloat = 1.0


@section
class GRPOConfig:
    """GRPO (arXiv 2402.03300) and what its users vary: DAPO, Dr. GRPO and RLOO are settings of it."""

    name: Literal["grpo"] = "grpo"
    num_prompts_per_step: PositiveInt = 64
    num_generations_per_prompt: PositiveInt = 8
    num_epochs: PositiveInt = 1
    """Passes over each rollout batch. Updates per step = epochs * rows / policy.train_global_batch_size."""
    normalize_rewards: bool = True
    """Divide the advantage by the group's unbiased standard deviation (+1e-6). Dr. GRPO: false."""
    use_leave_one_out_baseline: bool = False
    """RLOO: the baseline of a rollout is the mean of the others."""
    ratio_clip_min: PositiveFloat = 0.2
    """Ratios below 1 - ratio_clip_min are clipped."""
    ratio_clip_max: PositiveFloat = 0.2
    """Ratios above 1 + ratio_clip_max are clipped; 0.28 is DAPO's clip-higher."""
    ratio_clip_c: float | None = None
    """Dual clip: for negative advantages the loss is at most -c * advantage. 3 and 10 are common; null is off."""
    loss_aggregation: Aggregation = "token-mean"
    kl: KLConfig = Field(default_factory=KLConfig)
    overlong: OverlongConfig = Field(default_factory=OverlongConfig)
    use_dynamic_sampling: bool = False
    """DAPO: groups whose rewards are all equal are thrown away and replaced by those of further prompts."""
    max_generation_batches: PositiveInt = 10
    """Bound on the generation rounds of one step under dynamic sampling; reaching it with too few groups is an error."""

    @property
    def num_rows(self) -> int:
        """Rollouts trained on in one step."""
        return self.num_prompts_per_step * self.num_generations_per_prompt

    def __post_init__(self) -> None:
        if self.num_generations_per_prompt < 2:
            raise UserError(
                "algorithm.num_generations_per_prompt",
                self.num_generations_per_prompt,
                "a group needs at least 2 rollouts to have a baseline",
                "use 2 or more; 8 and 16 are common",
            )
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


@section
class SFTConfig:
    """Supervised next-token training on the worked solutions of the task: warm start, and later mid-training."""

    name: Literal["sft"] = "sft"
    loss_aggregation: Aggregation = "token-mean"

    @property
    def num_rows(self) -> None:
        """One step is one optimizer update on policy.train_global_batch_size rows."""
        return None


AlgorithmConfig = Annotated[GRPOConfig | SFTConfig, Field(discriminator="name")]

STAGE_OF_ALGORITHM: dict[str, Literal["rl", "sft"]] = {"grpo": "rl", "sft": "sft"}

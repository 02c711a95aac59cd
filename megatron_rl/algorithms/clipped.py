"""What all methods with a clipped ratio share: their loss, the penalty for length, and the mask of the tokens that count."""

from __future__ import annotations

from collections.abc import Sequence

from torch import Tensor

from megatron_rl.advantages.segment import is_uncertain
from megatron_rl.advantages.shaping import overlong_penalty
from megatron_rl.algorithms.base import OnlineAlgorithm
from megatron_rl.config import ClippedConfig, Config, MaskConfig
from megatron_rl.losses.clipped_policy import clipped_policy_loss
from megatron_rl.losses.kl import kl_estimate
from megatron_rl.losses.terms import TokenTerms
from megatron_rl.types import MicroBatch, TrainingSample


class ClippedAlgorithm(OnlineAlgorithm):
    """A policy gradient with a clipped ratio (PPO's, arXiv 1707.06347 eq. 7), and KL to a reference where it is asked for."""

    def __init__(self, config: Config) -> None:
        super().__init__(config)
        assert isinstance(config.algorithm, ClippedConfig)
        self.clipped = config.algorithm
        self.num_epochs = self.clipped.num_epochs
        self.needs_reference = self.clipped.kl.coef > 0
        self._metrics: dict[str, float] = {}

    def step_metrics(self) -> dict[str, float]:
        """What the last step's rollouts and rows were like, as only the method knows it."""
        return self._metrics

    # ---- which tokens count

    @property
    def asks_policy(self) -> bool:
        """Probabilities come from a pass of the trainer.

        Our engines give those of the whole distribution also where they sample from a part of it. Not every server does.
        """
        rollout, settings = self.config.rollout, self.clipped
        return (
            isinstance(settings, MaskConfig)
            and settings.uses_probabilities
            and settings.probabilities_from(top_p=rollout.top_p, top_k=rollout.top_k) == "policy"
        )

    def mask_of(self, rollout_log_probs: Tensor) -> Tensor | None:
        """[R] bool, a row's ``loss_mask`` by the engine's log-probs; None where all count, or the policy will be asked."""
        threshold = self.clipped.mask_threshold if isinstance(self.clipped, MaskConfig) else None
        return None if self.asks_policy else probability_mask(rollout_log_probs, threshold)

    def mask_by_policy(self, samples: Sequence[TrainingSample]) -> None:
        """Set the masks for which the policy was to be asked; it has been, ``old_log_probs`` are there."""
        if not self.asks_policy or not isinstance(self.clipped, MaskConfig) or self.clipped.mask_threshold is None:
            return
        for sample in samples:
            if sample.loss_mask is None:
                sample.loss_mask = probability_mask(sample.old_log_probs, self.clipped.mask_threshold)

    # ---- loss

    def shaped(self, reward: float, num_tokens: int) -> float:
        """The reward of a response of so many tokens, less what it pays for its length."""
        overlong = self.clipped.overlong
        return reward + overlong_penalty(
            num_tokens,
            max_tokens=self.config.rollout.max_new_tokens,
            buffer=overlong.buffer,
            penalty=overlong.penalty,
        )

    def loss(self, log_probs: Tensor, entropy: Tensor, batch: MicroBatch) -> TokenTerms:
        """Clipped policy loss, plus ``coef * KL`` where KL is part of the loss."""
        settings, vectors = self.clipped, batch.vectors
        policy = clipped_policy_loss(
            log_probs,
            vectors["old_log_probs"],
            vectors["advantages"],
            clip_min=settings.ratio_clip_min,
            clip_max=settings.ratio_clip_max,
            dual_clip=settings.ratio_clip_c,
        )
        capped = {} if settings.ratio_clip_c is None else {"dual_clip_frac": policy.is_capped}
        terms = TokenTerms(
            loss=policy.loss,
            means={
                "entropy/mean": entropy,
                "ratio/mean": policy.ratio,
                "clip_frac": policy.is_clipped,
                **capped,
                "kl/old": kl_estimate(vectors["old_log_probs"], log_probs.detach(), "k3"),
            },
            maxima={"ratio/max": policy.ratio, "ratio/max_abs_log_ratio": policy.log_ratio.abs()},
        )
        if self.needs_reference:
            terms.means["kl/reference"] = kl_estimate(log_probs.detach(), vectors["ref_log_probs"], "k3")
            if settings.kl.coef > 0 and settings.kl.placement == "loss":
                kl = kl_estimate(log_probs, vectors["ref_log_probs"], settings.kl.estimator)
                terms.loss = terms.loss + settings.kl.coef * kl
        return terms


def probability_mask(log_probs: Tensor | None, threshold: float | None) -> Tensor | None:
    """[R] bool, the ``loss_mask`` of tokens that were sampled with a probability below ``threshold``; None if that is None.

    Those that the policy was sure of carry no choice that could be credited (SPO, arXiv 2505.23564 section 4.3).
    """
    if threshold is None or log_probs is None:
        return None
    return is_uncertain(log_probs, threshold)

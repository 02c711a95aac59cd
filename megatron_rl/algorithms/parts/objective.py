"""The clipped ratio of PPO, and KL to a reference where it is part of the loss."""

from __future__ import annotations

from torch import Tensor

from megatron_rl.algorithms.parts.base import Objective
from megatron_rl.config import ClippedConfig
from megatron_rl.losses.clipped_policy import clipped_policy_loss
from megatron_rl.losses.kl import kl_estimate
from megatron_rl.losses.terms import TokenTerms
from megatron_rl.types import MicroBatch


class ClippedObjective(Objective):
    """``max(-A rho, -A clip(rho)) + coef * KL``, per token (PPO, arXiv 1707.06347 eq. 7).

    The KL term gets the same token weights as the policy term.
    """

    def __init__(self, settings: ClippedConfig) -> None:
        super().__init__()
        self.settings = settings
        self.needs = frozenset({"ref_log_probs"} if settings.kl.coef > 0 else ())

    def __call__(self, log_probs: Tensor, entropy: Tensor, batch: MicroBatch) -> TokenTerms:
        """Return the loss of each token, and what to log of it."""
        settings, vectors = self.settings, batch.vectors
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
        if self.has_reference:
            terms.means["kl/reference"] = kl_estimate(log_probs.detach(), vectors["ref_log_probs"], "k3")
            if settings.kl.coef > 0 and settings.kl.placement == "loss":
                kl = kl_estimate(log_probs, vectors["ref_log_probs"], settings.kl.estimator)
                terms.loss = terms.loss + settings.kl.coef * kl
        return terms

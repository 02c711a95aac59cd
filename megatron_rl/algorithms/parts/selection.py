"""ProbabilityMask: the tokens that enter the loss, by the probability with which they were sampled."""

from __future__ import annotations

from collections.abc import Sequence

from torch import Tensor

from megatron_rl.advantages.segment import is_uncertain
from megatron_rl.algorithms.parts.base import TokenSelection
from megatron_rl.config.methods.shared import SelectionConfig
from megatron_rl.config.rollout import RolloutConfig
from megatron_rl.types import POLICY_GRADIENT_KINDS, TrainingSample


class ProbabilityMask(TokenSelection):
    """The mask of ``algorithm.selection``: tokens that were sampled with a probability below a threshold.

    Tokens that the policy was sure of carry no choice that could be credited (SPO, arXiv 2505.23564 section 4.3).
    """

    def __init__(self, settings: SelectionConfig, rollout: RolloutConfig, *, waits: bool = True) -> None:
        """Read the settings.

        Args:
            settings: of ``algorithm.selection``.
            rollout: of the run: how tokens are sampled decides whose probabilities count.
            waits: True: where probabilities come from the trainer, masks are set after ``old_log_probs`` are filled. False:
                the method has the trainer's probabilities already.
        """
        super().__init__()
        self.threshold = settings.max_probability
        self.is_on = self.threshold is not None
        # Our engines return log-probs of the full distribution even under top-p and top-k; other servers may not.
        self.asks_policy = waits and self.is_on and settings.probabilities_from(rollout) == "policy"
        """Probabilities come from a forward pass of the trainer."""
        self.needs = frozenset({"old_log_probs"} if self.asks_policy else ())

    def mask_of(self, rollout_log_probs: Tensor) -> Tensor | None:
        """Return the mask by the engine's log-probs, [R] bool; None where all count, or where the policy will be asked."""
        return None if self.asks_policy else self.mask(rollout_log_probs)

    def mask(self, log_probs: Tensor) -> Tensor | None:
        """Return the mask of tokens with these log-probs, [R] bool; None where all count."""
        return None if self.threshold is None else is_uncertain(log_probs, self.threshold)

    def mask_rows(self, samples: Sequence[TrainingSample]) -> None:
        """Set the masks that wait for ``old_log_probs``: all, or those of rows that no engine of this run sampled."""
        for sample in samples if self.is_on else ():
            waits = self.asks_policy or sample.rollout_log_probs is None
            if waits and sample.loss_mask is None and sample.kind in POLICY_GRADIENT_KINDS:
                assert sample.old_log_probs is not None
                sample.loss_mask = self.mask(sample.old_log_probs)

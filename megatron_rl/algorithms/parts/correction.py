"""TruncatedRatio: importance weights for the gap between the trainer's log-probs and the rollout engine's."""

from __future__ import annotations

from collections.abc import Sequence

from megatron_rl.algorithms.parts.base import Correction
from megatron_rl.config.methods.shared import CorrectionConfig
from megatron_rl.types import TrainingSample


class TruncatedRatio(Correction):
    """``min(old / rollout, max_ratio)`` for each token: truncated importance sampling (TIS, Yao et al. 2025).

    The trainer takes ``old`` for the policy that sampled; the engine sampled from ``rollout``, the same weights with other
    kernels or in another precision. The truncated ratio of both multiplies the token's weight, which is not normalised again.
    Rows that no engine of this run sampled keep their weights.
    """

    needs = frozenset({"old_log_probs"})

    def __init__(self, max_ratio: float) -> None:
        super().__init__()
        self.max_ratio = max_ratio

    @classmethod
    def of(cls, settings: CorrectionConfig) -> TruncatedRatio | None:
        """Build the part of ``algorithm.correction``; None where it is off."""
        return None if settings.max_ratio is None else cls(settings.max_ratio)

    def weigh(self, mini_batch: Sequence[TrainingSample]) -> None:
        """Multiply the ``weights`` of each sampled row."""
        num_tokens = num_truncated = 0
        total = 0.0
        for sample in mini_batch:
            if sample.rollout_log_probs is None or sample.old_log_probs is None:
                continue
            assert sample.weights is not None
            ratio = (sample.old_log_probs - sample.rollout_log_probs).exp()
            factor = ratio.clamp(max=self.max_ratio)
            sample.weights = sample.weights * factor
            num_tokens, total = num_tokens + len(ratio), total + float(factor.sum())
            num_truncated += int((ratio > self.max_ratio).sum())
        if num_tokens:
            self.metrics = {
                "correction/weight_mean": total / num_tokens,
                "correction/truncated_frac": num_truncated / num_tokens,
            }

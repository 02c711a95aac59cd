"""Supervised fine-tuning: the negative log-likelihood of worked solutions."""

from __future__ import annotations

from torch import Tensor

from megatron_rl.algorithms.base import Algorithm
from megatron_rl.losses.terms import TokenTerms
from megatron_rl.types import MicroBatch


class SFT(Algorithm):
    """Rows come from the task's demonstrations; there is nothing to collect and no credit to give."""

    def loss(self, log_probs: Tensor, entropy: Tensor, batch: MicroBatch) -> TokenTerms:
        """Return ``-log p`` of each target token."""
        return TokenTerms(loss=-log_probs, means={"entropy/mean": entropy})

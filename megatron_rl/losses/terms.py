"""TokenTerms: what a loss returns, one term per token, and what to log."""

from __future__ import annotations

from dataclasses import dataclass, field

from torch import Tensor

from megatron_rl.types import RowKind


@dataclass
class TokenTerms:
    """All vectors are [T] float32."""

    loss: Tensor
    """The loss of each token, with gradient. The trainer multiplies it by the token's weight and sums."""
    means: dict[str, Tensor] = field(default_factory=dict)
    """Logged as the mean over the mini-batch's loss tokens."""
    maxima: dict[str, Tensor] = field(default_factory=dict)
    """Logged as the maximum over them."""
    kinds: dict[str, frozenset[RowKind]] = field(default_factory=dict)
    """Metrics that are over the tokens of such rows alone."""

"""The clipped policy objective of PPO and its relatives, per token."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

MAX_LOG_RATIO = 20.0
"""The log-ratio is clamped to this before ``exp``: e^20 is finite, and far outside any clip range."""


@dataclass(frozen=True)
class PolicyTerms:
    """Per-token results, each [T] float32."""

    loss: Tensor
    log_ratio: Tensor
    ratio: Tensor
    is_clipped: Tensor
    """1.0 where the clipped side was taken and differs (no gradient flows there)."""
    is_capped: Tensor
    """1.0 where dual clip bounded the loss (no gradient flows there either); never where ``is_clipped``."""


def clipped_policy_loss(
    log_probs: Tensor,
    old_log_probs: Tensor,
    advantages: Tensor,
    *,
    clip_min: float,
    clip_max: float,
    dual_clip: float | None = None,
) -> PolicyTerms:
    """``L_t = max(-A rho, -A clip(rho, 1 - clip_min, 1 + clip_max))``, to be minimised (PPO, arXiv 1707.06347 eq. 7).

    Two bounds instead of one are DAPO's clip-higher (arXiv 2503.14476 eq. 10). With ``dual_clip = c`` the loss of tokens
    with a negative advantage is at most ``-c A`` (arXiv 1912.09729 eq. 5).

    Args:
        log_probs: [T] float32 with gradient, at the sampling temperature.
        old_log_probs: [T] float32, of the policy before this rollout's first update, from the training engine.
        advantages: [T] float32.
        clip_min: the ratio is clipped below ``1 - clip_min``.
        clip_max: the ratio is clipped above ``1 + clip_max``.
        dual_clip: c above, or None.

    Returns:
        The terms; tokens outside the response are the caller's to mask (their weight is 0).
    """
    log_ratio = log_probs - old_log_probs
    ratio = log_ratio.clamp(-MAX_LOG_RATIO, MAX_LOG_RATIO).exp()
    unclipped = -advantages * ratio
    clipped = -advantages * ratio.clamp(1 - clip_min, 1 + clip_max)
    loss = torch.maximum(unclipped, clipped)
    is_clipped = clipped > unclipped
    is_capped = torch.zeros_like(is_clipped)
    if dual_clip is not None:
        ceiling = -advantages * dual_clip
        is_capped = (advantages < 0) & (loss > ceiling)
        loss = torch.where(is_capped, ceiling, loss)
    return PolicyTerms(loss, log_ratio.detach(), ratio.detach(), is_clipped.float(), is_capped.float())

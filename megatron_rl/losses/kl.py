"""Estimators of KL(policy || reference) from the log-probs of sampled tokens."""

from __future__ import annotations

from typing import Literal

from torch import Tensor

MAX_LOG_RATIO = 20.0


def kl_estimate(log_probs: Tensor, ref_log_probs: Tensor, estimator: Literal["k1", "k2", "k3"]) -> Tensor:
    """k1 = d, k2 = d^2 / 2 or k3 = exp(-d) - 1 + d, with ``d = log_probs - ref_log_probs``.

    What their gradients are in expectation over the policy's own samples, when simply added to a loss: k1 none, k2 that of
    KL(policy || reference), k3 that of KL(reference || policy). (tests/unit/losses/test_kl.py checks this.)

    Args:
        log_probs: [T] float32, with gradient where wanted.
        ref_log_probs: [T] float32.
        estimator: which.

    Returns:
        [T] float32. ``d`` is clamped to +-20 inside k3's exponential only, so that k3 stays finite and a token far *above*
        the reference keeps its gradient.
    """
    difference = log_probs - ref_log_probs
    if estimator == "k1":
        return difference
    if estimator == "k2":
        return 0.5 * difference.square()
    return (-difference).clamp(-MAX_LOG_RATIO, MAX_LOG_RATIO).exp() - 1 + difference

"""Estimators of KL(policy || reference) from the log-probs of sampled tokens, with d = log policy - log reference.

    name   value             gradient for the token's log-prob
    k1     d                 1
    k2     d^2 / 2           d
    k3     e^-d - 1 + d      1 - e^-d

k3 is meant as the released codes have it (verl and others under ``low_var_kl``, DPH-RL's baseline among them): its value is
clamped to 10, and a token there has no gradient. So tokens more than 2.6 nats below the reference or 11 nats above it feel no
pull. On samples of the policy a token at d is as rare as e^d, but its exact gradient e^-d would decide the whole update. k1 and
k2 are exact everywhere. Stored samples of the reference are another matter: see ``f_divergence``.
"""

from __future__ import annotations

from typing import Literal

import torch
from torch import Tensor

MAX_K3 = 10.0
"""Largest value of k3, in nats; no gradient flows where it is reached."""
_MAX_EXPONENT = 20.0
"""Bound inside the exponential, far beyond ``MAX_K3``: it keeps e^-d finite in float32 and changes nothing else."""


def kl_estimate(log_probs: Tensor, ref_log_probs: Tensor, estimator: Literal["k1", "k2", "k3"]) -> Tensor:
    """Return k1, k2 or k3 of each token, as the module defines them.

    Expected over the policy's own samples, the gradient of an estimator that is added to a loss is: of k1 none; of k2 that of
    KL(policy || reference), per token, for prefixes as they are; of k3, but for tokens at its clamp, that of
    KL(reference || policy). (tests/unit/losses/test_kl.py checks this.)

    Args:
        log_probs: [T] float32, with gradient where wanted.
        ref_log_probs: [T] float32.
        estimator: which.

    Returns:
        [T] float32. k3 is from 0 to 10, and right for small d as well, where ``e^-d - 1`` loses its digits.
    """
    difference = log_probs - ref_log_probs
    if estimator == "k1":
        return difference
    if estimator == "k2":
        return 0.5 * difference.square()
    exponent = (-difference).clamp(-_MAX_EXPONENT, _MAX_EXPONENT)
    return (torch.expm1(exponent) - exponent).clamp(0.0, MAX_K3)

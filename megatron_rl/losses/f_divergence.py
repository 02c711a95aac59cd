"""f-divergences to a reference from stored samples of it: the rehearsal term of DPH-RL (arXiv 2509.07430), per token.

With ``u = policy / reference`` at a token that the reference sampled, ``D_f = E_reference[f(u)]``. The gradient for the token's
log-prob is ``u f'(u)``:

    name            f(u)                                             u f'(u)                   as u -> 0
    forward_kl      u - 1 - log u                                    u - 1                     -1: pulled back up
    js              u log u - (u + 1) log((u + 1) / 2)               u log(2 u / (1 + u))       0
    alpha           (u^(1-a) - (1 - a) u - a) / (a (a - 1))          (u - u^(1-a)) / a          0
    reverse_kl      u log u - u + 1                                  u log u                    0
    likelihood      -log u                                           -1                        -1

All but the last are 0 with slope 0 at u = 1. Their curvature there is 1, that of ``js`` 1/2: it needs twice the coefficient for
the same local strength. ``alpha`` lies between reverse (a -> 0) and forward (a -> 1). js, alpha and reverse let go of what is
nearly forgotten, so they must be on from the first step.

Deviations from the released code: float32 throughout; the log-ratio is bounded at +-40 and values are not, so that a forgotten
token keeps its pull; ratios are of tokens, as there, never of sequences.
"""

from __future__ import annotations

import math
from typing import Literal

import torch
from torch import Tensor

Generator = Literal["forward_kl", "js", "alpha", "reverse_kl", "likelihood"]

MAX_LOG_RATIO = 40.0
"""e^40 is finite in float32 with room for its products; beyond it value and gradient stay as they are there."""


def f_divergence(log_probs: Tensor, ref_log_probs: Tensor, divergence: Generator, *, alpha: float = 0.5) -> Tensor:
    """``f(u)`` per token, with the exact gradient ``u f'(u)``.

    Args:
        log_probs: [T], with gradient where wanted; any floating type, computed in float32 or better.
        ref_log_probs: [T], of the reference that sampled the tokens.
        divergence: which f.
        alpha: of ``alpha``, in (0, 1).

    Returns:
        [T] float32 (float64 for such), never negative but for rounding (``likelihood`` apart). Differences of nearly equal
        numbers are avoided, so that value and gradient are right near u = 1 and for ``|log u|`` up to the bound.
    """
    assert divergence != "alpha" or 0 < alpha < 1, alpha
    log_probs, ref_log_probs = _precise(log_probs), _precise(ref_log_probs)
    with torch.no_grad():
        log_u = (log_probs - ref_log_probs).clamp(-MAX_LOG_RATIO, MAX_LOG_RATIO)
        value, slope = _value_and_slope(log_u, divergence, alpha)
    # The slope in closed form: autograd's would be a difference of large numbers.
    return value + slope * (log_probs - log_probs.detach())


def _precise(x: Tensor) -> Tensor:
    return x.to(torch.promote_types(x.dtype, torch.float32))


def _value_and_slope(log_u: Tensor, divergence: Generator, alpha: float) -> tuple[Tensor, Tensor]:
    u, u_minus_1 = log_u.exp(), torch.expm1(log_u)
    match divergence:
        case "forward_kl":
            return u_minus_1 - log_u, u_minus_1
        case "js":
            # log((1 + u) / 2) and log(2 u / (1 + u)), exact near u = 1
            log_mean = torch.where(log_u < 0, torch.log1p(u_minus_1 / 2), log_u + torch.log1p(torch.expm1(-log_u) / 2))
            below_mean = torch.where(log_u < 0, log_u - log_mean, -torch.log1p(torch.expm1(-log_u) / 2))
            return u * below_mean - log_mean, u * below_mean
        case "alpha":
            power = 1 - alpha
            value = (torch.expm1(power * log_u) - power * u_minus_1) / (alpha * -power)
            return value, (power * log_u).exp() * torch.expm1(alpha * log_u) / alpha
        case "reverse_kl":
            return u * log_u - u_minus_1, u * log_u
        case "likelihood":
            return -log_u, torch.full_like(log_u, -1.0)
    raise AssertionError(divergence)


def js_definition(log_probs: Tensor, ref_log_probs: Tensor) -> Tensor:
    """The reference's half of ``JSD = KL(ref || m) / 2 + KL(policy || m) / 2``, ``m`` the mean of both, by k3.

    Unlike the released code it has the factor 1/2. The policy's half belongs to the policy's own rollouts:
    ``js_definition(ref_log_probs, log_probs)`` with roles swapped, where the reference's log-probs of rollouts are known.

    Args:
        log_probs: [T], with gradient where wanted.
        ref_log_probs: [T].

    Returns:
        [T] float32, or float64 for such.
    """
    log_probs, ref_log_probs = _precise(log_probs), _precise(ref_log_probs)
    log_mean = torch.logaddexp(log_probs, ref_log_probs) - math.log(2)
    difference = (log_mean - ref_log_probs).clamp(-MAX_LOG_RATIO, MAX_LOG_RATIO)
    return 0.5 * (torch.expm1(difference) - difference)

"""Group-relative advantages: each rollout against the other rollouts of its prompt."""

from __future__ import annotations

import torch
from torch import Tensor

STD_EPSILON = 1e-6


def group_advantages(rewards: Tensor, *, normalize: bool, leave_one_out: bool) -> Tensor:
    """``A_i = (r_i - baseline_i) / scale`` within one group (GRPO, arXiv 2402.03300 eq. 3; RLOO, arXiv 2402.14740 eq. 5).

    Deviations from the GRPO paper: the standard deviation is the unbiased one (N - 1), as in the released code that
    others compare with, and 1e-6 is added to it.

    Args:
        rewards: [G] float32, the rewards of one prompt's rollouts.
        normalize: divide by ``std + 1e-6`` (False: Dr. GRPO, arXiv 2503.20783).
        leave_one_out: the baseline of rollout i is the mean of the others, so ``r_i - b_i = G / (G - 1) (r_i - mean)``.

    Returns:
        [G] float32. A group of equal rewards gives exact zeros.

    Raises:
        ValueError: the group has fewer than two rollouts, so it has no baseline.
    """
    size = len(rewards)
    if size < 2:
        raise ValueError(f"a group needs at least 2 rollouts to have a baseline, got {size}")
    if bool((rewards == rewards[0]).all()):  # rounding of the mean must not be blown up by the division
        return torch.zeros_like(rewards)
    centred = against_baseline(rewards, leave_one_out=leave_one_out)
    return centred / (rewards.std(unbiased=True) + STD_EPSILON) if normalize else centred


def against_baseline(values: Tensor, *, leave_one_out: bool) -> Tensor:
    """Return [G] the difference of each value to the mean of the group's G > 1 values, or to that of the others."""
    centred, size = values - values.mean(), len(values)
    return centred * (size / (size - 1)) if leave_one_out else centred

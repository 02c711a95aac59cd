"""Order and moments of all tokens of a mini-batch, for methods that select by them (top 20 % by entropy and the like).

Rows are the same on every rank, so these are plain functions of the whole mini-batch, and a selection does not depend on the
layout or the packing. Inside a loss, which sees one micro-batch, they would.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor


class Moments(NamedTuple):
    """Mean and standard deviation of a sample."""

    mean: float
    """0.0 for no value."""
    std: float
    """Unbiased (N - 1); 0.0 for fewer than two values."""


def top_k_mask(values: Tensor, k: int) -> Tensor:
    """Return [n] bool, the k largest of ``values``; of equal ones those with the smaller index. -0.0 equals 0.0.

    Args:
        values: [n] float.
        k: from 0 to n.

    Raises:
        ValueError: k is out of range, or a value is NaN.
    """
    if not 0 <= k <= len(values):
        raise ValueError(f"k must be from 0 to the number of values, {len(values)}, got {k}")
    if bool(values.isnan().any()):
        raise ValueError("a NaN has no place in an order")
    order = (values + 0.0).sort(descending=True, stable=True).indices
    return torch.zeros_like(values, dtype=torch.bool).index_fill(0, order[:k], True)


def moments(values: Tensor) -> Moments:
    """Return mean and standard deviation of [n] values, in float64."""
    wide = values.double()
    return Moments(float(wide.mean()) if len(wide) else 0.0, float(wide.std()) if len(wide) > 1 else 0.0)

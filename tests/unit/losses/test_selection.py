"""Selections by value: exact counts, ties by index."""

from __future__ import annotations

import math

import pytest
import torch

from megatron_rl.losses.selection import moments, top_k_mask


def tokens(count: int = 4001) -> torch.Tensor:
    """Values with many ties, both signs, both zeros, and infinities."""
    values = (torch.randn(count, generator=torch.Generator().manual_seed(7)) * 20).round() / 8
    values[:4] = torch.tensor([-0.0, 0.0, float("inf"), float("-inf")])
    return values


@pytest.mark.parametrize("k", [0, 1, 2, 3, 800, 2000, 4000, 4001])
def test_the_largest_are_chosen_and_of_equal_ones_the_first(k: int) -> None:
    values = tokens()
    order = sorted(range(len(values)), key=lambda index: (-float(values[index]), index))
    assert top_k_mask(values, k).nonzero()[:, 0].tolist() == sorted(order[:k])


def test_the_zeros_are_equal() -> None:
    assert top_k_mask(torch.tensor([-1.0, -0.0, 0.0, -0.0]), 2).tolist() == [False, True, True, False]


def test_what_has_no_order_is_refused() -> None:
    with pytest.raises(ValueError, match="NaN"):
        top_k_mask(torch.tensor([1.0, math.nan]), 1)
    for k in (-1, 3):
        with pytest.raises(ValueError, match=f"number of values, 2, got {k}"):
            top_k_mask(torch.zeros(2), k)


def test_moments_of_a_sample() -> None:
    assert moments(torch.tensor([1.0, 2.0, 6.0])) == (3.0, pytest.approx(7**0.5))
    assert moments(torch.tensor([5.0])) == (5.0, 0.0) and moments(torch.zeros(0)) == (0.0, 0.0)
    near = torch.tensor([16_777_216.0, 1.0, 1.0, 1.0])  # float32 cannot add these up
    assert moments(near).mean == 4_194_304.75

"""Order statistics and moments of the tokens of a whole mini-batch, however they are spread over ranks.

What peers select per micro-batch (the top 20 % by entropy, the tokens that Clip-Cov cuts) depends on the layout there. Here
every function takes this rank's tokens of *all* its micro-batches and the group that holds the others, and gives what one
rank with all tokens would get: a pure function of the set of (value, id) pairs.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
import torch.distributed as dist
from torch import Tensor

_DIGIT_BITS, _DIGITS = 8, 8
"""A 64-bit key is found digit by digit: each round counts one digit's 256 values, in one all-reduce of 2 KiB."""


@dataclass(frozen=True)
class Moments:
    """Of all tokens of a mini-batch."""

    count: int
    mean: float
    std: float
    """Of the sample (N - 1); 0.0 for fewer than two tokens."""


def global_moments(values: Tensor, group: dist.ProcessGroup | None = None) -> Moments:
    """Count, mean and standard deviation over all ranks, in float64 and two passes.

    Args:
        values: [n] this rank's tokens; n may be 0 and differs between ranks.
        group: ranks that hold the others, each token on one of them; None: there are no others.
    """
    wide = values.double()
    count, total = _sum(torch.stack([torch.tensor(float(len(wide))).double(), wide.sum().cpu()]), group).tolist()
    mean = total / count if count else 0.0
    squares = float(_sum((wide - mean).square().sum().cpu()[None], group))
    return Moments(int(count), mean, (squares / (count - 1)) ** 0.5 if count > 1 else 0.0)


def kth_largest(values: Tensor, k: int, group: dist.ProcessGroup | None = None) -> float:
    """The k-th largest value over all ranks, exact, ties counted as often as they occur.

    Args:
        values: [n] float32; this rank's tokens.
        k: from 1 to the number of tokens over all ranks.
        group: see ``global_moments``.

    Raises:
        ValueError: k is out of range, or a value is NaN (on all ranks alike).
    """
    key = _kth_largest_key(_ordered(values, group).cpu() << 32, k, group)
    return float(_value_of(key >> 32))


def top_k_mask(values: Tensor, ids: Tensor, k: int, group: dist.ProcessGroup | None = None) -> Tensor:
    """Marks exactly the k largest values over all ranks; of equal ones, those with the smaller id.

    Args:
        values: [n] float32; this rank's tokens.
        ids: [n] int64, from 0 to 2**32 - 1, unique over all ranks: the token's place in the mini-batch.
        k: from 0 to the number of tokens over all ranks.
        group: see ``global_moments``.

    Returns:
        [n] bool.

    Raises:
        ValueError: k is out of range, or a value is NaN (on all ranks alike).
    """
    if k == 0:
        return torch.zeros_like(values, dtype=torch.bool)
    keys = _ordered(values, group).cpu() << 32 | (2**32 - 1 - ids.cpu())
    return (keys >= _kth_largest_key(keys, k, group)).to(values.device)


def _ordered(values: Tensor, group: dist.ProcessGroup | None) -> Tensor:
    """[n] int64 from -2**31 to 2**31 - 1, in the order of the floats; -0.0 is 0.0."""
    if int(_sum(values.isnan().sum().cpu()[None], group)):
        raise ValueError("a NaN has no place in an order")
    bits = (values.float() + 0.0).view(torch.int32).long()
    return torch.where(bits >= 0, bits, -(2**31) - 1 - bits)


def _value_of(ordered: int) -> Tensor:
    bits = ordered if ordered >= 0 else -(2**31) - 1 - ordered
    return torch.tensor(bits, dtype=torch.int32).view(torch.float32)


def _kth_largest_key(keys: Tensor, k: int, group: dist.ProcessGroup | None) -> int:
    """Radix selection from the top digit down; the keys that can still be it shrink with each round."""
    total = int(_sum(torch.tensor([len(keys)]), group))
    if not 1 <= k <= total:
        raise ValueError(f"k must be from 1 to the number of tokens, {total}, got {k}")
    found, left = 0, k
    for digit in reversed(range(_DIGITS)):
        shift = digit * _DIGIT_BITS
        # An arithmetic shift: the top digit is signed, the others are not.
        digits = (keys >> shift) + 128 if digit == _DIGITS - 1 else (keys >> shift) & 255
        counts = _sum(torch.bincount(digits, minlength=256), group)
        from_top = counts.flip(0).cumsum(0)
        place = 255 - int((from_top < left).sum())
        left -= int(counts[place + 1 :].sum())
        found |= (place - 128 if digit == _DIGITS - 1 else place) << shift
        keys = keys[digits == place]
    return found


def _sum(values: Tensor, group: dist.ProcessGroup | None) -> Tensor:
    if group is not None and dist.get_world_size(group) > 1:
        dist.all_reduce(values, group=group)
    return values

"""Segments of a response: where they begin, and what each is worth (SPO-chain, arXiv 2505.23564 section 4).

A border is a number of tokens: the state after so many tokens of the response, before the next. 0 is the bare prompt.

    response      t0 t1 t2 t3 t4 t5 t6        p = .99 .5 .95 .4 .3 .99 .2
    cut points       *     *  *     *         the tokens that the policy was not sure of: 1, 3, 4, 6
    every 2nd        |        |               borders 1 and 4: segments t1-t3 and t4-t6; t0 belongs to none
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from itertools import pairwise

import torch
from torch import Tensor

from megatron_rl.types import SegmentStart


def cut_points(log_probs: Tensor, threshold: float) -> list[int]:
    """Tokens whose probability is below ``threshold``: where values can change.

    Args:
        log_probs: [R] of the sampled tokens, at the sampling temperature.
        threshold: kappa of the paper's section 4.1 (there called rho).
    """
    return is_uncertain(log_probs, threshold).nonzero()[:, 0].tolist()


def is_uncertain(log_probs: Tensor, threshold: float) -> Tensor:
    """[R] bool: probability below ``threshold``. The one comparison, of cut points and of the loss mask alike."""
    return log_probs < torch.tensor(threshold).log()


def every_nth_cut_point(log_probs: Tensor, threshold: float, interval: int) -> list[int]:
    """Borders before cut points 0, n, 2n, ...: equally many cut points in each segment (section 4.1)."""
    return cut_points(log_probs, threshold)[::interval]


def every_n_tokens(num_tokens: int, segment_length: int) -> list[int]:
    """Borders 0, n, 2n, ..."""
    return list(range(0, num_tokens, segment_length))


def equal_segments(num_tokens: int, num_segments: int) -> list[int]:
    """Borders of so many segments, whose lengths differ by one at most; fewer where there are fewer tokens."""
    return sorted({number * num_tokens // num_segments for number in range(num_segments)} if num_tokens else ())


def after_tokens(response_ids: Tensor, token_ids: Tensor) -> list[int]:
    """Borders 0 and after each of the given tokens (VinePPO, arXiv 2410.01679: newlines)."""
    borders = (torch.isin(response_ids, token_ids).nonzero()[:, 0] + 1).tolist()
    return [border for border in dict.fromkeys([0, *borders]) if border < len(response_ids)]


def segment_advantages(states: Sequence[SegmentStart], reward: float | None, num_tokens: int) -> Tensor:
    """Each token gets the change of value over its segment (eq. 3): V(next border) - V(border), at the end reward - V(last).

    Args:
        states: borders in rising order, below ``num_tokens``, with their values. Those without a value are no borders.
        reward: of the whole response; None where it could not be judged.
        num_tokens: R.

    Returns:
        [R] float32. 0 where ``has_credit`` says no. The sum over segments is the reward less the first border's value.
    """
    advantages = torch.zeros(num_tokens)
    for start, end, value, next_value in _segments(states, reward, num_tokens):
        advantages[start:end] = next_value - value
    return advantages


def has_credit(states: Sequence[SegmentStart], reward: float | None, num_tokens: int) -> Tensor:
    """[R] bool: the token is in a segment both of whose ends have a value. The others have no advantage, which is not the same
    as one of 0: whitening would make something of that."""
    credited = torch.zeros(num_tokens, dtype=torch.bool)
    for start, end, _, _ in _segments(states, reward, num_tokens):
        credited[start:end] = True
    return credited


def _segments(
    states: Sequence[SegmentStart], reward: float | None, num_tokens: int
) -> Iterator[tuple[int, int, float, float]]:
    """(start, end, value at the start, value at the end) of those that have both."""
    known = [(state.num_tokens, state.value) for state in states if state.value is not None]
    last = [] if reward is None else [(num_tokens, reward)]
    for (start, value), (end, next_value) in pairwise([*known, *last]):
        yield start, end, value, next_value

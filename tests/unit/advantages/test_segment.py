"""Segments of a response: the example of the paper's code worked out by hand, and what must hold for any response."""

from __future__ import annotations

import random

import pytest
import torch

from megatron_rl.advantages.segment import (
    after_tokens,
    cut_points,
    equal_segments,
    every_n_tokens,
    every_nth_cut_point,
    has_credit,
    is_uncertain,
    segment_advantages,
)
from megatron_rl.algorithms.parts.selection import ProbabilityMask
from megatron_rl.config.methods.shared import SelectionConfig
from megatron_rl.config.rollout import RolloutConfig
from megatron_rl.types import SegmentStart

EXAMPLE = torch.tensor([0.99, 0.5, 0.95, 0.4, 0.3, 0.99, 0.2]).log()


def test_the_worked_example() -> None:
    assert cut_points(EXAMPLE, 0.9) == [1, 3, 4, 6]
    borders = every_nth_cut_point(EXAMPLE, 0.9, 2)
    assert borders == [1, 4]  # the states after tokens 0 and 3
    states = [SegmentStart(border, value) for border, value in zip(borders, (0.25, 0.75))]
    advantages = segment_advantages(states, 1.0, 7)
    assert advantages.tolist() == [0, 0.5, 0.5, 0.5, 0.25, 0.25, 0.25]
    mask = ProbabilityMask(SelectionConfig(max_probability=0.9), RolloutConfig()).mask_of(EXAMPLE)
    assert mask is not None and mask.nonzero()[:, 0].tolist() == [1, 3, 4, 6]


def test_the_threshold_itself_is_certain_for_both_uses() -> None:
    at = torch.tensor([0.5, 0.25]).log()
    assert is_uncertain(at, 0.5).tolist() == [False, True]
    assert cut_points(at, 0.5) == [1]


def test_no_mask_without_a_threshold() -> None:
    assert ProbabilityMask(SelectionConfig(), RolloutConfig()).mask_of(EXAMPLE) is None


def test_partitions() -> None:
    assert every_n_tokens(7, 3) == [0, 3, 6]
    assert equal_segments(10, 4) == [0, 2, 5, 7]
    assert equal_segments(2, 4) == [0, 1]  # no segment without tokens
    assert equal_segments(0, 4) == every_n_tokens(0, 4) == []
    # Two newlines in a row, one at the very end: the last border would be the end itself.
    ids = torch.tensor([5, 9, 9, 6, 9])
    assert after_tokens(ids, torch.tensor([9])) == [0, 2, 3]
    assert after_tokens(ids, torch.tensor([7])) == [0]


def test_an_end_that_the_policy_was_not_sure_of_is_a_segment_of_its_own() -> None:
    """The end token is a token like others: what follows the border before it is one more try of coming to an end there."""
    borders = every_nth_cut_point(torch.tensor([0.5, 0.99, 0.6]).log(), 0.9, 1)
    assert borders == [0, 2]
    states = [SegmentStart(border, value) for border, value in zip(borders, (0.5, 0.25))]
    assert segment_advantages(states, 1.0, 3).tolist() == [-0.25, -0.25, 0.75]


def test_no_border_means_no_advantage() -> None:
    assert every_nth_cut_point(torch.tensor([-0.01, -0.02]), 0.9, 5) == []
    assert segment_advantages([], 1.0, 3).tolist() == [0, 0, 0]


@pytest.mark.parametrize("seed", range(20))
def test_segments_add_up_to_the_reward_less_the_first_value(seed: int) -> None:
    draw = random.Random(seed)
    num_tokens = draw.randint(1, 40)
    borders = sorted({0, *draw.sample(range(num_tokens), draw.randint(0, num_tokens - 1))})
    states = [SegmentStart(border, draw.random()) for border in borders]
    reward = draw.choice([0.0, 1.0])
    advantages = segment_advantages(states, reward, num_tokens)
    of_segments = advantages[borders].double().sum()
    assert float(of_segments) == pytest.approx(reward - states[0].value, abs=1e-5)
    for start, end in zip(borders, [*borders[1:], num_tokens]):
        assert len(set(advantages[start:end].tolist())) == 1


def test_a_border_without_a_value_is_none() -> None:
    """Its two segments are one; and where the reward is not known, the last segment teaches nothing."""
    states = [SegmentStart(0, 0.5), SegmentStart(2, None), SegmentStart(4, 0.75)]
    assert segment_advantages(states, 1.0, 5).tolist() == [0.25, 0.25, 0.25, 0.25, 0.25]
    assert segment_advantages(states, None, 5).tolist() == [0.25, 0.25, 0.25, 0.25, 0.0]
    assert has_credit(states, None, 5).tolist() == [True, True, True, True, False]
    assert has_credit([SegmentStart(2, 0.5)], 1.0, 4).tolist() == [False, False, True, True]
    assert not has_credit([], 1.0, 2).any() and not has_credit([SegmentStart(0, None)], 1.0, 2).any()

"""What grows from seeds: each branch once, in one order, whoever asks."""

from __future__ import annotations

from collections.abc import Sequence

import pytest
import torch

from megatron_rl.rollout.growth import Branch, from_list, grow_by_level, in_order
from megatron_rl.types import Completion, Request


def branch(*key: int) -> Branch:
    return Branch(key, Request(torch.tensor(key), 4, 1.0), tokens_to_come=4)


def expand(parent: Branch, completion: Completion) -> Sequence[Branch]:
    """Two further branches below the third level; what ends in a 1 leads to a place that its siblings lead to, too."""
    if len(parent.key) >= 3:
        return ()
    shared = branch(parent.key[0], 99)
    return [branch(*parent.key, 0), branch(*parent.key, 1), *([shared] if parent.key[-1] == 1 else [])]


def generate(requests: Sequence[Request]) -> list[Completion]:
    levels.append(len(requests))
    return [Completion(request.prompt_ids * 10, torch.zeros(1), "stop", 0) for request in requests]


levels: list[int] = []


def test_every_branch_once_and_a_call_for_each_level() -> None:
    levels.clear()
    seeds = [branch(1), branch(2), branch(1)]
    grown = grow_by_level(seeds, expand, generate)
    # (1, 99) follows from (1,) and from (1, 1); (2, 99) only from (2, 1), a level later.
    assert levels == [2, 5, 11, 2]
    assert len(grown) == 20
    for key, completion in grown.items():
        assert completion.response_ids.tolist() == [10 * number for number in key]


def test_order_is_enough_to_find_all_keys_again() -> None:
    seeds = [branch(1), branch(2)]
    grown = grow_by_level(seeds, expand, generate)
    scattered = dict(sorted(grown.items(), key=lambda item: item[0][::-1]))
    order = list(in_order(seeds, expand, lambda b: scattered[b.key]))
    assert order == list(grown)
    again = from_list(seeds, expand, [grown[key] for key in order])
    assert list(again) == order
    assert all(again[key] is grown[key] for key in order)


@pytest.mark.parametrize("change", [-1, 1])
def test_completions_of_another_growth_are_refused(change: int) -> None:
    seeds = [branch(1), branch(2)]
    completions = list(grow_by_level(seeds, expand, generate).values())
    completions = completions[:change] if change < 0 else [*completions, completions[0]]
    with pytest.raises(ValueError, match="seeds"):
        from_list(seeds, expand, completions)

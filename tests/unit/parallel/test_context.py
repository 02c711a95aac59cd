"""The zig-zag map, and token vectors that travel with their gradients."""

from __future__ import annotations

from itertools import pairwise

import pytest
import torch
import torch.distributed as dist

from megatron_rl.parallel.context import gather_order, sum_over_ranks, zigzag_indices
from tests.forked import run_ranks

CU_SEQLENS = torch.tensor([0, 8, 8 + 16, 8 + 16 + 8, 8 + 16 + 8 + 32], dtype=torch.int32)


def test_the_example_of_the_docstring() -> None:
    cu_seqlens = torch.tensor([0, 8])
    assert zigzag_indices(cu_seqlens, size=2, rank=0).tolist() == [0, 1, 6, 7]
    assert zigzag_indices(cu_seqlens, size=2, rank=1).tolist() == [2, 3, 4, 5]


@pytest.mark.parametrize("size", [1, 2, 4])
def test_every_token_is_held_once(size: int) -> None:
    held = [zigzag_indices(CU_SEQLENS, size=size, rank=rank) for rank in range(size)]
    assert sorted(torch.cat(held).tolist()) == list(range(64))
    assert torch.cat(held)[gather_order(CU_SEQLENS, size=size)].tolist() == list(range(64))
    # Sequence by sequence, and within each: the chunk from the front before the chunk from the back.
    for rank, mine in enumerate(held):
        for start, end in pairwise(CU_SEQLENS.tolist()):
            part = mine[(mine >= start) & (mine < end)] - start
            chunk = (end - start) // (2 * size)
            late = range((2 * size - 1 - rank) * chunk, (2 * size - rank) * chunk)
            assert part.tolist() == [*range(rank * chunk, (rank + 1) * chunk), *late]
        assert mine.tolist() == sorted(mine.tolist())


def test_it_is_the_order_of_megatrons_rotary_embedding() -> None:
    """Megatron cuts the frequencies of each packed sequence the same way."""
    assert run_ranks(rotary_positions, 2) == [[0, 1, 6, 7], [2, 3, 4, 5]]


def rotary_positions() -> list[int]:
    import megatron_rl.patches

    megatron_rl.patches.apply("cpu")
    from megatron.core.models.common.embeddings.rope_utils import get_pos_emb_on_this_cp_rank

    return get_pos_emb_on_this_cp_rank(torch.arange(8), 0, dist.group.WORLD).tolist()


def test_a_length_that_cannot_be_cut() -> None:
    with pytest.raises(ValueError, match=r"lengths that 4 divides, got \[8, 6\]"):
        zigzag_indices(torch.tensor([0, 8, 14]), size=2, rank=0)


def travel() -> tuple[torch.Tensor, torch.Tensor]:
    """A loss that every rank computes a part of: its own tokens of a product with sums over sequences."""
    group, rank, size = dist.group.WORLD, dist.get_rank(), dist.get_world_size()
    mine = zigzag_indices(CU_SEQLENS, size=size, rank=rank)
    local = torch.linspace(-1, 2, 64).double()[mine].requires_grad_()
    sequence = torch.repeat_interleave(torch.arange(4), CU_SEQLENS.diff().long())[mine]
    sums = sum_over_ranks(torch.zeros(4).double().index_add(0, sequence, local), group)
    (local.square() * sums[sequence].sin()).sum().backward()
    return sums.detach(), local.grad


@pytest.mark.parametrize("size", [1, 2, 4])
def test_values_and_gradients_are_those_of_one_rank(size: int) -> None:
    x = torch.linspace(-1, 2, 64).double().requires_grad_()
    sequence = torch.repeat_interleave(torch.arange(4), CU_SEQLENS.diff().long())
    sums = torch.zeros(4).double().index_add(0, sequence, x)
    (x.square() * sums[sequence].sin()).sum().backward()
    for rank, (total, grad) in enumerate(run_ranks(travel, size)):
        torch.testing.assert_close(total, sums.detach(), rtol=1e-12, atol=0)
        torch.testing.assert_close(grad, x.grad[zigzag_indices(CU_SEQLENS, size=size, rank=rank)])

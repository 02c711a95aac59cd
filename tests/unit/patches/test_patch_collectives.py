"""Gather and reduce-scatter of parts of different sizes, each way and back, and one of no rows."""

from __future__ import annotations

import pytest
import torch
import torch.distributed as dist
from megatron.core.tensor_parallel.mappings import (
    gather_from_sequence_parallel_region,
    reduce_scatter_to_sequence_parallel_region,
)

from tests.forked import run_ranks

Lists = list[list[float]]


def gather(sizes: list[int] | None, rows: int) -> tuple[Lists, Lists]:
    """Rank r holds rows of value r, and weights what it gathers by (r + 1) times the row number."""
    rank = dist.get_rank()
    mine = torch.full((rows if sizes is None else sizes[rank], 2), float(rank), requires_grad=True)
    everything = gather_from_sequence_parallel_region(mine, group=dist.group.WORLD, output_split_sizes=sizes)
    (everything * (rank + 1.0) * torch.arange(float(len(everything)))[:, None]).sum().backward()
    return everything.tolist(), mine.grad.tolist()


def reduce_scatter(sizes: list[int] | None) -> tuple[Lists, Lists]:
    """Rank r brings (r + 1) times the row number, and weights its part of the sum by r + 1."""
    rank = dist.get_rank()
    mine = ((rank + 1.0) * torch.arange(4.0)[:, None].expand(4, 2)).clone().requires_grad_()
    part = reduce_scatter_to_sequence_parallel_region(mine, group=dist.group.WORLD, input_split_sizes=sizes)
    (part * (rank + 1.0)).sum().backward()
    return part.tolist(), mine.grad.tolist()


@pytest.mark.parametrize(("sizes", "lengths"), [([1, 3], (1, 3)), ([4, 0], (4, 0)), ([2, 2], (2, 2)), (None, (2, 2))])
def test_gather(sizes: list[int] | None, lengths: tuple[int, int]) -> None:
    everything = [[0.0, 0.0]] * lengths[0] + [[1.0, 1.0]] * lengths[1]
    # The gradient of row i is i times the sum of both ranks' weights, 1 + 2.
    grads = [[3.0 * row, 3.0 * row] for row in range(4)]
    results = run_ranks(gather, 2, sizes, 2)
    assert results == [(everything, grads[: lengths[0]]), (everything, grads[lengths[0] :])]


@pytest.mark.parametrize(("sizes", "first"), [([1, 3], 1), ([0, 4], 0), (None, 2)])
def test_reduce_scatter(sizes: list[int] | None, first: int) -> None:
    sums = [[3.0 * row, 3.0 * row] for row in range(4)]
    grads = [[1.0, 1.0]] * first + [[2.0, 2.0]] * (4 - first)
    assert run_ranks(reduce_scatter, 2, sizes) == [(sums[:first], grads), (sums[first:], grads)]


def test_no_rows_anywhere() -> None:
    assert run_ranks(gather, 2, [0, 0], 0) == [([], []), ([], [])]


def gather_and_reduce(size: int) -> tuple[list[float], list[float], int]:
    """Both collectives of the distributed optimizer, and how often gloo was asked."""
    from megatron.core.distributed import param_and_grad_buffer as buffer

    from patches.megatron_core import upstream

    asked = []
    for name in ("dist_all_gather_func", "dist_reduce_scatter_func"):  # what the patch has put there, around a counter
        patch = getattr(buffer, name)
        original = getattr(patch, upstream._MARK)
        cell = next(cell for cell in patch.__closure__ if cell.cell_contents is original)
        cell.cell_contents = lambda *args, _original=original, **kwargs: (asked.append(1), _original(*args, **kwargs))
    group, mine, whole = dist.group.WORLD, torch.full((2,), dist.get_rank() + 1.0), torch.zeros(2 * size)
    buffer.dist_all_gather_func(whole, mine, group=group, async_op=False)
    part = torch.zeros(2)
    buffer.dist_reduce_scatter_func(part, whole, op=dist.ReduceOp.SUM, group=group, async_op=False)
    return whole.tolist(), part.tolist(), len(asked)


def test_a_single_rank_asks_nobody() -> None:
    assert run_ranks(gather_and_reduce, 1, 1) == [([1.0, 1.0], [1.0, 1.0], 0)]
    whole = [1.0, 1.0, 2.0, 2.0]
    assert run_ranks(gather_and_reduce, 2, 2) == [(whole, [2.0, 2.0], 2), (whole, [4.0, 4.0], 2)]

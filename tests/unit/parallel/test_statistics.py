"""What several ranks find is what one rank with all tokens finds."""

from __future__ import annotations

from itertools import pairwise

import pytest
import torch
import torch.distributed as dist

from megatron_rl.parallel.statistics import Moments, global_moments, kth_largest, top_k_mask
from tests.forked import run_ranks


def tokens(count: int = 4001) -> tuple[torch.Tensor, torch.Tensor]:
    """Values with many ties, both signs, both zeros, and infinities, in an order that ids do not follow."""
    generator = torch.Generator().manual_seed(7)
    values = (torch.randn(count, generator=generator) * 20).round() / 8
    values[:4] = torch.tensor([0.0, -0.0, float("inf"), float("-inf")])
    return values, torch.randperm(count, generator=generator)


def shares(count: int, world_size: int) -> list[slice]:
    """Unequal ones; with several ranks, the first has nothing."""
    borders = [*[0, 0, count // 10, count // 3][:world_size], count]
    return [slice(a, b) for a, b in pairwise(borders)]


def on_rank(ks: list[int]) -> tuple[list[float], list[torch.Tensor], Moments]:
    values, ids = tokens()
    mine = shares(len(values), dist.get_world_size())[dist.get_rank()]
    group = dist.group.WORLD
    return (
        [kth_largest(values[mine], k, group) for k in ks],
        [top_k_mask(values[mine], ids[mine], k, group) for k in ks],
        global_moments(values[mine][values[mine].isfinite()], group),
    )


@pytest.mark.parametrize("world_size", [1, 2, 4])
def test_order_statistics_over_ranks(world_size: int) -> None:
    values, ids = tokens()
    ks = [1, 2, 3, 800, 2000, 4000, 4001]
    # Largest value first; of equal ones the smallest id. -0.0 equals 0.0 here as there.
    order = sorted(range(len(values)), key=lambda i: (-float(values[i]), int(ids[i])))
    results = run_ranks(on_rank, world_size, ks)
    finite = values[values.isfinite()].double()
    for n, k in enumerate(ks):
        assert all(result[0][n] == float(values[order[k - 1]]) for result in results)
        chosen = torch.cat([result[1][n] for result in results])
        assert chosen.nonzero()[:, 0].tolist() == sorted(order[:k])
    for _, _, moments in results:
        assert moments.count == len(finite)
        assert moments.mean == pytest.approx(float(finite.mean()), rel=1e-12)
        assert moments.std == pytest.approx(float(finite.std()), rel=1e-12)


def test_none_is_chosen_for_k_0_and_all_for_k_n() -> None:
    values, ids = tokens(10)
    assert not top_k_mask(values, ids, 0).any() and top_k_mask(values, ids, 10).all()


@pytest.mark.parametrize("k", [0, 11])
def test_k_out_of_range(k: int) -> None:
    with pytest.raises(ValueError, match="from 1 to the number of tokens, 10"):
        kth_largest(tokens(10)[0], k)


def nan_on_the_last_rank() -> str:
    values = torch.tensor([1.0, float("nan") if dist.get_rank() == 1 else 2.0])
    try:
        kth_largest(values, 1, dist.group.WORLD)
    except ValueError as error:
        return str(error)
    return ""


def test_a_nan_is_refused_by_all_ranks() -> None:
    assert run_ranks(nan_on_the_last_rank, 2) == ["a NaN has no place in an order"] * 2


def test_moments_of_next_to_nothing() -> None:
    assert global_moments(torch.zeros(0)) == Moments(0, 0.0, 0.0)
    assert global_moments(torch.tensor([3.0])) == Moments(1, 3.0, 0.0)

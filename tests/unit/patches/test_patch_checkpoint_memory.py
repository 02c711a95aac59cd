"""The gathered optimizer state has upstream's bits, and one rank alone holds it once while it gathers."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from megatron.core.optimizer.distrib_optimizer import DistributedOptimizer
from torch.profiler import ProfilerActivity, profile

from tests.forked import run_ranks
from tests.tiny_gpt import forward_backward, init_parallel, make_config, make_model, make_optimizer, wrap

KEYS = ("param", "exp_avg", "exp_avg_sq")


def trained_optimizer() -> Any:
    config = make_config(num_layers=1)
    init_parallel(config)
    model = wrap(make_model(config), overlap_grad_reduce=True, bucket_size=2000)
    assert len(model.buffers[0].buckets) == 2
    optimizer = make_optimizer(model)
    forward_backward(model, seed=0)
    optimizer.step()
    (distributed,) = optimizer.chained_optimizers
    return distributed


def tensors(state: dict[Any, Any] | None) -> list[torch.Tensor]:
    if state is None:
        return []
    (by_dtype,) = (value for key, value in state.items() if key != "buckets_coalesced")
    (found,) = by_dtype.values()
    return [found[key] for key in KEYS]


def both(**how: bool) -> tuple[int, bool]:
    """How many tensors a rank gets, and whether they are upstream's, bit for bit."""
    optimizer = trained_optimizer()
    upstream = DistributedOptimizer.get_parameter_state_dp_zero.__wrapped__
    ours = tensors(optimizer.get_parameter_state_dp_zero(**how))
    theirs = tensors(upstream(optimizer, **how))
    assert len(ours) == len(theirs)
    assert all(tensor.any() for tensor in ours)
    return len(ours), all(torch.equal(a, b) for a, b in zip(ours, theirs))


@pytest.mark.parametrize(
    ("num_ranks", "how", "num_tensors"),
    [
        (1, {"use_gloo_comm": False, "return_on_all_ranks": True}, [3]),
        (2, {"use_gloo_comm": False, "return_on_all_ranks": True}, [3, 3]),
        (2, {"use_gloo_comm": True, "return_on_all_ranks": False}, [3, 0]),
    ],
)
def test_state_is_upstreams(num_ranks: int, how: dict[str, bool], num_tensors: list[int]) -> None:
    assert run_ranks(both, num_ranks, **how) == [(number, True) for number in num_tensors]


def peak_bytes(work: Callable[[], Any]) -> int:
    """Most bytes that torch held at once for the work, its result included."""
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as profiler:
        result = work()
    held = peak = 0
    for event in profiler.profiler.kineto_results.events():
        if event.name() == "[memory]":
            held += event.nbytes()
            peak = max(peak, held)
    assert result is not None
    return peak


def peaks() -> tuple[int, int, int]:
    optimizer = trained_optimizer()
    how = {"use_gloo_comm": True, "return_on_all_ranks": False}
    upstream = DistributedOptimizer.get_parameter_state_dp_zero.__wrapped__
    size = sum(tensor.nbytes for tensor in tensors(optimizer.get_parameter_state_dp_zero(**how)))
    ours = peak_bytes(lambda: optimizer.get_parameter_state_dp_zero(**how))
    return size, ours, peak_bytes(lambda: upstream(optimizer, **how))


def test_one_rank_holds_the_state_once() -> None:
    [(size, ours, theirs)] = run_ranks(peaks, 1)
    assert size <= ours < 1.1 * size
    assert theirs > 2 * size  # else this patch can go

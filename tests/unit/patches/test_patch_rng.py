"""The tracker's named states live on the CPU generator."""

from __future__ import annotations

import logging

import pytest
import torch
from megatron.core import parallel_state
from megatron.core.tensor_parallel.random import (
    CudaRNGStatesTracker,
    checkpoint,
    get_cuda_rng_tracker,
    model_parallel_cuda_manual_seed,
)

from tests.forked import run_ranks


@pytest.fixture
def tracker() -> CudaRNGStatesTracker:
    tracker = CudaRNGStatesTracker()
    tracker.add("a", 1)
    tracker.add("b", 2)
    return tracker


def test_named_state_goes_on_and_the_default_is_untouched(tracker: CudaRNGStatesTracker) -> None:
    torch.manual_seed(5)
    expected_default = torch.rand(2)
    torch.manual_seed(1)
    expected_a = torch.rand(4)

    torch.manual_seed(5)
    first = torch.rand(1)
    with tracker.fork("a"):
        start = torch.rand(2)
    second = torch.rand(1)
    with tracker.fork("a"):
        rest = torch.rand(2)
    torch.testing.assert_close(torch.cat([first, second]), expected_default, rtol=0, atol=0)
    torch.testing.assert_close(torch.cat([start, rest]), expected_a, rtol=0, atol=0)


def test_forks_nest(tracker: CudaRNGStatesTracker) -> None:
    torch.manual_seed(1)
    expected = torch.rand(2)
    with tracker.fork("a"):
        first = torch.rand(1)
        with tracker.fork("b"):
            torch.rand(3)
        second = torch.rand(1)
    torch.testing.assert_close(torch.cat([first, second]), expected, rtol=0, atol=0)


def test_drawing_inside_a_fork_gives_no_warning(
    tracker: CudaRNGStatesTracker, caplog: pytest.LogCaptureFixture
) -> None:
    with caplog.at_level(logging.WARNING), tracker.fork("a"):
        torch.rand(1)
    assert not caplog.records


def test_error_inside_a_fork_restores_the_state(tracker: CudaRNGStatesTracker) -> None:
    before = torch.get_rng_state()
    with pytest.raises(KeyError), tracker.fork("a"):
        torch.rand(1)
        raise KeyError
    assert torch.equal(torch.get_rng_state(), before)


def test_unknown_state_is_an_error(tracker: CudaRNGStatesTracker) -> None:
    with pytest.raises(RuntimeError, match="c is not added"), tracker.fork("c"):
        pass


def draw() -> tuple[float, float, bool]:
    """Default state, tensor-parallel state, and whether recomputed dropout repeats itself."""
    parallel_state.initialize_model_parallel(2)
    model_parallel_cuda_manual_seed(7)
    shared = torch.rand(1).item()
    with get_cuda_rng_tracker().fork():
        own = torch.rand(1).item()
    weight = torch.ones(64, requires_grad=True)
    output = checkpoint(lambda x: torch.nn.functional.dropout(x, 0.5), False, weight)
    output.sum().backward()
    return shared, own, torch.equal(weight.grad != 0, output != 0)


def test_tensor_ranks_share_the_default_state_only() -> None:
    (shared_0, own_0, repeats_0), (shared_1, own_1, repeats_1) = run_ranks(draw, 2)
    assert shared_0 == shared_1
    assert own_0 != own_1
    assert repeats_0 and repeats_1

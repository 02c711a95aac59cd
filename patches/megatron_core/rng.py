"""Use torch's CPU generator where Megatron-Core switches between states of the CUDA generator.

Why: seeding and every tensor-parallel dropout or initialisation save and set the state of the CUDA generator, which
    does not exist. Its part is played by the one CPU generator, so ``fork`` must not warn, and wait for a comparison of
    two 5 KB states, because "the CPU state has changed": here that is its purpose.
Upstream: ``_get_cuda_rng_state``, ``_set_cuda_rng_state``, ``CudaRNGStatesTracker.add`` and ``.fork``,
    ``model_parallel_cuda_manual_seed`` in megatron/core/tensor_parallel/random.py
Versions: 0.16.1 - 0.19.2 (tested on 0.16.1 and 0.19.2)
Remove when: the tracker is built on ``torch.Generator`` of any device.
Tested by: tests/unit/patches/test_patch_rng.py
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor

from .device import View, cuda_view
from .upstream import replace


def apply() -> None:
    """Point the CUDA generator's functions, as Megatron sees them, to the CPU generator."""
    from megatron.core.tensor_parallel import random

    vars(cuda_view).update(
        get_rng_state=_get_state,
        set_rng_state=_set_state,
        manual_seed=_seed,
        manual_seed_all=_seed,
        random=_random_view(),
    )
    replace(random, "_get_cuda_rng_state", _get_state_of)
    replace(random, "_set_cuda_rng_state", _set_state_of)
    replace(random.CudaRNGStatesTracker, "fork", _fork_of)


def _get_state(device: object = None) -> Tensor:
    return torch.get_rng_state()


def _set_state(new_state: Tensor, device: object = None) -> None:
    torch.set_rng_state(new_state)


def _seed(seed: int) -> None:
    # Not torch.manual_seed, which would also seed the generators of other devices.
    torch.default_generator.manual_seed(int(seed))


def _random_view() -> View:
    view = View(torch.cuda.random)
    vars(view).update(get_rng_state=_get_state, set_rng_state=_set_state)
    return view


def _get_state_of(original: Callable[..., Tensor]) -> Callable[..., Tensor]:
    @functools.wraps(original)
    def get_state(device: object = "cuda", clone: bool = False, graph_safe: bool = False) -> Tensor:
        return torch.get_rng_state()

    return get_state


def _set_state_of(original: Callable[..., None]) -> Callable[..., None]:
    @functools.wraps(original)
    def set_state(new_state: Tensor, device: object = -1, graph_safe: bool = False) -> None:
        torch.set_rng_state(new_state)

    return set_state


def _fork_of(original: Callable[..., Any]) -> Callable[..., Any]:
    from megatron.core.tensor_parallel.random import _MODEL_PARALLEL_RNG_TRACKER_NAME

    @functools.wraps(original)
    @contextmanager
    def fork(self: Any, name: str = _MODEL_PARALLEL_RNG_TRACKER_NAME) -> Iterator[None]:
        """Run the block in the state called ``name``, keep where it got to, and return to the state before."""
        if name not in self.states_:
            raise RuntimeError(f"rng state {name} is not added: call model_parallel_cuda_manual_seed first")
        outer_state, outer_name = torch.get_rng_state(), self._current_state_name
        is_outer_tracked = outer_name != "default-rng"
        if is_outer_tracked:  # forks may nest, even of the same name
            self.states_[outer_name] = outer_state
        torch.set_rng_state(self.states_[name])
        self._current_state_name = name
        try:
            yield
        finally:
            self.states_[name] = torch.get_rng_state()
            torch.set_rng_state(self.states_[outer_name] if is_outer_tracked else outer_state)
            self._current_state_name = outer_name

    return fork

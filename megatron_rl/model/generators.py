"""Random generators of one rank: seeded alike everywhere, and kept as plain data that JSON holds bit for bit."""

from __future__ import annotations

import random
from typing import Any

import numpy
import torch
from megatron.core.tensor_parallel.random import get_cuda_rng_tracker
from torch import Tensor


def seed_generators(seed: int) -> None:
    """Seed torch, numpy and Python the same way on every rank; Megatron seeds its own from this seed and the rank."""
    torch.manual_seed(seed)
    numpy.random.seed(seed % 2**32)
    random.seed(seed)


def generator_states() -> dict[str, Any]:
    """Return the state of every generator: torch's, of each CUDA device, Megatron's, numpy's and Python's."""
    name, keys, position, has_gauss, gauss = numpy.random.get_state(legacy=True)
    return {
        "torch": _as_text(torch.get_rng_state()),
        "cuda": [_as_text(state) for state in torch.cuda.get_rng_state_all()] if torch.cuda.is_available() else [],
        "megatron": {name: _as_text(state) for name, state in get_cuda_rng_tracker().get_states().items()},
        "numpy": [name, numpy.asarray(keys).tolist(), position, has_gauss, gauss],
        "python": random.getstate(),
    }


def restore_generators(states: dict[str, Any]) -> None:
    """Set every generator to what ``generator_states`` returned.

    Raises:
        ValueError, KeyError, TypeError, RuntimeError: these are no such states.
    """
    tracker = get_cuda_rng_tracker()
    kept = dict(tracker.get_states())
    for name, text in states["megatron"].items():
        if isinstance(kept.get(name), torch.Generator):  # a form that CUDA graphs can record
            kept[name].set_state(_as_state(text))
        else:
            kept[name] = _as_state(text)
    tracker.set_states(kept)
    torch.set_rng_state(_as_state(states["torch"]))
    if states["cuda"]:
        torch.cuda.set_rng_state_all([_as_state(text) for text in states["cuda"]])
    name, keys, *rest = states["numpy"]
    numpy.random.set_state((name, numpy.array(keys, dtype=numpy.uint32), *rest))
    version, words, gauss = states["python"]
    random.setstate((version, tuple(words), gauss))


def _as_text(state: Tensor | torch.Generator) -> str:
    state = state.get_state() if isinstance(state, torch.Generator) else state
    return state.cpu().numpy().tobytes().hex()


def _as_state(text: str) -> Tensor:
    return torch.frombuffer(bytearray.fromhex(text), dtype=torch.uint8)

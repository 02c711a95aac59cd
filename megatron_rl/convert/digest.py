"""A 64-bit digest of a tensor's bits that does not depend on how the tensor is cut, stored or ordered in time.

Element (i, j) of tensor ``name`` counts ``bits * A[name, i] * B[j]``, and the digest is the sum mod 2^64: blocks add up, so
ranks that hold any cut of a tensor sum their digests to that of the whole. A and B are odd pseudo-random numbers, hence

- one changed element always changes the digest: its bits differ by less than 2^64, times an odd number;
- swapped rows, columns, tensors or halves do so but for a chance of about 2^-32 or less.

Not a cryptographic hash: it finds errors, not attackers.
"""

from __future__ import annotations

import hashlib
from functools import lru_cache

import numpy
import torch
from torch import Tensor

MASK = 2**64 - 1

_INTEGERS = {1: torch.int8, 2: torch.int16, 4: torch.int32, 8: torch.int64}
_BLOCK_ELEMENTS = 2**17
"""Widened at a time: what fits a core's cache."""
_GPU_BLOCK_ELEMENTS = 2**24


def digest(name: str, block: Tensor, start: tuple[int, ...], extent: tuple[int, ...]) -> int:
    """Digest of one rectangle of a tensor; those of a tensor's rectangles sum, mod 2^64, to that of the tensor.

    Args:
        name: of the whole tensor; equal tensors of different names have different digests.
        block: of one or two dimensions, any dtype, device and strides; NaN payloads and signs of zero count.
        start: where in the tensor it lies.
        extent: shape of the whole tensor.

    Returns:
        In [0, 2^64).
    """
    assert block.dim() == len(start) == len(extent) in (1, 2), f"{name}: {tuple(block.shape)} at {start} of {extent}"
    assert all(a + n <= d for a, n, d in zip(start, block.shape, extent)), f"{name}: {start} + {tuple(block.shape)}"
    bits = block.detach().view(_INTEGERS[block.element_size()])
    if bits.dim() == 1:
        bits, start, extent = bits[None], (0, *start), (1, *extent)
    rows = _weights(f"rows of {name}", extent[0], bits.device)[start[0] : start[0] + bits.shape[0]]
    columns = _weights("columns", extent[1], bits.device)[start[1] : start[1] + bits.shape[1]]
    limit = _BLOCK_ELEMENTS if bits.device.type == "cpu" else _GPU_BLOCK_ELEMENTS
    step = max(1, limit // max(1, bits.shape[1]))
    total = torch.zeros((), dtype=torch.int64, device=bits.device)
    for first in range(0, bits.shape[0], step):
        sums = bits[first : first + step].to(torch.int64).mul_(columns).sum(1)  # int64 arithmetic wraps: mod 2^64
        total += (sums * rows[first : first + step]).sum()
    return int(total) & MASK


def as_text(value: int) -> str:
    """16 hexadecimal digits."""
    return f"{value:016x}"


@lru_cache(maxsize=64)
def _weights(stream: str, count: int, device: torch.device) -> Tensor:
    """[count] odd int64 numbers that follow from the stream's name: splitmix64 of a counter."""
    seed = int.from_bytes(hashlib.blake2b(stream.encode(), digest_size=8).digest(), "little")
    with numpy.errstate(over="ignore"):
        value = (numpy.arange(1, count + 1, dtype=numpy.uint64) + numpy.uint64(seed)) * numpy.uint64(0x9E3779B97F4A7C15)
        value = (value ^ (value >> numpy.uint64(30))) * numpy.uint64(0xBF58476D1CE4E5B9)
        value = (value ^ (value >> numpy.uint64(27))) * numpy.uint64(0x94D049BB133111EB)
        value = (value ^ (value >> numpy.uint64(31))) | numpy.uint64(1)
    return torch.from_numpy(value.view(numpy.int64)).to(device)

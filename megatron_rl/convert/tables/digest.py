"""A 64-bit digest of a tensor's bits that does not depend on how the tensor is cut, stored or ordered in time.

Eight bytes of a row make a word, and word (i, w) of tensor ``name`` counts ``word * A[name, i] * B[w]``; the digest is the sum
mod 2^64. A and B are odd pseudo-random numbers. The sum is linear in each element (an element is its bits times a power of
two within its word), so blocks add up: ranks that hold any cut of a tensor sum their digests to that of the whole. And

- one changed element always changes the digest: a word changes by less than 2^64, and that times an odd number;
- swapped rows, columns, tensors or halves do so but for a chance of about 2^-32 or less.

Not a cryptographic hash: it finds errors, not attackers.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterable
from functools import lru_cache

import numpy
import torch
from torch import Tensor

MASK = 2**64 - 1

_INTEGERS = {1: torch.int8, 2: torch.int16, 4: torch.int32, 8: torch.int64}
_WORD_BYTES = 8
_BLOCK_WORDS = 2**18
"""Number handled at a time: it fits a core's cache."""
_GPU_BLOCK_WORDS = 2**24


def digest(name: str, block: Tensor, start: tuple[int, ...], extent: tuple[int, ...]) -> int:
    """Return the digest of one rectangle of a tensor; those of its rectangles sum, mod 2^64, to that of the tensor.

    Args:
        name: of the whole tensor; equal tensors of different names have different digests.
        block: of one or two dimensions, any dtype, device and strides; NaN payloads and signs of zero count.
        start: where in the tensor it lies.
        extent: shape of the whole tensor.

    Returns:
        In [0, 2^64).
    """
    return int(digest_on_device(name, block, start, extent)) & MASK


def digest_on_device(name: str, block: Tensor, start: tuple[int, ...], extent: tuple[int, ...]) -> Tensor:
    """Return ``digest`` as a number that a GPU need not be waited for: [] int64 on the block's device, mod 2^64."""
    assert block.dim() == len(start) == len(extent) in (1, 2), f"{name}: {tuple(block.shape)} at {start} of {extent}"
    assert all(a + n <= d for a, n, d in zip(start, block.shape, extent)), f"{name}: {start} + {tuple(block.shape)}"
    block = block.detach()
    if block.dim() == 1:
        block, start, extent = block[None], (0, *start), (1, *extent)
    per_word = _WORD_BYTES // block.element_size()
    rows = _weights(f"rows of {name}", extent[0], block.device)[start[0] : start[0] + block.shape[0]]
    columns = _weights("columns", -(-extent[1] // per_word), block.device)
    # Whole words in the middle, elements at the edges.
    left = min(-start[1] % per_word, block.shape[1])
    right = left + (block.shape[1] - left) // per_word * per_word
    total = _sum_of_elements(block[:, :left], start[1], rows, columns)
    total = total + _sum_of_elements(block[:, right:], start[1] + right, rows, columns)
    if right > left:
        first = (start[1] + left) // per_word
        total = total + _sum_of_words(block[:, left:right], rows, columns[first : first + (right - left) // per_word])
    return total


def digests_of(blocks: Iterable[Tensor]) -> list[int]:
    """Return results of ``digest_on_device`` as digests, with one wait for all of them."""
    found = list(blocks)
    return [value & MASK for value in torch.stack(found).tolist()] if found else []


def _sum_of_words(block: Tensor, rows: Tensor, columns: Tensor) -> Tensor:
    """Sum over [n, words * elements per word]; int64 arithmetic wraps, which is mod 2^64."""
    limit = _BLOCK_WORDS if block.device.type == "cpu" else _GPU_BLOCK_WORDS
    step = max(1, limit // len(columns))
    total = torch.zeros((), dtype=torch.int64, device=block.device)
    for first in range(0, block.shape[0], step):
        words = _as_words(block[first : first + step])
        # CUDA has no product of an integer matrix and a vector.
        sums = torch.mv(words, columns) if words.device.type == "cpu" else (words * columns).sum(1)
        total += (sums * rows[first : first + step]).sum()
    return total


def _sum_of_elements(block: Tensor, start: int, rows: Tensor, columns: Tensor) -> Tensor:
    """Sum over any columns, given the first one's place in its row."""
    if block.shape[1] == 0:
        return torch.zeros((), dtype=torch.int64, device=block.device)
    size = block.element_size()
    places = torch.arange(start, start + block.shape[1], device=block.device)
    words, shifts = places // (_WORD_BYTES // size), places % (_WORD_BYTES // size) * (8 * size)
    bits = block.contiguous().view(_INTEGERS[size]).to(torch.int64)
    if size < _WORD_BYTES:
        bits &= (1 << 8 * size) - 1
    return ((bits * (columns[words] << shifts)).sum(1) * rows).sum()


def _as_words(block: Tensor) -> Tensor:
    """Return [n, words] int64, copied only if memory is not in whole words."""
    size = block.element_size()
    in_place = block.stride(1) == 1 and block.data_ptr() % _WORD_BYTES == 0
    in_place &= block.storage_offset() * size % _WORD_BYTES == 0 and block.stride(0) * size % _WORD_BYTES == 0
    return (block if in_place else block.clone(memory_format=torch.contiguous_format)).view(torch.int64)


def as_text(value: int) -> str:
    """Return 16 hexadecimal digits."""
    return f"{value:016x}"


@lru_cache(maxsize=64)
def _weights(stream: str, count: int, device: torch.device) -> Tensor:
    """Return [count] odd int64 numbers that follow from the stream's name: splitmix64 of a counter."""
    seed = int.from_bytes(hashlib.blake2b(stream.encode(), digest_size=8).digest(), "little")
    with numpy.errstate(over="ignore"):
        value = (numpy.arange(1, count + 1, dtype=numpy.uint64) + numpy.uint64(seed)) * numpy.uint64(0x9E3779B97F4A7C15)
        value = (value ^ (value >> numpy.uint64(30))) * numpy.uint64(0xBF58476D1CE4E5B9)
        value = (value ^ (value >> numpy.uint64(27))) * numpy.uint64(0x94D049BB133111EB)
        value = (value ^ (value >> numpy.uint64(31))) | numpy.uint64(1)
    return torch.from_numpy(value.view(numpy.int64)).to(device)

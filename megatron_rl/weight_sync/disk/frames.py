"""Frames: the difference of two versions of some bits, in few bytes.

A frame is up to 2^21 elements. It stores of their exclusive or

    few changed     the gaps between the changed places, then the changed values
    many changed    all values

each with its bytes regrouped by significance (the lowest of all elements, then the next, ...), then compressed by zstd.
After a step of lr 1e-6 about 1 % of bfloat16 weights change, by their last bit, so the gaps are most of what is stored.
"""

from __future__ import annotations

import zlib
from concurrent.futures import Executor
from typing import NamedTuple

import numpy as np
import torch
import zstandard
from numpy.typing import NDArray
from torch import Tensor

from megatron_rl.convert.tables.digest import MASK, as_text, digest

FRAME_ELEMENTS = 2**21
LEVEL = 1
"""Level of zstd; 3 and 9 are slower and hardly smaller (docs/weights.md)."""

Bits = NDArray[np.unsignedinteger]

_TORCH = {1: torch.uint8, 2: torch.int16, 4: torch.int32}
UNSIGNED = {1: np.uint8, 2: np.uint16, 4: np.uint32}
_GAP = np.dtype(np.uint32)


class Damaged(ValueError):
    """A frame that differs from what was written."""


class Frame(NamedTuple):
    """A frame's entry in the manifest."""

    size: int
    """Size in bytes."""
    changed: int
    """Number of changed elements."""
    checksum: int
    """crc32 of its bytes; zstd's own checksum would not cover its headers."""


def bits_of(tensor: Tensor) -> Bits:
    """Return [number of elements] unsigned integers of the elements' width; a contiguous CPU tensor shares their memory."""
    flat = tensor.detach().to("cpu").contiguous().reshape(-1)
    return flat.view(_TORCH[flat.itemsize]).numpy().view(UNSIGNED[flat.itemsize])


def tensor_of(bits: Bits, dtype: torch.dtype, shape: tuple[int, ...]) -> Tensor:
    """Return a tensor that shares the memory of these bits."""
    return torch.from_numpy(bits.view(np.uint8)).view(dtype).reshape(shape)


def tensor_digest(name: str, tensor: Tensor, pool: Executor) -> str:
    """Return a tensor's digest in hexadecimal; dimensions after the first count as one, a scalar as [1].

    Args:
        name: of the tensor.
        tensor: contiguous, on the CPU.
        pool: its threads divide the rows between them.
    """
    if tensor.dim() not in (1, 2):
        tensor = tensor.reshape(tensor.shape[0], -1) if tensor.dim() else tensor.reshape(1)
    extent, corner = tuple(tensor.shape), (0,) * (tensor.dim() - 1)
    step = max(1, FRAME_ELEMENTS * extent[0] // max(1, tensor.numel()))
    starts = range(0, extent[0], step)
    parts = pool.map(lambda row: digest(name, tensor[row : row + step], (row, *corner), extent), starts)
    return as_text(sum(parts) & MASK)


def encode(new: Bits, old: Bits) -> tuple[bytes, Frame]:
    """Return the frame that turns ``old`` into ``new``; no bytes if nothing differs."""
    difference = np.bitwise_xor(new, old)
    is_changed = difference != 0
    changed = int(np.count_nonzero(is_changed))
    if changed == 0:
        return b"", Frame(0, 0, 0)
    if _is_sparse(changed, len(new)):
        places = np.flatnonzero(is_changed)  # five times as fast as on the numbers themselves
        content = _planes(np.diff(places, prepend=0).astype(_GAP)) + _planes(difference[places])
    else:
        content = _planes(difference)
    data = zstandard.ZstdCompressor(level=LEVEL).compress(content)
    return data, Frame(len(data), changed, zlib.crc32(data))


def decode_onto(data: bytes | bytearray, frame: Frame, bits: Bits) -> None:
    """Turn old bits into new ones, in place; the same again turns them back.

    Raises:
        Damaged: the bytes are not those that were written; ``bits`` are unchanged then.
    """
    if frame.changed == 0:
        return
    if zlib.crc32(data) != frame.checksum:
        raise Damaged("checksum")
    is_sparse = _is_sparse(frame.changed, len(bits))
    num_bytes = frame.changed * (_GAP.itemsize + bits.itemsize) if is_sparse else bits.nbytes
    content = np.frombuffer(_decompressed(data, num_bytes), np.uint8)
    if is_sparse:
        split = frame.changed * _GAP.itemsize
        places = np.cumsum(_values(content[:split], _GAP), dtype=np.int64)
        if places[-1] >= len(bits):
            raise Damaged("places")
        bits[places] ^= _values(content[split:], bits.dtype)
    else:
        np.bitwise_xor(bits, _values(content, bits.dtype), out=bits)


def _decompressed(data: bytes | bytearray, num_bytes: int) -> bytes:
    """Decompress what is known to become so many bytes; a frame that says otherwise could fill the memory."""
    try:
        if zstandard.frame_content_size(data) != num_bytes:
            raise Damaged("size")
        return zstandard.ZstdDecompressor().decompress(data)
    except zstandard.ZstdError as error:
        raise Damaged(str(error)) from error


def _is_sparse(changed: int, total: int) -> bool:
    return changed * 8 < total


def _planes(values: Bits) -> bytes:
    return values.view(np.uint8).reshape(-1, values.itemsize).T.tobytes()


def _values(planes: NDArray[np.uint8], dtype: np.dtype[np.unsignedinteger]) -> Bits:
    return np.ascontiguousarray(planes.reshape(dtype.itemsize, -1).T).reshape(-1).view(dtype)

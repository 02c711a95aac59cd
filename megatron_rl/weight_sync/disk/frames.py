"""What changed between two versions of some bits, in few bytes.

A frame is up to 2^21 elements. Of their exclusive or,

    few changed     the gaps between the changed places, then the changed values
    many changed    all values

each with its bytes regrouped by significance (the lowest of all elements, then the next, ...), then compressed by zstd with a
checksum. After a step of lr 1e-6 about 1 % of bfloat16 weights change, by their last bit: nothing but gaps is left to store.
"""

from __future__ import annotations

import numpy as np
import torch
import zstandard
from numpy.typing import NDArray
from torch import Tensor

from megatron_rl.convert.digest import as_text, digest

FRAME_ELEMENTS = 2**21
LEVEL = 1
"""Of zstd; 3 and 9 are slower and hardly smaller (docs/weights.md)."""

Bits = NDArray[np.unsignedinteger]

_TORCH = {1: torch.uint8, 2: torch.int16, 4: torch.int32}
UNSIGNED = {1: np.uint8, 2: np.uint16, 4: np.uint32}
_GAP = np.dtype(np.uint32)


class Damaged(ValueError):
    """A frame is not what was written."""


def bits_of(tensor: Tensor) -> Bits:
    """[number of elements] unsigned integers of the elements' width, in memory that a contiguous CPU tensor shares."""
    flat = tensor.detach().to("cpu").contiguous().reshape(-1)
    return flat.view(_TORCH[flat.itemsize]).numpy().view(UNSIGNED[flat.itemsize])


def tensor_of(bits: Bits, dtype: torch.dtype, shape: tuple[int, ...]) -> Tensor:
    """The inverse, in shared memory."""
    return torch.from_numpy(bits.view(np.uint8)).view(dtype).reshape(shape)


def tensor_digest(name: str, tensor: Tensor) -> str:
    """In hexadecimal; of more than two dimensions those behind the first count as one, of none as [1]."""
    if tensor.dim() not in (1, 2):
        tensor = tensor.reshape(tensor.shape[0], -1) if tensor.dim() else tensor.reshape(1)
    return as_text(digest(name, tensor, (0,) * tensor.dim(), tuple(tensor.shape)))


def encode(new: Bits, old: Bits) -> tuple[bytes, int]:
    """The frame that turns ``old`` into ``new``, and how many elements differ. No bytes where none does."""
    difference = np.bitwise_xor(new, old)
    places = np.flatnonzero(difference)
    changed = len(places)
    if changed == 0:
        return b"", 0
    if _is_sparse(changed, len(new)):
        content = _planes(np.diff(places, prepend=0).astype(_GAP)) + _planes(difference[places])
    else:
        content = _planes(difference)
    return zstandard.ZstdCompressor(level=LEVEL, write_checksum=True).compress(content), changed


def decode_onto(frame: bytes | bytearray, changed: int, bits: Bits) -> None:
    """Turn old bits into new ones, in place; the same again turns them back.

    Raises:
        Damaged: the frame is not one for these bits; they may have changed then.
    """
    if changed == 0:
        if frame:
            raise Damaged("bytes where nothing changed")
        return
    width, is_sparse = bits.itemsize, _is_sparse(changed, len(bits))
    size = changed * (_GAP.itemsize + width) if is_sparse else len(bits) * width
    try:
        # Before anything is allocated: a damaged header may promise any size.
        if zstandard.frame_content_size(frame) != size:
            raise Damaged("another size than the manifest says")
        content = np.frombuffer(zstandard.ZstdDecompressor().decompress(frame), np.uint8)
    except zstandard.ZstdError as error:
        raise Damaged(str(error)) from error
    if not is_sparse:
        np.bitwise_xor(bits, _values(content, bits.dtype), out=bits)
        return
    split = changed * _GAP.itemsize
    places = np.cumsum(_values(content[:split], _GAP), dtype=np.int64)
    if places[-1] >= len(bits):
        raise Damaged("places beyond the end")
    bits[places] ^= _values(content[split:], bits.dtype)


def _is_sparse(changed: int, total: int) -> bool:
    return changed * 8 < total


def _planes(values: Bits) -> bytes:
    return values.view(np.uint8).reshape(-1, values.itemsize).T.tobytes()


def _values(planes: NDArray[np.uint8], dtype: np.dtype[np.unsignedinteger]) -> Bits:
    return np.ascontiguousarray(planes.reshape(dtype.itemsize, -1).T).reshape(-1).view(dtype)

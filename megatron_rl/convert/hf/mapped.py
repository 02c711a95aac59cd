"""Files mapped into memory: tensors that are views of a file, read when touched, never held.

The mapping is private and copy-on-write, which torch takes for writable memory; nobody writes to it, so its pages stay those
of the file and count as no memory of the process.
"""

from __future__ import annotations

import json
import mmap
from collections.abc import Iterator
from math import prod
from pathlib import Path
from typing import get_args

import torch
from torch import Tensor

from megatron_rl.convert.architecture.shape import Dtype
from megatron_rl.convert.hf.reader import HFReader
from megatron_rl.convert.tables.kinds import Extent

BLOCK_BYTES = 2**22
"""Size of the part of a tensor handled at a time: small enough for a core's cache, large enough for the disk."""

_DTYPES = {"F32": torch.float32, "BF16": torch.bfloat16, "F16": torch.float16}
_NAMES: dict[str, torch.dtype] = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}


def dtype_of(name: str) -> torch.dtype:
    """Turn ``"bfloat16"`` into ``torch.bfloat16``; KeyError for any but the three types of weights."""
    return _NAMES[name]


def dtype_name(dtype: torch.dtype) -> Dtype:
    """Turn ``torch.bfloat16`` into ``"bfloat16"``."""
    return next(name for name in get_args(Dtype) if _NAMES[name] == dtype)


class MappedFile:
    """One file, readable at any offset."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self.num_bytes = path.stat().st_size
        with path.open("rb") as file:
            self.memory = mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_COPY) if self.num_bytes else b""

    def bytes(self, offset: int, num_bytes: int) -> Tensor:
        """Return a view of the file, [num_bytes] uint8.

        Raises:
            ValueError: the file ends before.
        """
        if offset < 0 or offset + num_bytes > self.num_bytes:
            raise ValueError(f"bytes {offset} to {offset + num_bytes} of {self.num_bytes}")
        if num_bytes == 0:
            return torch.empty(0, dtype=torch.uint8)
        return torch.frombuffer(self.memory, dtype=torch.uint8, count=num_bytes, offset=offset)

    def announce(self, offset: int, num_bytes: int) -> None:
        """Ask the system to start reading these bytes: a mapping alone is read ahead badly."""
        if isinstance(self.memory, mmap.mmap):
            first = offset // mmap.PAGESIZE * mmap.PAGESIZE
            self.memory.madvise(mmap.MADV_WILLNEED, first, min(num_bytes + offset, self.num_bytes) - first)


def as_dtype(raw: Tensor, dtype: torch.dtype, extent: Extent) -> Tensor:
    """Return uint8 bytes as a tensor: a view if the address allows it, else a copy."""
    if not raw.is_contiguous() or raw.data_ptr() % dtype.itemsize or raw.storage_offset() % dtype.itemsize:
        raw = raw.contiguous().clone()
    return raw.reshape(-1).view(dtype).reshape(extent)


def row_blocks(extent: Extent, itemsize: int, limit: int = BLOCK_BYTES) -> Iterator[tuple[int, int]]:
    """Yield (first, last + 1) rows of blocks of at most ``limit`` bytes, or of one row if a row is larger."""
    step = max(1, limit // max(1, prod(extent[1:]) * itemsize))
    for first in range(0, extent[0], step):
        yield first, min(first + step, extent[0])


class MappedHF:
    """The tensors of a Hugging Face checkpoint that ``HFReader`` has found sound, as views of their files."""

    def __init__(self, reader: HFReader) -> None:
        self._places: dict[str, tuple[MappedFile, int, torch.dtype, Extent]] = {}
        # torch has mapped the files that it wrote.
        self._tensors = {
            name: tensor for name, tensor in reader.torch_tensors.items() if tensor.dtype in _NAMES.values()
        }
        for path in () if reader.torch_tensors else reader.files:
            mapped = MappedFile(path)
            length = int.from_bytes(bytes(mapped.bytes(0, 8).tolist()), "little")
            header = json.loads(bytes(mapped.bytes(8, length).numpy().data))
            for name, field in header.items():
                if name != "__metadata__" and field["dtype"] in _DTYPES:
                    start = 8 + length + field["data_offsets"][0]
                    self._places[name] = (mapped, start, _DTYPES[field["dtype"]], tuple(field["shape"]))

    def __contains__(self, name: str) -> bool:
        """Say whether the tensor can be used as it is stored; 8-bit weights cannot."""
        return name in self._places or name in self._tensors

    def dtype(self, name: str) -> torch.dtype:
        """Return the stored type."""
        if name in self._tensors:
            return self._tensors[name].dtype
        return self._places[name][2]

    def rows(self, name: str, first: int, last: int) -> Tensor:
        """Return rows [first, last) of a tensor, with all its other dimensions: a view of the file."""
        if name in self._tensors:
            return self._tensors[name][first:last].contiguous()
        mapped, offset, dtype, extent = self._places[name]
        row_bytes = prod(extent[1:]) * dtype.itemsize
        raw = mapped.bytes(offset + first * row_bytes, (last - first) * row_bytes)
        return as_dtype(raw, dtype, (last - first, *extent[1:]))

    def announce(self, name: str, first: int, last: int) -> None:
        """Ask the system to start reading these rows."""
        if name in self._tensors:
            return
        mapped, offset, dtype, extent = self._places[name]
        row_bytes = prod(extent[1:]) * dtype.itemsize
        mapped.announce(offset + first * row_bytes, (last - first) * row_bytes)

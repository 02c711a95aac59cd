"""Buckets of whole tensors: a header that says what follows, then the tensors; the last bucket of a transfer is empty.

8 bytes           length of the header's text
header            JSON: [name, dtype, shape, first byte] of each tensor
from HEADER on    the tensors, each at a multiple of ``ALIGNMENT``
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Sequence

import torch
from torch import Tensor

HEADER = 2**20
ALIGNMENT = 32
_MOST_TENSORS = 2000
"""Tensors of a bucket: their names and shapes fit the header."""


class Packer:
    """A bucket that is being filled, in one buffer or several at once."""

    def __init__(self, runs: Sequence[Tensor]) -> None:
        """Args: the buffers, [n] uint8 of equal length."""
        self._runs, self._entries, self._end = runs, list[list[object]](), HEADER

    def has_room(self, tensor: Tensor) -> bool:
        """Return whether a tensor fits."""
        return self._end + tensor.nbytes <= len(self._runs[0]) and len(self._entries) < _MOST_TENSORS

    def add(self, name: str, tensor: Tensor) -> None:
        """Copy a tensor into the bucket."""
        self._entries.append([name, str(tensor.dtype).removeprefix("torch."), list(tensor.shape), self._end])
        for run in self._runs:
            _view(run, tensor.dtype, tensor.shape, self._end).copy_(tensor)
        self._end += -(-tensor.nbytes // ALIGNMENT) * ALIGNMENT

    def close(self) -> None:
        """Write the header."""
        text = json.dumps(self._entries).encode()
        assert 8 + len(text) <= HEADER, f"a header of {len(text)} bytes"
        header = torch.frombuffer(bytearray(len(text).to_bytes(8, "little") + text), dtype=torch.uint8)
        for run in self._runs:
            run[: len(header)].copy_(header)


def unpack(run: Tensor) -> Iterator[tuple[str, Tensor]]:
    """Yield (name, view of the tensor) of a bucket, [n] uint8."""
    size = int.from_bytes(bytes(run[:8].tolist()), "little")
    for name, dtype, shape, start in json.loads(run[8 : 8 + size].cpu().numpy().tobytes()):
        yield name, _view(run, getattr(torch, dtype), torch.Size(shape), start)


def _view(run: Tensor, dtype: torch.dtype, shape: torch.Size, start: int) -> Tensor:
    return run[start : start + shape.numel() * dtype.itemsize].view(dtype).view(shape)

"""Memory that processes of one machine share, and counters by which a writer and its readers take turns.

    writer      until all readers are done with bucket k - 2: wait -> fill buffer k % 2 -> published = k + 1
    reader      until published > k: wait                          -> copy              -> done[reader] = k + 1

On a CPU a buffer is memory that both map; on a GPU the readers open the writer's memory by a CUDA IPC handle, also on another
GPU. Counters are mapped memory in either case. Mapped memory has no name in any folder (``memfd_create``): readers of the same
user reach it through the writer's entry in ``/proc``. So ``/dev/shm`` may be small, and nothing is left when all are gone.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Mapping, Sequence
from io import FileIO
from typing import Any

import torch
from torch import Tensor
from torch.multiprocessing.reductions import rebuild_cuda_tensor, reduce_tensor

NUM_BUFFERS = 2
"""One is filled while the other is read."""


class BufferPool:
    """Buffers of buckets. On a CPU they are kept for the next update: fresh memory costs as much as a copy into it.

    A GPU's are not: torch keeps them, and gives the room to training.
    """

    def __init__(self, device: torch.device) -> None:
        """Args: the device of the buffers."""
        self.device = device
        self._kept: dict[tuple[str, int], list[tuple[Tensor, FileIO | None]]] = {}

    def plain(self, number: int, num_bytes: int) -> list[Tensor]:
        """Return the ``NUM_BUFFERS`` buffers of the stream with this number, [``num_bytes``] uint8."""
        if self.device.type != "cpu":
            return [torch.empty(num_bytes, dtype=torch.uint8, device=self.device) for _ in range(NUM_BUFFERS)]
        pairs = self._find("plain", number, num_bytes, lambda: (torch.empty(num_bytes, dtype=torch.uint8), None))
        return [buffer[:num_bytes] for buffer, _ in pairs]

    def shared(self, number: int, num_bytes: int) -> tuple[list[Tensor], list[str | dict[str, Any]]]:
        """Return buffers that other processes can open, of at least so many bytes, and what those need for it."""
        if self.device.type != "cpu":
            buffers = self.plain(number, num_bytes)
            return buffers, [to_plain(reduce_tensor(buffer)[1]) for buffer in buffers]

        def make() -> tuple[Tensor, FileIO]:
            file = _new_memory(num_bytes)
            return _map(_path(file), num_bytes, torch.uint8), file

        pairs = self._find("shared", number, num_bytes, make)
        return [buffer for buffer, _ in pairs], [_path(file) for _, file in pairs if file is not None]

    def _find(
        self, kind: str, number: int, num_bytes: int, make: Callable[[], tuple[Tensor, FileIO | None]]
    ) -> list[tuple[Tensor, FileIO | None]]:
        kept = self._kept.get((kind, number), [])
        if not kept or len(kept[0][0]) < num_bytes:
            self._kept[kind, number] = kept = [make() for _ in range(NUM_BUFFERS)]
        return kept


class BucketWriter:
    """The end that hands buckets on."""

    def __init__(self, num_readers: int, num_bytes: int, pool: BufferPool, *, number: int = 0) -> None:
        """Take the buffers.

        Args:
            num_readers: processes that read every bucket, or pass over it.
            num_bytes: of the largest bucket.
            pool: has the buffers.
            number: of the stream, for the pool.
        """
        self._file = _new_memory(8 * (1 + num_readers))
        self._counters = _map(_path(self._file), 1 + num_readers, torch.int64)
        self.buffers, self._ways = pool.shared(number, num_bytes)
        self._pool = pool

    def handle(self) -> dict[str, Any]:
        """Return what a ``BucketReader`` needs, as JSON."""
        return {
            "counters": _path(self._file),
            "num_readers": len(self._counters) - 1,
            "num_bytes": len(self.buffers[0]),
            "buffers": self._ways,
        }

    def is_free(self, number: int, readers: Sequence[int]) -> bool:
        """Return whether these readers are done with what the buffer of a bucket held before."""
        return all(int(self._counters[1 + reader]) > number - NUM_BUFFERS for reader in readers)

    def buffer(self, number: int) -> Tensor:
        """Return the buffer of a bucket, to be filled once it is free."""
        return self.buffers[number % NUM_BUFFERS]

    def publish(self, number: int) -> None:
        """Let readers have the bucket that has been written into its buffer."""
        if self._pool.device.type != "cpu":
            torch.cuda.current_stream(self._pool.device).synchronize()  # what fills it has finished
        self._counters[0] = number + 1


class BucketReader:
    """The end that copies buckets."""

    def __init__(self, handle: Mapping[str, Any], number: int) -> None:
        """Args: what ``BucketWriter.handle`` returned, and this reader's number there."""
        self._number, self._counters = number, _map(handle["counters"], 1 + handle["num_readers"], torch.int64)
        self._buffers = [
            _map(buffer, handle["num_bytes"], torch.uint8)
            if isinstance(buffer, str)
            else rebuild_cuda_tensor(*from_plain(buffer))
            for buffer in handle["buffers"]
        ]

    def is_there(self, number: int) -> bool:
        """Return whether a bucket has been published."""
        return int(self._counters[0]) > number

    def buffer(self, number: int) -> Tensor:
        """Return the buffer that holds a bucket until ``done``."""
        return self._buffers[number % NUM_BUFFERS]

    def done(self, number: int) -> None:
        """Give the buffer of a bucket back."""
        if self._buffers[0].device.type != "cpu":
            torch.cuda.current_stream(self._buffers[0].device).synchronize()  # the copy has finished
        self._counters[1 + self._number] = number + 1


def _new_memory(num_bytes: int) -> FileIO:
    """Return memory that other processes can map while this file is open; it closes when nobody needs it."""
    file = FileIO(os.memfd_create("megatron_rl_weights"), "r+")
    os.posix_fallocate(file.fileno(), 0, max(1, num_bytes))  # where memory is short, an error here and no signal later
    return file


def _path(file: FileIO) -> str:
    return f"/proc/{os.getpid()}/fd/{file.fileno()}"


def _map(path: str, size: int, dtype: torch.dtype) -> Tensor:
    return torch.from_file(path, shared=True, size=size, dtype=dtype)


def to_plain(arguments: Sequence[Any]) -> dict[str, Any]:
    """Return the arguments of torch's ``rebuild_cuda_tensor`` as JSON; ``from_plain`` returns them."""
    _, size, stride, offset, _, dtype, *place = arguments
    return {
        "size": list(size),
        "stride": list(stride),
        "offset": offset,
        "dtype": str(dtype).removeprefix("torch."),
        "place": [{"hex": part.hex()} if isinstance(part, bytes) else part for part in place],
    }


def from_plain(handle: Mapping[str, Any]) -> list[Any]:
    """Return the arguments of torch's ``rebuild_cuda_tensor``."""
    place = [bytes.fromhex(part["hex"]) if isinstance(part, dict) else part for part in handle["place"]]
    shape = (torch.Size(handle["size"]), tuple(handle["stride"]), handle["offset"])
    return [Tensor, *shape, torch.storage.TypedStorage, getattr(torch, handle["dtype"]), *place]

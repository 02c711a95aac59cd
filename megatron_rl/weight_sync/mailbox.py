"""Messages between processes of one machine without a process group, for servers on the trainer's own GPUs.

NCCL refuses two members on one GPU. Here the sender puts a handle of the data into the store (on a GPU a CUDA IPC handle of
the memory itself, parameters included; on a CPU a file in shared memory). The receiver copies the data and acknowledges it;
only then may the sender change it.

    sender      handle  -> NAME/sender/receiver/tag        wait for NAME/sender/receiver/tag/done
    receiver    NAME/sender/receiver/tag -> copy           -> NAME/sender/receiver/tag/done

Every process sees all GPUs under the same numbers: ``base_gpu_id`` tells a server which to use.
"""

from __future__ import annotations

import json
import os
import tempfile
import time
import uuid
import weakref
from collections.abc import Callable, Mapping, Sequence
from datetime import timedelta
from pathlib import Path
from typing import Any

import numpy
import torch
import torch.distributed as dist
from torch import Tensor
from torch.multiprocessing.reductions import rebuild_cuda_tensor, reduce_tensor

BROKEN = "broken"
"""Key that is set when a member has died."""
_LOOK_S = 0.0005
_SHARED_MEMORY = Path("/dev/shm")


class Mailbox:
    """A ``receiver.Channel`` with the ``send`` and ``recv`` of a process group."""

    def __init__(self, store: dist.Store, rank: int, timeout_s: float) -> None:
        """Args:
        store: shared by all members, under a prefix of their own.
        rank: of this member.
        timeout_s: limit of a wait for another member.
        """
        self._store, self._rank, self._timeout = store, rank, timedelta(seconds=timeout_s)
        self._counts: dict[tuple[int, int, int], int] = {}

    def send(self, tensors: list[Tensor], destination: int, tag: int, /) -> _Errand:
        """Publish the handle of one contiguous tensor, which must not change before ``wait`` returns."""
        (tensor,) = tensors
        key, handle = self._key(self._rank, destination, tag), _handle(tensor)
        self._store.set(key, json.dumps(handle))

        def finish(timeout: timedelta) -> None:
            self._wait(f"{key}/done", timeout)
            self._store.delete_key(f"{key}/done")
            del tensors[:]  # alive until here

        errand = _Errand(finish, self._timeout)
        if isinstance(handle, str):
            weakref.finalize(errand, Path(handle).unlink, missing_ok=True)  # also if nothing waits any more
        return errand

    def recv(self, tensors: list[Tensor], source: int, tag: int, /) -> _Errand:
        """Receive into one contiguous tensor, once ``wait`` is called."""
        (tensor,) = tensors
        key = self._key(source, self._rank, tag)

        def finish(timeout: timedelta) -> None:
            self._wait(key, timeout)
            _copy(json.loads(self._store.get(key)), tensor)
            self._store.delete_key(key)
            self._store.set(f"{key}/done", "")

        return _Errand(finish, self._timeout)

    def _key(self, source: int, destination: int, tag: int) -> str:
        """Return a message's key, equal on both sides: each counts how often it has used the three numbers."""
        number = self._counts.get((source, destination, tag), 0)
        self._counts[source, destination, tag] = number + 1
        return f"{source}/{destination}/{tag}/{number}"

    def _wait(self, key: str, timeout: timedelta) -> None:
        deadline = time.monotonic() + timeout.total_seconds()
        while not self._store.check([key]):  # the store's own ``wait`` writes a warning at each time-out
            if self._store.check([BROKEN]):
                raise RuntimeError(f"the other end is gone: {self._store.get(BROKEN).decode()}")
            if time.monotonic() > deadline:
                raise RuntimeError(f"nothing came from the other end within {timeout.total_seconds():g} s")
            time.sleep(_LOOK_S)


class _Errand:
    """A message in transit."""

    def __init__(self, finish: Callable[[timedelta], None], timeout: timedelta) -> None:
        self._finish, self._timeout = finish, timeout

    def wait(self, timeout: timedelta | None = None) -> None:
        """Wait for the other end; raises RuntimeError if it takes too long."""
        self._finish(timeout or self._timeout)


def _handle(tensor: Tensor) -> str | dict[str, Any]:
    """Return what another process of this machine needs to read a tensor, as plain data: a path, or a CUDA IPC handle."""
    if tensor.device.type == "cpu":
        folder = _SHARED_MEMORY if _SHARED_MEMORY.is_dir() else Path(tempfile.gettempdir())
        path = folder / f"megatron_rl_{os.getpid()}_{uuid.uuid4().hex}"
        with open(
            os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600), "wb"
        ) as file:  # weights are for this user alone
            tensor.view(torch.uint8).numpy().tofile(file)
        return str(path)
    torch.cuda.current_stream(tensor.device).synchronize()  # what wrote it has finished
    return to_plain(reduce_tensor(tensor)[1])


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


def _copy(handle: str | dict[str, Any], into: Tensor) -> None:
    if isinstance(handle, str):
        into.view(torch.uint8).copy_(torch.from_numpy(numpy.fromfile(handle, dtype=numpy.uint8)))
        return
    into.copy_(rebuild_cuda_tensor(*from_plain(handle)))
    torch.cuda.current_stream(into.device).synchronize()

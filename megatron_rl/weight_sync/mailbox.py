"""Messages between processes of one machine without a process group, for servers on the trainer's own GPUs.

NCCL refuses two members on one GPU. Here the sender puts a handle of the data into the store (on a GPU a CUDA IPC handle of
the memory itself, parameters included; on a CPU a file in shared memory). The receiver copies the data and acknowledges it;
only then may the sender change it.

    sender      handle  -> NAME/sender/receiver/tag        wait for NAME/sender/receiver/tag/done
    receiver    NAME/sender/receiver/tag -> copy           -> NAME/sender/receiver/tag/done

Every process sees all GPUs under the same numbers: ``base_gpu_id`` tells a server which to use.
"""

from __future__ import annotations

import base64
import os
import pickle
import tempfile
import time
import uuid
import weakref
from collections.abc import Callable
from datetime import timedelta
from pathlib import Path
from typing import Any

import numpy
import torch
import torch.distributed as dist
from torch import Tensor
from torch.multiprocessing.reductions import reduce_tensor

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
        self._store.set(key, base64.b64encode(pickle.dumps(handle)).decode())

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
            _copy(pickle.loads(base64.b64decode(self._store.get(key))), tensor)
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


def _handle(tensor: Tensor) -> object:
    """Return what another process of this machine needs to read a tensor."""
    if tensor.device.type == "cpu":
        folder = _SHARED_MEMORY if _SHARED_MEMORY.is_dir() else Path(tempfile.gettempdir())
        path = folder / f"megatron_rl_{os.getpid()}_{uuid.uuid4().hex}"
        tensor.view(torch.uint8).numpy().tofile(path)
        return str(path)
    torch.cuda.current_stream(tensor.device).synchronize()  # what wrote it has finished
    return reduce_tensor(tensor)


def _copy(handle: Any, into: Tensor) -> None:
    if isinstance(handle, str):
        into.view(torch.uint8).copy_(torch.from_numpy(numpy.fromfile(handle, dtype=numpy.uint8)))
        return
    rebuild, arguments = handle
    into.copy_(rebuild(*arguments))
    torch.cuda.current_stream(into.device).synchronize()

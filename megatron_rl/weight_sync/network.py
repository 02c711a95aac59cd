"""Process groups of a weight transfer: trainer ranks and the ranks of one server, apart from all other groups.

gloo and NCCL differ in what they do about the other end's death, and the trainer must outlive it:

- gloo notices, and raises.
- NCCL notices nothing: its kernels wait, ``wait`` lets a stream of the GPU wait with them, and torch's watchdog ends the whole
  process at a limit. So groups are made without that, their messages are looked at until they are done, and a group whose
  other end is gone is aborted. Messages go as a batch, since torch makes a communicator of two ranks, with buffers of its own,
  for each pair that exchanges single ones.
"""

from __future__ import annotations

import os
import time
from collections.abc import Iterator
from contextlib import contextmanager
from datetime import timedelta
from typing import Any, Literal

import torch
import torch.distributed as dist
from torch import Tensor

from megatron_rl.process.network import own_address

JOIN_S = 20.0
"""Limit of joining a group. All members have said that they are ready, so it takes moments unless one has died."""
_LOOK_S = 0.0005


def make_group(
    backend: Literal["gloo", "nccl"], store: dist.Store, name: str, rank: int, size: int, *, host: str, timeout_s: float
) -> Any:
    """Make a process group apart from the default one; every member calls this.

    Args:
        backend: what carries the messages.
        store: shared by all members.
        name: of the group.
        rank: of this member.
        size: number of members.
        host: address of the store; gloo listens on the address that reaches it.
        timeout_s: limit of a wait for the other members.

    Raises:
        RuntimeError: a member did not come.
    """
    own = dist.PrefixStore(name, store)
    if backend == "gloo":
        gloo = dist.ProcessGroupGloo._Options()  # type: ignore[attr-defined]
        gloo._devices = [dist.ProcessGroupGloo.create_device(hostname=own_address(1, host))]
        gloo._timeout = timedelta(seconds=timeout_s)
        return dist.ProcessGroupGloo(own, rank, size, gloo)
    with _variable("TORCH_NCCL_ASYNC_ERROR_HANDLING", "0"):
        group: Any = dist.ProcessGroupNCCL(own, rank, size, dist.ProcessGroupNCCL.Options())
    # One communicator of all members, which batches use; made by a collective of all.
    wait_for(group, group.allreduce([torch.zeros(1, device="cuda")]), timeout_s)
    return group


def send(group: Any, run: Tensor, rank: int, tag: int) -> Any:
    """Start to send one contiguous tensor; returns a work for ``wait_for``."""
    if _is_gloo(group):
        return group.send([run], rank, tag)
    group._start_coalescing(run.device)
    group.send([run], rank, tag)
    return group._end_coalescing(run.device)


def receive(group: Any, run: Tensor, rank: int, tag: int) -> Any:
    """Start to receive one contiguous tensor; returns a work for ``wait_for``."""
    if _is_gloo(group):
        return group.recv([run], rank, tag)
    group._start_coalescing(run.device)
    group.recv([run], rank, tag)
    return group._end_coalescing(run.device)


def wait_for(group: Any, work: Any, limit_s: float) -> None:
    """Wait for a message.

    Raises:
        RuntimeError: the other end is gone or too slow. With NCCL the group is of no use any more then.
    """
    if _is_gloo(group):
        work.wait(timedelta(seconds=limit_s))
        return
    deadline = time.monotonic() + limit_s
    while not work.is_completed():
        if time.monotonic() > deadline:
            abort(group)
            raise RuntimeError(f"the other end took nothing for {limit_s:g} s")
        time.sleep(_LOOK_S)


def abort(group: Any) -> None:
    """Give up a group whose other end is gone: NCCL's kernels would occupy the GPU for ever."""
    if not _is_gloo(group):
        group.abort()


def _is_gloo(group: Any) -> bool:
    return group.name() == "gloo"


@contextmanager
def _variable(name: str, value: str) -> Iterator[None]:
    before = os.environ.get(name)
    os.environ[name] = value
    try:
        yield
    finally:
        if before is None:
            del os.environ[name]
        else:
            os.environ[name] = before

"""The trainer's end of transfers: buckets to servers of this machine through memory, to others over the network.

An outlet never raises for a server: it notes the failure, and goes on for the others. A server that dies takes nobody with it.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from typing import Any, Protocol

from torch import Tensor

from megatron_rl.process import activity
from megatron_rl.weight_sync.network import abort, send, wait_for
from megatron_rl.weight_sync.shared import NUM_BUFFERS, BucketWriter, BufferPool

LOOK_S = 0.0002
SLOW_LOOK_S = 0.25
"""Seconds between two looks for servers that are gone: the store is asked over the network."""


class Outlet(Protocol):
    """A way of buckets to some server ranks; buckets are numbered from 0."""

    failures: dict[int, str]
    """By server: why it has not got everything."""

    def room(self, number: int) -> Tensor:
        """Wait until a bucket can be filled, and return its buffer, [n] uint8."""
        ...

    def hand_on(self, number: int, num_bytes: int) -> None:
        """Hand the bucket on that fills the first bytes of its buffer now."""
        ...

    def finish(self, count: int) -> None:
        """Wait until all buckets have been taken, and release the buffers."""
        ...


class LocalOutlet:
    """Buckets for server ranks of this machine, through memory that they share with this process."""

    def __init__(
        self,
        servers: Sequence[int],
        largest: int,
        *,
        pool: BufferPool,
        limit_s: float,
        problem: Callable[[int], str | None],
    ) -> None:
        """Take the buffers.

        Args:
            servers: number of the server of each reader.
            largest: bytes of the largest bucket.
            pool: has the buffers.
            limit_s: limit of a wait for readers.
            problem: returns why a server is gone, or None.
        """
        self.failures: dict[int, str] = {}
        self._servers, self._limit_s, self._problem = list(servers), limit_s, problem
        self._writer = BucketWriter(len(servers), largest, pool)

    def handle(self) -> dict[str, Any]:
        """Return what readers need, as JSON; they are numbered as ``servers`` is."""
        return self._writer.handle()

    def room(self, number: int) -> Tensor:
        """Wait until the readers are done with what the buffer held before, and return it."""
        deadline, next_look = time.monotonic() + self._limit_s, time.monotonic() + SLOW_LOOK_S
        while late := [n for n in self._alive() if not self._writer.is_free(number, [n])]:
            now = time.monotonic()
            if now > next_look:
                next_look = now + SLOW_LOOK_S
                activity.beat()
                for server in {self._servers[n] for n in late}:
                    if (problem := self._problem(server)) is not None:
                        self.failures[server] = problem
            if now > deadline:
                self.failures |= {self._servers[n]: f"it took nothing for {self._limit_s:g} s" for n in late}
            time.sleep(LOOK_S)
        return self._writer.buffer(number)

    def hand_on(self, number: int, num_bytes: int) -> None:
        """Let the readers have a bucket; they know its size."""
        self._writer.publish(number)

    def finish(self, count: int) -> None:
        """Wait until the last buckets have been read."""
        for number in range(count, count + NUM_BUFFERS):
            self.room(number)

    def _alive(self) -> list[int]:
        return [n for n, server in enumerate(self._servers) if server not in self.failures]


class NetworkOutlet:
    """Buckets for one server rank elsewhere, over a process group."""

    def __init__(
        self,
        group: Any,
        rank: int,
        largest: int,
        *,
        server: int,
        pool: BufferPool,
        number: int,
        limit_s: float,
        failure: str = "",
    ) -> None:
        """Take the buffers.

        Args:
            group: of the server (``Meeting.group``).
            rank: of the receiver in the group.
            largest: bytes of the largest bucket.
            server: number of the server.
            pool: has the buffers.
            number: of this outlet, for the pool.
            limit_s: limit of a wait for the receiver.
            failure: why nothing can be sent, known before.
        """
        self.failures: dict[int, str] = {server: failure} if failure else {}
        self._group, self._rank, self._server, self._limit_s = group, rank, server, limit_s
        self._buffers = pool.plain(number, largest)
        self._works: dict[int, Any] = {}

    def room(self, number: int) -> Tensor:
        """Wait until the bucket that was in the buffer has been received, and return it."""
        work = self._works.pop(number - NUM_BUFFERS, None)
        if work is not None and not self.failures:
            try:
                wait_for(self._group, work, self._limit_s)
            except RuntimeError as error:
                self._fail(error)
        return self._buffers[number % NUM_BUFFERS]

    def hand_on(self, number: int, num_bytes: int) -> None:
        """Start to send a bucket; the receiver knows its size."""
        if self.failures:
            return
        try:
            self._works[number] = send(self._group, self._buffers[number % NUM_BUFFERS][:num_bytes], self._rank, number)
        except RuntimeError as error:
            self._fail(error)

    def finish(self, count: int) -> None:
        """Wait until the last buckets have been received."""
        for number in range(count, count + NUM_BUFFERS):
            self.room(number)

    def _fail(self, error: RuntimeError) -> None:
        self.failures[self._server] = " ".join(str(error).split())[:300]
        abort(self._group)

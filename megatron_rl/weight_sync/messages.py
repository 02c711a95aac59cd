"""Messages of a transfer plan between one sender and one receiver, and both ends of their transfer.

Both ends go through the same list in the same order, some messages ahead of the wire: while one is in transit, the next is
gathered into a buffer, or scattered from one. A large overlap that is contiguous in memory needs no buffer.
"""

from __future__ import annotations

from collections import defaultdict, deque
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from math import prod
from typing import Generic, Protocol, TypeVar

import torch
from torch import Tensor

from megatron_rl.convert.tables.digest import digest
from megatron_rl.convert.tables.kinds import Extent
from megatron_rl.weight_sync.plan import Overlap, Plan, rounds

T = TypeVar("T")

ALONE_ELEMENTS = 2**18
"""An overlap of this size or more is a message of its own, so that it needs no copy if it is contiguous."""
NUM_BUFFERS = 2
"""Buffers at each end: one is gathered or scattered while another is in transit."""
AHEAD = 16
"""Most messages in transit at each end, with and without a buffer."""


@dataclass(frozen=True, slots=True)
class Message:
    """Overlaps that travel together, one after the other, each row by row."""

    sender: int
    receiver: int
    """Numbers of both ends, as in ``plan.Copy``."""
    tag: int
    """Number of the message among those of the pair."""
    overlaps: tuple[Overlap, ...]

    @property
    def num_elements(self) -> int:
        """Elements of all overlaps."""
        return sum(prod(overlap.size) for overlap in self.overlaps)


class PendingMessage(Protocol):
    """A send or a receive in transit."""

    def wait(self) -> object:
        """Wait for the end of the transfer; raises RuntimeError if the other end is gone or too slow."""
        ...


def make_messages(plan: Plan, *, bucket_elements: int) -> list[Message]:
    """Return all messages in the order of the plan's rounds.

    Args:
        plan: of all servers.
        bucket_elements: most elements of overlaps that share a message.
    """
    found: list[Message] = []
    for copies in rounds(plan):
        pairs: dict[tuple[int, int], list[Overlap]] = defaultdict(list)
        for copy in copies:
            pairs[copy.sender, copy.receiver].append(copy.overlap)
        for pair, overlaps in pairs.items():
            buckets = enumerate(_buckets(overlaps, bucket_elements))
            found += [Message(*pair, tag, tuple(bucket)) for tag, bucket in buckets]
    return found


def _buckets(overlaps: Iterable[Overlap], bucket_elements: int) -> Iterator[list[Overlap]]:
    """Yield large overlaps alone, and small ones together as they come."""
    bucket: list[Overlap] = []
    total = 0
    for overlap in overlaps:
        size = prod(overlap.size)
        if size >= ALONE_ELEMENTS:
            yield [overlap]
            continue
        if bucket and total + size > bucket_elements:
            yield bucket
            bucket, total = [], 0
        bucket.append(overlap)
        total += size
    if bucket:
        yield bucket


def box(start: Extent, size: Extent) -> tuple[int | slice, ...]:
    """Return the index of a rectangle. ``start`` may have more dimensions in front than ``size``: they are indices."""
    front = len(start) - len(size)
    return (*start[:front], *(slice(a, a + n) for a, n in zip(start[front:], size)))


def send_messages(
    messages: Iterable[Message],
    parameters: Mapping[str, Tensor],
    *,
    dtype: torch.dtype,
    send: Callable[[Tensor, Message], PendingMessage | None],
) -> Iterator[Message]:
    """Send messages in order; yields each once it has arrived.

    Args:
        messages: this rank's.
        parameters: of this rank, by global Megatron name.
        dtype: on the wire, the server's.
        send: starts to send [n] contiguous elements; None skips the message.
    """
    window = _Window[Message](dtype)
    for message in messages:
        views = [parameters[overlap.source][box(overlap.source_start, overlap.size)] for overlap in message.overlaps]
        flat, buffer = _run_of_memory(views, dtype), None
        yield from window.make_room(needs_buffer=flat is None)
        if flat is None:
            buffer = window.take_buffer(message.num_elements, views[0].device)
            flat = _gather(views, buffer)
        window.add(message, send(flat, message), buffer)
    yield from window.drain()


def receive_messages(
    messages: Iterable[Message],
    parameters: Mapping[str, Tensor],
    *,
    dtype: torch.dtype,
    receive: Callable[[Tensor, Message], PendingMessage],
) -> None:
    """Receive messages in order, each overlap into its place.

    Args:
        messages: this rank's.
        parameters: of this rank, by SGLang's name.
        dtype: on the wire.
        receive: starts to receive into [n] contiguous elements.
    """
    window = _Window[list[Tensor]](dtype, arrived=_scatter)
    for message in messages:
        views = [parameters[overlap.target][box(overlap.target_start, overlap.size)] for overlap in message.overlaps]
        flat, buffer = _run_of_memory(views, dtype), None
        deque(window.make_room(needs_buffer=flat is None), maxlen=0)
        if flat is None:
            buffer = window.take_buffer(message.num_elements, views[0].device)
            flat = buffer[: message.num_elements]
        window.add(views, receive(flat, message), buffer)
    deque(window.drain(), maxlen=0)


def digest_overlaps(
    overlaps: Iterable[Overlap],
    parameters: Mapping[str, Tensor],
    extents: Mapping[str, Extent],
    *,
    dtype: torch.dtype,
    is_sender: bool,
) -> list[int]:
    """Return the digest of each overlap, from the parameters of one end.

    Args:
        overlaps: those that this end holds.
        parameters: by the name of that end.
        extents: shapes of the Hugging Face tensors.
        dtype: on the wire.
        is_sender: which end.
    """
    found = []
    for overlap in overlaps:
        name, start = (overlap.source, overlap.source_start) if is_sender else (overlap.target, overlap.target_start)
        block = parameters[name][box(start, overlap.size)].to(dtype)
        found.append(digest(overlap.hf_name, block, overlap.hf_start, extents[overlap.hf_name]))
    return found


class _Window(Generic[T]):
    """Messages in transit, oldest first, and the buffers that they use."""

    def __init__(self, dtype: torch.dtype, arrived: Callable[[Tensor, T], None] | None = None) -> None:
        self._dtype, self._arrived = dtype, arrived
        self._free = [torch.empty(0, dtype=dtype)] * NUM_BUFFERS
        self._pending: deque[tuple[T, PendingMessage | None, Tensor | None]] = deque()

    def make_room(self, *, needs_buffer: bool) -> Iterator[T]:
        """Wait for the oldest messages until there is room, and a buffer if one is needed."""
        while len(self._pending) >= AHEAD or (needs_buffer and not self._free):
            yield self._finish()

    def take_buffer(self, size: int, device: torch.device) -> Tensor:
        """Return a free buffer of at least [size]."""
        buffer = self._free.pop()
        if buffer.numel() >= size and buffer.device == device:
            return buffer
        return torch.empty(size, dtype=self._dtype, device=device)

    def add(self, item: T, work: PendingMessage | None, buffer: Tensor | None) -> None:
        """Add a message whose transfer has started."""
        self._pending.append((item, work, buffer))

    def drain(self) -> Iterator[T]:
        """Wait for all messages."""
        while self._pending:
            yield self._finish()

    def _finish(self) -> T:
        item, work, buffer = self._pending.popleft()
        if work is not None:
            work.wait()
        if buffer is not None:
            if self._arrived is not None:
                self._arrived(buffer, item)
            self._free.append(buffer)
        return item


def _run_of_memory(views: Sequence[Tensor], dtype: torch.dtype) -> Tensor | None:
    """Return the only view as [n] if that needs no copy, else None."""
    if len(views) == 1 and views[0].is_contiguous() and views[0].dtype == dtype:
        return views[0].view(-1)
    return None


def _gather(views: Sequence[Tensor], buffer: Tensor) -> Tensor:
    end = 0
    for view in views:
        start, end = end, end + view.numel()
        buffer[start:end].view(view.shape).copy_(view)
    return buffer[:end]


def _scatter(buffer: Tensor, views: Sequence[Tensor]) -> None:
    end = 0
    for view in views:
        start, end = end, end + view.numel()
        view.copy_(buffer[start:end].view(view.shape))

"""A plan's copies as messages between one sender and one receiver, and both ends of carrying them out.

Both ends walk through the same list in the same order, two messages ahead of the wire: while one is under way, the next is
gathered into a buffer, or scattered from one. A large piece that lies in one run of memory goes without any buffer.
"""

from __future__ import annotations

from collections import defaultdict, deque
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from math import prod
from typing import Protocol

import torch
from torch import Tensor

from megatron_rl.convert.digest import digest
from megatron_rl.convert.kinds import Extent
from megatron_rl.weight_sync.plan import Piece, Plan, rounds

ALONE_ELEMENTS = 2**18
"""A piece of this size or more is a message of its own: worth no copy where none is needed."""
AHEAD = 2
"""Messages under way at each end."""


@dataclass(frozen=True, slots=True)
class Message:
    """Pieces that travel together, one after the other, each row by row."""

    sender: int
    receiver: int
    """As in ``plan.Copy``."""
    tag: int
    """Counts the messages of the pair."""
    pieces: tuple[Piece, ...]

    @property
    def num_elements(self) -> int:
        """Of all pieces."""
        return sum(prod(piece.size) for piece in self.pieces)


class Work(Protocol):
    """A send or a receive under way."""

    def wait(self) -> object:
        """Until it is done; raises RuntimeError when the other end is gone or too slow."""
        ...


def make_messages(plan: Plan, *, bucket_elements: int) -> list[Message]:
    """All messages in the order of the plan's rounds.

    Args:
        plan: of all servers.
        bucket_elements: most elements of pieces that share a message.
    """
    found: list[Message] = []
    for copies in rounds(plan):
        pairs: dict[tuple[int, int], list[Piece]] = defaultdict(list)
        for copy in copies:
            pairs[copy.sender, copy.receiver].append(copy.piece)
        for pair, pieces in pairs.items():
            buckets = enumerate(_buckets(pieces, bucket_elements))
            found += [Message(*pair, tag, tuple(bucket)) for tag, bucket in buckets]
    return found


def _buckets(pieces: Iterable[Piece], bucket_elements: int) -> Iterator[list[Piece]]:
    """Large pieces one by one, and small ones together as they come."""
    bucket: list[Piece] = []
    total = 0
    for piece in pieces:
        size = prod(piece.size)
        if size >= ALONE_ELEMENTS:
            yield [piece]
            continue
        if bucket and total + size > bucket_elements:
            yield bucket
            bucket, total = [], 0
        bucket.append(piece)
        total += size
    if bucket:
        yield bucket


def box(start: Extent, size: Extent) -> tuple[int | slice, ...]:
    """Indexes a rectangle. ``start`` may have dimensions in front of those of ``size``: they are indices."""
    front = len(start) - len(size)
    return (*start[:front], *(slice(a, a + n) for a, n in zip(start[front:], size)))


def send_messages(
    messages: Iterable[Message],
    parameters: Mapping[str, Tensor],
    *,
    dtype: torch.dtype,
    send: Callable[[Tensor, Message], Work | None],
) -> Iterator[Message]:
    """Send messages in order; yields each once it has arrived.

    Args:
        messages: this rank's.
        parameters: of this rank, by global Megatron name.
        dtype: on the wire, the server's.
        send: starts to send [n] contiguous elements; None skips the message.
    """
    free = [torch.empty(0, dtype=dtype)] * AHEAD
    pending: deque[tuple[Message, Work | None, Tensor | None]] = deque()
    for message in messages:
        if len(pending) == AHEAD:
            yield from _finish(pending, free)
        views = [parameters[piece.source][box(piece.source_start, piece.size)] for piece in message.pieces]
        flat, buffer = _run_of_memory(views, dtype), None
        if flat is None:
            buffer = _at_least(free.pop(), message.num_elements, dtype, views[0].device)
            flat = _gather(views, buffer)
        pending.append((message, send(flat, message), buffer))
    while pending:
        yield from _finish(pending, free)


def receive_messages(
    messages: Iterable[Message],
    parameters: Mapping[str, Tensor],
    *,
    dtype: torch.dtype,
    receive: Callable[[Tensor, Message], Work],
) -> None:
    """Receive messages in order, each piece into its place.

    Args:
        messages: this rank's.
        parameters: of this rank, by SGLang's name.
        dtype: on the wire.
        receive: starts to receive into [n] contiguous elements.
    """
    free = [torch.empty(0, dtype=dtype)] * AHEAD
    pending: deque[tuple[list[Tensor], Work, Tensor | None]] = deque()

    def finish() -> None:
        views, work, buffer = pending.popleft()
        work.wait()
        if buffer is not None:
            _scatter(buffer, views)
            free.append(buffer)

    for message in messages:
        if len(pending) == AHEAD:
            finish()
        views = [parameters[piece.target][box(piece.target_start, piece.size)] for piece in message.pieces]
        flat, buffer = _run_of_memory(views, dtype), None
        if flat is None:
            buffer = _at_least(free.pop(), message.num_elements, dtype, views[0].device)
            flat = buffer[: message.num_elements]
        pending.append((views, receive(flat, message), buffer))
    while pending:
        finish()


def digest_pieces(
    pieces: Iterable[Piece],
    parameters: Mapping[str, Tensor],
    extents: Mapping[str, Extent],
    *,
    dtype: torch.dtype,
    is_sender: bool,
) -> list[int]:
    """The digest of each piece, from the parameters of one end.

    Args:
        pieces: that this end has.
        parameters: by the name of that end.
        extents: shapes of the Hugging Face tensors.
        dtype: on the wire.
        is_sender: which end.
    """
    found = []
    for piece in pieces:
        name, start = (piece.source, piece.source_start) if is_sender else (piece.target, piece.target_start)
        block = parameters[name][box(start, piece.size)].to(dtype)
        found.append(digest(piece.hf_name, block, piece.hf_start, extents[piece.hf_name]))
    return found


def _finish(pending: deque[tuple[Message, Work | None, Tensor | None]], free: list[Tensor]) -> Iterator[Message]:
    message, work, buffer = pending.popleft()
    if work is not None:
        work.wait()
    if buffer is not None:
        free.append(buffer)
    yield message


def _run_of_memory(views: Sequence[Tensor], dtype: torch.dtype) -> Tensor | None:
    """The only view as [n], where that needs no copy."""
    if len(views) == 1 and views[0].is_contiguous() and views[0].dtype == dtype:
        return views[0].view(-1)
    return None


def _at_least(buffer: Tensor, size: int, dtype: torch.dtype, device: torch.device) -> Tensor:
    """The buffer, or a larger one."""
    if buffer.numel() >= size and buffer.device == device:
        return buffer
    return torch.empty(size, dtype=dtype, device=device)


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

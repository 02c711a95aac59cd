"""The servers' side: a checkpoint of any version, from a server's own checkpoint and the links that lead there."""

from __future__ import annotations

import json
import os
import re
from collections.abc import Sequence
from concurrent.futures import Executor, ThreadPoolExecutor
from contextlib import ExitStack
from dataclasses import dataclass
from math import prod
from pathlib import Path
from types import TracebackType
from typing import Self

import numpy as np
import torch

from megatron_rl.convert.hf.reader import HFReader
from megatron_rl.convert.hf.writer import LayoutWriter
from megatron_rl.errors import UserError
from megatron_rl.files import disk_errors
from megatron_rl.weight_sync.disk.frames import (
    FRAME_ELEMENTS,
    UNSIGNED,
    Bits,
    Damaged,
    Frame,
    bits_of,
    decode_onto,
    tensor_digest,
    tensor_of,
)
from megatron_rl.weight_sync.disk.links import (
    DATA,
    ChainLink,
    StoredTensor,
    broken,
    find_links,
    link_name,
    read_link,
    state_of,
)
from megatron_rl.weight_sync.disk.write import NUM_THREADS

_OTHER_BASE = "apply with another base: the checkpoint that the servers started from, or an earlier result"

STAMP = "weights_version.json"
"""File in a checkpoint that ``apply`` wrote: its version and state, so that the next call need not read the weights."""


def apply(
    directory: str | Path, base: str | Path, version: int, into: str | Path | None = None, *,
    num_threads: int = NUM_THREADS,
) -> Path:  # fmt: skip
    """Write the Hugging Face checkpoint of a version, for SGLang's ``/update_weights_from_disk``.

    It takes the deltas from the version of ``base``, or, if they do not lead there, the newest full link and the deltas
    after it. Every tensor is checked against the digest that the trainer wrote, before the checkpoint gets its name.

    Args:
        directory: of the links.
        base: a checkpoint of the same model: one that this function wrote, or any other, then read once to recognise its
            version. Its config.json and tokenizer are copied. It is not changed.
        version: the wanted one.
        into: the new checkpoint; must not exist, or be empty. By default beside ``base``, with the version in its name.
        num_threads: for decompression.

    Returns:
        The checkpoint; ``base`` itself if it is of this version already, or the one that an earlier call wrote. The caller
        removes old ones, and makes sure that no two calls write the same one at a time.

    Raises:
        UserError: a link is missing, damaged or out of order, or ``base`` is no checkpoint; it is named, and nothing was
            changed.
    """
    directory, base = Path(directory), Path(base)
    with ThreadPoolExecutor(num_threads) as pool:
        route = _find_route(directory, base, version, pool)
    if not route.links:
        return base
    target = Path(into) if into is not None else _beside(base, version)
    last = route.links[-1]
    if _stamped_state(target) == last.after:
        return target
    layout = {name: (stored.shape, getattr(torch, stored.dtype)) for name, stored in last.tensors.items()}
    with (
        disk_errors(target),
        ExitStack() as stack,
        LayoutWriter(target, layout, source=base) as writer,
        ThreadPoolExecutor(num_threads) as pool,  # ends first: its threads read the links
    ):
        opened = [stack.enter_context(_OpenLink(link)) for link in route.links]
        for name, stored in last.tensors.items():
            bits = _start(name, stored, route.reader)
            for each in opened:
                each.apply_onto(name, bits, pool)
            tensor = tensor_of(bits, getattr(torch, stored.dtype), stored.shape)
            # A delta is its own inverse: the right result proves the start, too.
            if tensor_digest(name, tensor, pool) != stored.after:
                raise _find_fault(name, opened, route.reader, pool)
            writer.add(name, tensor)
        writer.add_file(STAMP, json.dumps({"version": version, "state": last.after}) + "\n")
    return target


@dataclass(frozen=True)
class _Route:
    """The way to a version: from ``reader``'s tensors through ``links``, or from the first link without a reader."""

    reader: HFReader | None
    links: tuple[ChainLink, ...]


def _find_route(directory: Path, base: Path, version: int, pool: Executor) -> _Route:
    """Return the deltas that lead there from the base, else the newest full link and the deltas after it. Reads no data."""
    paths = find_links(directory)
    reader, base_state = HFReader(base), _stamped_state(base)
    deltas: list[ChainLink] = []  # newest first
    from_full: _Route | None = None
    state: str | None = None  # of version ``at``
    at = version
    while True:
        if from_full is None and (at, "full") in paths:
            full = _expect(read_link(paths[at, "full"]), state)
            from_full, state = _Route(None, (full, *reversed(deltas))), full.after
        if state is not None and state == base_state:
            return _Route(reader, tuple(reversed(deltas)))
        path = paths.get((at, "delta"))
        if path is None:
            break
        try:
            delta = _expect(read_link(path), state)
        except UserError:
            if from_full is None:
                raise
            break
        if not deltas and base_state is None:
            base_state = _state(reader, delta, pool)
        deltas.append(delta)
        assert delta.previous is not None and delta.previous < at, path
        if state is None and delta.after == base_state:
            return _Route(reader, ())
        at, state = delta.previous, delta.before
    if from_full is None:
        missing = directory / link_name(at, "delta" if deltas else "full")
        newest = max((known for known, _ in paths), default=None)
        rule = (
            f"is missing, and {base} is not of version {at}" if deltas else f"is missing; the newest there is {newest}"
        )
        raise broken(missing, rule)
    return from_full


def _expect(link: ChainLink, state: str | None) -> ChainLink:
    """Check that a link leads to the state that the one after it starts from."""
    if state is not None and link.after != state:
        raise broken(link.path, "does not lead to what the next link starts from: they are of different runs")
    return link


def _stamped_state(base: Path) -> str | None:
    """Return the state that an earlier ``apply`` wrote into the checkpoint, or None."""
    try:
        stamp = json.loads((base / STAMP).read_text(encoding="utf-8"))
        return str(stamp["state"])
    except (OSError, ValueError, KeyError, TypeError):
        return None


def _state(reader: HFReader, link: ChainLink, pool: Executor) -> str | None:
    """Return the state of a checkpoint, from its tensors; None if they are not those of the link at all."""
    digests = {}
    for name, stored in link.tensors.items():
        if name not in reader.names or reader.shape(name) != stored.shape:
            return None
        digests[name] = tensor_digest(name, reader.read(name), pool)
    return state_of(digests)


def _beside(base: Path, version: int) -> Path:
    base = base.absolute()
    return base.with_name(re.sub(r"\.v\d+$", "", base.name) + f".v{version}")


class _OpenLink:
    """A link whose data stays readable even if the trainer removes it meanwhile."""

    def __init__(self, link: ChainLink) -> None:
        self.link = link

    def __enter__(self) -> Self:
        try:
            self._file = os.open(self.link.path / DATA, os.O_RDONLY)
        except OSError as error:
            raise broken(self.link.path, f"{DATA} cannot be read ({error.strerror})") from error
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        os.close(self._file)

    def read_into(self, buffer: memoryview, offset: int) -> None:
        """Fill a buffer of bytes."""
        done = 0
        while done < len(buffer):
            count = os.preadv(self._file, [buffer[done:]], offset + done)
            if count == 0:
                raise broken(self.link.path, f"{DATA} ends too early")
            done += count

    def apply_onto(self, name: str, bits: Bits, pool: Executor) -> None:
        """Replace the bits by this version's; the frames of a tensor are independent of each other."""
        stored = self.link.tensors[name]
        if self.link.kind == "full":
            self.read_into(bits.view(np.uint8).data, stored.offset)
            return
        jobs, offset = [], stored.offset
        for number, frame in enumerate(stored.frames):
            part = bits[number * FRAME_ELEMENTS : (number + 1) * FRAME_ELEMENTS]
            jobs.append(pool.submit(self._apply_frame, name, part, offset, frame))
            offset += frame.size
        for job in jobs:
            job.result()

    def _apply_frame(self, name: str, part: Bits, offset: int, frame: Frame) -> None:
        data = bytearray(frame.size)
        self.read_into(memoryview(data), offset)
        try:
            decode_onto(data, frame, part)
        except Damaged as error:
            raise broken(self.link.path, f"{DATA} is damaged where {name} is ({error})") from error


def _start(name: str, stored: StoredTensor, reader: HFReader | None) -> Bits:
    """Return a copy of the bits that the first link is applied onto."""
    if reader is None:
        return np.empty(prod(stored.shape), UNSIGNED[getattr(torch, stored.dtype).itemsize])
    found = reader.read(name) if name in reader.names else torch.empty(0)
    if (found.dtype, tuple(found.shape)) != (getattr(torch, stored.dtype), stored.shape):
        raise UserError(f"{reader.directory}: {name}", None, f"is not {stored.dtype} {list(stored.shape)}", _OTHER_BASE)
    return bits_of(found).copy()


def _find_fault(name: str, opened: Sequence[_OpenLink], reader: HFReader | None, pool: Executor) -> UserError:
    """Return the error that names the link or base that gave a tensor a wrong digest."""
    first = opened[0].link.tensors[name]
    dtype, shape = getattr(torch, first.dtype), first.shape
    bits = _start(name, first, reader)
    if reader is not None and tensor_digest(name, tensor_of(bits, dtype, shape), pool) != first.before:
        rule = f"is not that of version {opened[0].link.previous}, which {STAMP} says"
        return UserError(f"{reader.directory}: {name}", None, rule, _OTHER_BASE)
    for each in opened:
        each.apply_onto(name, bits, pool)
        if tensor_digest(name, tensor_of(bits, dtype, shape), pool) != each.link.tensors[name].after:
            return broken(each.link.path, f"{DATA} is damaged where {name} is")
    raise AssertionError(f"{name} was read differently twice")

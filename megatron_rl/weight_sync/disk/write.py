"""The trainer's side: links, written tensor by tensor, under a temporary name until they are on disk."""

from __future__ import annotations

import os
import shutil
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack
from functools import partial
from pathlib import Path

from torch import Tensor

from megatron_rl.convert.hf.writer import FORMAT_NAMES, write_in_calls
from megatron_rl.errors import UserError
from megatron_rl.files import disk_errors, publish_folder
from megatron_rl.weight_sync.disk.frames import FRAME_ELEMENTS, Bits, Frame, bits_of, encode, tensor_digest
from megatron_rl.weight_sync.disk.links import (
    DATA,
    ChainLink,
    LinkKind,
    StoredTensor,
    find_links,
    link_name,
    newest_version,
    read_link,
    remove_newer,
    remove_older,
    state_of,
    write_manifest,
)

ReadTensor = Callable[[str], Tensor]
"""Maps a name to the tensor of the version before: ``kept.__getitem__``, or ``HFReader(directory).read``."""

NUM_THREADS = min(8, os.cpu_count() or 1)


def write_full(
    tensors: Iterable[tuple[str, Tensor]], directory: str | Path, version: int, *, num_threads: int = NUM_THREADS
) -> Path:
    """Write a link that holds every tensor.

    Args:
        tensors: (Hugging Face name, tensor of any type of one, two or four bytes, on any device), consumed to the end even
            if writing fails: collectives may stand behind it. Memory is that of the largest on a CPU.
        directory: shared with the servers; created if it does not exist.
        version: higher than that of all links there.
        num_threads: for compression.

    Returns:
        The link.

    Raises:
        UserError: the version is not new, or the disk is full or not writable; nothing is left of the link then.
    """
    return _write_all([partial(LinkWriter, directory, version, num_threads=num_threads)], tensors)[0]


def write_delta(
    previous: ReadTensor, tensors: Iterable[tuple[str, Tensor]], directory: str | Path, version: int, *,
    num_threads: int = NUM_THREADS,
) -> Path:  # fmt: skip
    """Write a link that holds the changes since the newest version there.

    Args:
        previous: gives the tensors of that version, which the digests prove.
        tensors, directory, version, num_threads: as for ``write_full``; the same names, types and shapes as before.

    Returns:
        The link.

    Raises:
        UserError: as for ``write_full``; or there is no version before, or ``previous`` is not that version, or the tensors are
            others. Nothing is left of the link then.
    """
    make = partial(LinkWriter, directory, version, previous=previous, num_threads=num_threads)
    return _write_all([make], tensors)[0]


class DiskPublisher:
    """Publisher of a delta for each version and a full link every few; it removes links that no server needs.

    It keeps the last published version in memory (the model's size, on the CPU), hence the process that writes is one.

    Args:
        directory: shared with the servers.
        full_every: versions from one full link to the next. More saves disk writes, and costs newcomers more deltas.
        keep_versions: versions that a server may be behind without having to read a full link.
        num_threads: for compression.
    """

    def __init__(
        self, directory: str | Path, *, full_every: int = 20, keep_versions: int = 2, num_threads: int = NUM_THREADS
    ) -> None:
        for field, value in (("full_every", full_every), ("keep_versions", keep_versions)):
            if value < 1:
                raise UserError(f"weight_sync.{field}", value, "must be at least 1", "raise it")
        self.directory = Path(directory)
        self._full_every, self._keep_versions, self._num_threads = full_every, keep_versions, num_threads
        self._kept: dict[str, Tensor] = {}
        self._since_full = 0
        self._is_first = True

    def publish(self, tensors: Iterable[tuple[str, Tensor]], version: int) -> list[Path]:
        """Write a version.

        The first call removes links of this version and later ones: a run that was resumed writes them anew. After an error
        the next version is a full link, and needs nothing of this one.

        Returns:
            The links: a delta, a full link, or both.

        Raises:
            UserError: as for ``write_full`` and ``write_delta``.
        """
        if self._is_first and self.directory.exists():
            remove_newer(self.directory, version)
        is_full = not self._kept or self._since_full + 1 >= self._full_every
        kept, self._kept = self._kept, {}
        make = partial(LinkWriter, self.directory, version, num_threads=self._num_threads)
        makers = [partial(make, previous=kept.__getitem__)] * bool(kept) + [make] * is_full
        paths = _write_all(makers, tensors, then=lambda name, tensor: _keep(kept, name, tensor))
        self._kept, self._is_first = kept, False
        self._since_full = 0 if is_full else self._since_full + 1
        remove_older(self.directory, version - self._keep_versions)
        return paths


def _keep(kept: dict[str, Tensor], name: str, tensor: Tensor) -> None:
    if name in kept:
        kept[name].copy_(tensor.detach())
    else:
        kept[name] = tensor.detach().to("cpu", copy=True)


def _write_all(
    makers: Sequence[Callable[[], LinkWriter]], tensors: Iterable[tuple[str, Tensor]],
    then: Callable[[str, Tensor], None] = lambda name, tensor: None,
) -> list[Path]:  # fmt: skip
    """Write the same tensors with several writers; ``then`` is called with each tensor that all have written."""
    with ExitStack() as stack:
        writers: list[LinkWriter] = []
        failure: Exception | None = None
        try:
            for make in makers:
                writers.append(make())
                stack.callback(writers[-1].abort)
        except Exception as error:
            failure = error
        for name, tensor in tensors:
            if failure is not None:
                continue  # other ranks wait in the collectives behind the iterator
            try:
                for writer in writers:
                    writer.add(name, tensor)
                then(name, tensor)
            except Exception as error:
                failure = error
        if failure is not None:
            raise failure
        return [writer.finish() for writer in writers]


class LinkWriter:
    """Writer of one link, for ``write_full`` and ``write_delta``. End with ``finish``, and call ``abort`` in any case."""

    def __init__(
        self, directory: str | Path, version: int, *, previous: ReadTensor | None = None, num_threads: int = NUM_THREADS
    ) -> None:
        self._directory, self._version, self._previous = Path(directory), version, previous
        self._kind: LinkKind = "full" if previous is None else "delta"
        self._path = self._directory / link_name(version, self._kind)
        self._partial = self._path.with_name(f".{self._path.name}.partial")
        self._stored: dict[str, StoredTensor] = {}
        self._offset = 0
        with disk_errors(self._directory):
            self._directory.mkdir(parents=True, exist_ok=True)
            self._since = self._check_version()
            shutil.rmtree(self._partial, ignore_errors=True)  # left by a writer that was killed
            self._partial.mkdir()
            self._file = (self._partial / DATA).open("wb")
        self._pool = ThreadPoolExecutor(num_threads, thread_name_prefix="delta")

    def add(self, name: str, tensor: Tensor) -> None:
        """Write one tensor; it may change again as soon as this returns."""
        if name in self._stored:
            raise ValueError(f"{name} was already written")
        if tensor.dtype not in FORMAT_NAMES:
            known = ", ".join(str(dtype) for dtype in FORMAT_NAMES)
            raise UserError(f"tensor {name}", str(tensor.dtype), f"must be one of {known}", "convert it first")
        tensor = tensor.detach().to("cpu").contiguous()
        before = None
        if self._since is None:
            pieces: list[tuple[bytes | memoryview, Frame | None]] = [(bits_of(tensor).data, None)]
            after = tensor_digest(name, tensor, self._pool)
        else:
            old = self._old(name, tensor)
            jobs = [self._pool.submit(encode, *pair) for pair in _frames(bits_of(tensor), bits_of(old))]
            before, after = tensor_digest(name, old, self._pool), tensor_digest(name, tensor, self._pool)
            if before != self._since.tensors[name].after:
                raise UserError(
                    f"previous: {name}", before,
                    f"is not version {self._since.version}, which has the digest {self._since.tensors[name].after}",
                    "give the tensors of that version, or write a full link",
                )  # fmt: skip
            pieces = [job.result() for job in jobs]
        frames = tuple(frame for _, frame in pieces if frame is not None)
        dtype = str(tensor.dtype).removeprefix("torch.")
        with disk_errors(self._directory):
            for data, _ in pieces:
                write_in_calls(self._file, memoryview(data))
        self._stored[name] = StoredTensor(dtype, tuple(tensor.shape), before, after, self._offset, frames)
        self._offset += sum(memoryview(data).nbytes for data, _ in pieces)

    def finish(self) -> Path:
        """Sync the link to disk and give it its name."""
        if self._since is not None and (missing := set(self._since.tensors) - set(self._stored)):
            raise ValueError(f"{len(missing)} tensors were not written, for example {min(missing)}")
        before = None if self._since is None else self._since.after
        after = state_of({name: stored.after for name, stored in self._stored.items()})
        previous = None if self._since is None else self._since.version
        link = ChainLink(self._path, self._kind, self._version, previous, before, after, self._offset, self._stored)
        with disk_errors(self._directory):
            self._file.close()
            write_manifest(self._partial, link)
            publish_folder(self._partial, self._path)
        return self._path

    def abort(self) -> None:
        """Remove a link that has no name yet."""
        self._pool.shutdown(cancel_futures=True)
        self._file.close()
        shutil.rmtree(self._partial, ignore_errors=True)

    def _check_version(self) -> ChainLink | None:
        """Return the link that a delta continues; None for a full link."""
        newest = newest_version(self._directory)
        if self._version < 0 or (newest is not None and self._version <= newest):
            rule = (
                f"must be higher than the {newest} of {self._directory}"
                if newest is not None
                else "must not be negative"
            )
            raise UserError("version", self._version, rule, "count on, or remove the links of an earlier run first")
        if self._kind == "full":
            return None
        if newest is None:
            raise UserError(
                str(self._directory), None, "has no link that a delta could go on from", "write a full link"
            )
        links = find_links(self._directory)
        return read_link(links.get((newest, "full")) or links[newest, "delta"])

    def _old(self, name: str, tensor: Tensor) -> Tensor:
        """Return the tensor of the version before, after a check of type and shape."""
        assert self._since is not None and self._previous is not None
        stored = self._since.tensors.get(name)
        found = (str(tensor.dtype).removeprefix("torch."), tuple(tensor.shape))
        if stored is None or (stored.dtype, stored.shape) != found:
            expected = "no such tensor" if stored is None else f"{stored.dtype} {list(stored.shape)}"
            raise UserError(
                f"tensor {name}", f"{found[0]} {list(found[1])}", f"version {self._since.version} has {expected}",
                "write a full link",
            )  # fmt: skip
        old = self._previous(name)
        assert (old.dtype, old.shape) == (tensor.dtype, tensor.shape), f"{name}: {old.dtype} {tuple(old.shape)}"
        return old


def _frames(new: Bits, old: Bits) -> Iterator[tuple[Bits, Bits]]:
    for start in range(0, len(new), FRAME_ELEMENTS):
        yield new[start : start + FRAME_ELEMENTS], old[start : start + FRAME_ELEMENTS]

"""Torch's distributed checkpoints, described and read without holding a tensor in memory.

A ``.distcp`` file is a row of archives (archive.py), one for each chunk (a rectangle of a tensor). ``.metadata``, a pickle,
says which tensors there are, of which chunks, and in which bytes of which file each archive lies.
"""

from __future__ import annotations

import pickle
from collections import OrderedDict
from dataclasses import dataclass
from itertools import pairwise
from math import prod
from pathlib import Path, PurePosixPath
from typing import Any, BinaryIO

import torch
from torch import Tensor
from torch.distributed.checkpoint import filesystem
from torch.distributed.checkpoint import metadata as torch_metadata

from megatron_rl.convert.hf.mapped import MappedFile, as_dtype
from megatron_rl.convert.offline.archive import read_archive
from megatron_rl.convert.tables.kinds import Extent
from megatron_rl.errors import UserError

METADATA_FILE = ".metadata"
MAX_CHUNK_BYTES = 2**27
"""A loader reads whole chunks into memory, and an archive below 4 GiB needs no 64-bit zip fields."""

_SAVE_AGAIN = "copy or save the checkpoint again"


@dataclass(frozen=True)
class ArchivedChunk:
    """A rectangle of a stored tensor, and the archive that holds it."""

    start: Extent
    size: Extent
    file: str
    offset: int
    num_bytes: int
    """Size of the whole archive."""


@dataclass(frozen=True)
class Stored:
    """One tensor of a checkpoint."""

    dtype: torch.dtype
    extent: Extent
    chunks: tuple[ArchivedChunk, ...]


# ---------------------------------------------------------------------------------------------------------- writing


def pickled_metadata(tensors: dict[str, Stored], objects: dict[str, ArchivedChunk]) -> bytes:
    """Return the content of ``.metadata``.

    Args:
        tensors: by key.
        objects: unique keys of pickled objects, and where each lies (``start`` and ``size`` unused).
    """
    described: dict[str, Any] = {}
    places: dict[Any, Any] = {}
    for key, stored in tensors.items():
        described[key] = torch_metadata.TensorStorageMetadata(
            torch_metadata.TensorProperties(dtype=stored.dtype),
            torch.Size(stored.extent),
            [torch_metadata.ChunkStorageMetadata(torch.Size(c.start), torch.Size(c.size)) for c in stored.chunks],
        )
        for number, chunk in enumerate(stored.chunks):
            place = filesystem._StorageInfo(chunk.file, chunk.offset, chunk.num_bytes)
            places[torch_metadata.MetadataIndex(key, chunk.start, number)] = place
    for key, chunk in objects.items():
        described[key] = torch_metadata.BytesStorageMetadata()
        places[torch_metadata.MetadataIndex(key)] = filesystem._StorageInfo(chunk.file, chunk.offset, chunk.num_bytes)
    return pickle.dumps(torch_metadata.Metadata(described, planner_data={}, storage_data=places))


# ---------------------------------------------------------------------------------------------------------- reading


class Distcp:
    """The tensors of a checkpoint directory, readable by rectangles. Files are mapped, so nothing is loaded before.

    Nothing that the pickles name is executed: only the classes of the format are known, all else becomes an empty shell.

    Raises:
        UserError: no readable ``.metadata``, or files that are missing or cut short.
    """

    def __init__(self, directory: str | Path) -> None:
        self.directory = Path(directory)
        self.tensors: dict[str, Stored] = {}
        path = self.directory / METADATA_FILE
        try:
            with path.open("rb") as file:
                self._take(read_metadata(file))
        except FileNotFoundError as error:
            raise UserError(
                str(path),
                None,
                "is missing",
                "give the directory that Megatron's dist_checkpointing wrote (torch_dist)",
            ) from error
        except Exception as error:  # a pickle can fail in any way
            raise UserError(str(path), None, f"cannot be read ({error!r})", _SAVE_AGAIN) from error
        self._files: dict[str, MappedFile] = {}
        self._raw: dict[ArchivedChunk, tuple[torch.dtype, int, Extent]] = {}
        self._index: dict[tuple[str, int], dict[Extent, list[ArchivedChunk]]] = {}
        self._check_files()

    @property
    def files(self) -> list[Path]:
        """The .distcp files that hold tensors."""
        return [self.directory / name for name in sorted(self._files)]

    def read(self, key: str, index: Extent, first: int, last: int, columns: tuple[int, int] | None = None) -> Tensor:
        """Read rows [first, last) of a parameter: a view of the file if one chunk holds them all, else a copy.

        Args:
            key: of the stored tensor.
            index: of its leading dimensions.
            first: row, in the first dimension after those.
            last: row after the last one.
            columns: (first, last + 1) of the next dimension; None: all.
        """
        stored = self.tensors[key]
        rest = stored.extent[len(index) + 1 :]
        start = (first, *([columns[0]] if columns else []), *(0 for _ in rest[1 if columns else 0 :]))
        size = (last - first, *([columns[1] - columns[0]] if columns else []), *rest[1 if columns else 0 :])
        out: Tensor | None = None
        filled = 0
        for chunk in self._chunks(key, index):
            low = [max(a, b) for a, b in zip(start, chunk.start[len(index) :], strict=True)]
            high = [
                min(a + n, b + m)
                for a, n, b, m in zip(start, size, chunk.start[len(index) :], chunk.size[len(index) :], strict=True)
            ]
            if any(a >= b for a, b in zip(low, high, strict=True)):
                continue
            part = self._part(key, stored.dtype, chunk, index, low, high)
            if part.shape == torch.Size(size):
                return part
            out = torch.empty(size, dtype=stored.dtype) if out is None else out
            out[tuple(slice(a - s, b - s) for a, b, s in zip(low, high, start, strict=True))] = part
            filled += part.numel()
        assert out is not None and filled == prod(size), (
            f"{key}{list(index)}: chunks do not cover rows {first} to {last}"
        )
        return out

    def check_tiling(self, key: str) -> None:
        """Check that the chunks of a tensor cover it once.

        Raises:
            UserError: they do not.
        """
        stored = self.tensors[key]
        is_inside = all(
            a >= 0 and n >= 0 and a + n <= d for c in stored.chunks for a, n, d in zip(c.start, c.size, stored.extent)
        )
        area = sum(prod(chunk.size) for chunk in stored.chunks)
        if not is_inside or area != prod(stored.extent) or _has_overlap(stored):
            raise UserError(f"{self.directory}: {key}", None, "its chunks do not cover it exactly once", _SAVE_AGAIN)

    def announce(self, key: str, index: Extent) -> None:
        """Ask the system to start reading the chunks of this parameter."""
        for chunk in self._chunks(key, index):
            self._files[chunk.file].announce(chunk.offset, chunk.num_bytes)

    def _take(self, read: Any) -> None:
        places = {(index.fqn, tuple(index.offset or ())): place for index, place in read.storage_data.items()}
        for key, described in read.state_dict_metadata.items():
            if not isinstance(described, torch_metadata.TensorStorageMetadata):
                continue
            chunks = []
            for chunk in described.chunks:
                place = places[key, tuple(chunk.offsets)]
                if getattr(place, "transform_descriptors", None):
                    raise ValueError(f"{key} is compressed or encrypted")
                chunks.append(
                    ArchivedChunk(
                        tuple(chunk.offsets), tuple(chunk.sizes), place.relative_path, place.offset, place.length
                    )
                )
            self.tensors[key] = Stored(described.properties.dtype, tuple(described.size), tuple(chunks))

    def _check_files(self) -> None:
        for key, stored in self.tensors.items():
            for chunk in stored.chunks:
                path = self.directory / chunk.file
                if Path(chunk.file).name != chunk.file:  # would read outside the checkpoint
                    raise UserError(str(path), None, f"{METADATA_FILE} must name files beside it", _SAVE_AGAIN)
                if chunk.file not in self._files:
                    if not path.is_file():
                        raise UserError(str(path), None, f"is missing, but holds a part of {key}", _SAVE_AGAIN)
                    self._files[chunk.file] = MappedFile(path)
                if chunk.offset + chunk.num_bytes > self._files[chunk.file].num_bytes:
                    rule = f"ends before {key} does: it is cut short"
                    raise UserError(str(path), self._files[chunk.file].num_bytes, rule, _SAVE_AGAIN)

    def _chunks(self, key: str, index: Extent) -> list[ArchivedChunk]:
        """Return the chunks that hold something of this index."""
        buckets = self._index.get((key, len(index)))
        if buckets is None:
            buckets = {}
            for chunk in self.tensors[key].chunks:
                leads: list[Extent] = [()]
                for start, size in zip(chunk.start[: len(index)], chunk.size):
                    leads = [(*lead, start + step) for lead in leads for step in range(size)]
                for lead in leads:
                    buckets.setdefault(lead, []).append(chunk)
            self._index[key, len(index)] = buckets
        return buckets.get(index, [])

    def _part(
        self, key: str, dtype: torch.dtype, chunk: ArchivedChunk, index: Extent, low: list[int], high: list[int]
    ) -> Tensor:
        """Read the rectangle [low, high) of a chunk, in coordinates behind ``index``."""
        offset, strides = self._layout(key, dtype, chunk)
        starts = [*index, *low]
        sizes = [b - a for a, b in zip(low, high, strict=True)]
        kept = strides[len(index) :]
        first = (
            offset
            + sum((a - s) * step for a, s, step in zip(starts, chunk.start, strides, strict=True)) * dtype.itemsize
        )
        span = sum((n - 1) * step for n, step in zip(sizes, kept, strict=True)) + 1
        raw = self._files[chunk.file].bytes(first, span * dtype.itemsize)
        return as_dtype(raw, dtype, (span,)).as_strided(sizes, kept)

    def _layout(self, key: str, dtype: torch.dtype, chunk: ArchivedChunk) -> tuple[int, Extent]:
        """Return (offset of the first element in the file, strides in elements) of a chunk's tensor."""
        found = self._raw.get(chunk)
        if found is None:
            path = self._files[chunk.file].path
            try:
                found = read_archive(self._files[chunk.file], chunk.offset, chunk.num_bytes, chunk.size)
            except Exception as error:  # damaged bytes can fail in any way
                raise UserError(f"{path}: {key}", None, f"its archive cannot be read ({error})", _SAVE_AGAIN) from error
            if found[0] != dtype:
                raise UserError(f"{path}: {key}", str(found[0]), f"{METADATA_FILE} says {dtype}", _SAVE_AGAIN)
            self._raw[chunk] = found
        return found[1], found[2]


def _has_overlap(stored: Stored) -> bool:
    """Say whether chunks overlap. Few share a place in the leading dimensions; those are sorted and compared in pairs."""
    groups: dict[tuple[int, int], list[ArchivedChunk]] = {}
    for chunk in stored.chunks:
        if prod(chunk.size):
            groups.setdefault((chunk.start[0], chunk.size[0]) if chunk.start else (0, 1), []).append(chunk)
    bands = sorted(groups)
    if any(a + n > b and (a, n) != (b, m) for (a, n), (b, m) in pairwise(bands)):
        groups = {(0, 0): list(stored.chunks)}  # no clean bands: compare all
    for chunks in groups.values():
        ordered = sorted(chunks, key=lambda chunk: chunk.start)
        for position, one in enumerate(ordered):
            for other in ordered[position + 1 :]:
                ends = [a + n for a, n in zip(one.start, one.size, strict=True)]
                if len(ends) > 1 and len(groups) > 1 and other.start[1] >= ends[1]:
                    break  # of one band, sorted by the next dimension: no later one overlaps either
                if all(
                    a < e and b < a + n for a, n, b, e in zip(other.start, other.size, one.start, ends, strict=True)
                ):
                    return True
    return False


class _Shell:
    """Takes the place of every class that a reader of weights does not need: it keeps nothing and does nothing."""

    def __new__(cls, *_args: Any, **_kwargs: Any) -> _Shell:
        return super().__new__(cls)

    def __init__(self, *_args: Any, **_kwargs: Any) -> None:
        pass

    def __setstate__(self, _state: Any) -> None:
        pass

    def __setitem__(self, _key: Any, _value: Any) -> None:
        pass

    def append(self, _value: Any) -> None:
        """Drop a value, as a list would take it."""

    def extend(self, _values: Any) -> None:
        """Drop values, as a list would take them."""


_KNOWN: dict[tuple[str, str], Any] = {
    **{
        ("torch.distributed.checkpoint.metadata", name): getattr(torch_metadata, name)
        for name in (
            "Metadata", "TensorStorageMetadata", "BytesStorageMetadata", "TensorProperties", "ChunkStorageMetadata",
            "MetadataIndex", "StorageMeta", "_MEM_FORMAT_ENCODING",
        )
    },
    ("torch.distributed.checkpoint.filesystem", "_StorageInfo"): filesystem._StorageInfo,
    ("torch", "Size"): torch.Size,
    ("torch.serialization", "_get_layout"): torch.serialization._get_layout,
    ("collections", "OrderedDict"): OrderedDict,
    ("pathlib", "PosixPath"): PurePosixPath,
}  # fmt: skip


_HARMLESS = ("torch.distributed.checkpoint.", "megatron.core.dist_checkpointing.")
"""Beginnings of the modules whose further classes writers put into ``.metadata``."""


def read_metadata(file: BinaryIO, *, is_strict: bool = False) -> Any:
    """Read ``.metadata`` without executing anything that it names: classes beside those of the format become empty shells.

    Args:
        file: the open file.
        is_strict: refuse what no writer of checkpoints puts there.

    Raises:
        pickle.UnpicklingError: it names something else, and ``is_strict``.
    """
    return _MetadataUnpickler(file, is_strict).load()


class _MetadataUnpickler(pickle.Unpickler):
    """Reads ``.metadata``, knowing only the classes of the format."""

    def __init__(self, file: BinaryIO, is_strict: bool) -> None:
        super().__init__(file)
        self._is_strict = is_strict

    def find_class(self, module: str, name: str) -> Any:
        if module == "torch" and isinstance(getattr(torch, name, None), torch.dtype):
            return getattr(torch, name)
        if self._is_strict and (module, name) not in _KNOWN and not module.startswith(_HARMLESS):
            raise pickle.UnpicklingError(f"{METADATA_FILE} names {module}.{name}, which no checkpoint needs")
        return _KNOWN.get((module, name), _Shell)

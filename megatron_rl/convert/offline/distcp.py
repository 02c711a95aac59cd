"""The files of torch's distributed checkpoints, written and read without holding a tensor in memory.

A ``.distcp`` file is a row of archives, one a chunk (a rectangle of a tensor), each what ``torch.save`` writes: an uncompressed
zip file with a pickle of a few hundred bytes and the chunk's raw bytes. ``.metadata``, a pickle, says which tensors there
are, of which chunks, and in which bytes of which file each archive lies.

    archive:  data.pkl  byteorder  version  data/0 [raw bytes, at a multiple of 64]  central directory
"""

from __future__ import annotations

import io
import pickle
import struct
import zlib
from collections import OrderedDict
from collections.abc import Iterator
from dataclasses import dataclass
from functools import cached_property, lru_cache
from itertools import pairwise
from math import prod
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.distributed.checkpoint import filesystem
from torch.distributed.checkpoint import metadata as torch_metadata

from megatron_rl.convert.hf.mapped import MappedFile, as_dtype
from megatron_rl.convert.tables.kinds import Extent
from megatron_rl.errors import UserError

METADATA_FILE = ".metadata"
ALIGNMENT = 64
MAX_CHUNK_BYTES = 2**27
"""Whoever loads reads whole chunks into memory; and an archive of less than 4 GiB needs no 64-bit zip fields."""

_SAVE_AGAIN = "copy or save the checkpoint again"
_STORAGES = {torch.float32: "FloatStorage", torch.bfloat16: "BFloat16Storage", torch.float16: "HalfStorage"}
_LOCAL, _DESCRIPTOR, _CENTRAL, _END = b"PK\x03\x04", b"PK\x07\x08", b"PK\x01\x02", b"PK\x05\x06"
_END_64, _LOCATOR_64 = b"PK\x06\x06", b"PK\x06\x07"
_FLAGS = 0x0808
"""Checksum after the data, where it is known; names in UTF-8. What ``torch.save`` sets."""


@dataclass(frozen=True)
class Chunk:
    """A rectangle of a stored tensor, and the archive that holds it."""

    start: Extent
    size: Extent
    file: str
    offset: int
    num_bytes: int
    """Of the whole archive."""


@dataclass(frozen=True)
class Stored:
    """One tensor of a checkpoint."""

    dtype: torch.dtype
    extent: Extent
    chunks: tuple[Chunk, ...]


# ---------------------------------------------------------------------------------------------------------- writing


@dataclass(frozen=True)
class Archive:
    """What surrounds the raw bytes of one chunk."""

    head: bytes
    num_data_bytes: int

    @property
    def num_bytes(self) -> int:
        """Of the whole archive."""
        return len(self.head) + self.num_data_bytes + len(self.tail)

    @cached_property
    def tail(self) -> bytes:
        """What follows the raw bytes.

        Their CRC-32 is left 0: torch does not look at it, working it out takes longer than all else but the disk, and the
        manifest has a digest of every tensor.
        """
        records = [*_small_records(self.head), ("archive/data/0", self.head.rindex(_LOCAL), 0, self.num_data_bytes)]
        sizes = struct.pack("<III", 0, self.num_data_bytes, self.num_data_bytes)
        directory = b""
        for name, offset, checksum, size in records:
            directory += _CENTRAL + struct.pack(
                "<HHHHHHIIIHHHHHII", 0, 0, _FLAGS, 0, 0, 0, checksum, size, size, len(name), 0, 0, 0, 0, 0, offset
            ) + name.encode()  # fmt: skip
        start = len(self.head) + self.num_data_bytes + 16
        end = struct.pack("<HHHHIIH", 0, 0, len(records), len(records), len(directory), start, 0)
        return _DESCRIPTOR + sizes + directory + _END + end


def archive(dtype: torch.dtype, extent: Extent) -> Archive:
    """The archive of a contiguous tensor; ``head`` has a length that is a multiple of ``ALIGNMENT``."""
    return Archive(_head(dtype, extent), prod(extent) * dtype.itemsize)


@lru_cache(maxsize=256)
def _head(dtype: torch.dtype, extent: Extent) -> bytes:
    head = b""
    for name, content in (("data.pkl", _pickled(dtype, extent)), ("byteorder", b"little"), ("version", b"3\n")):
        head += _local_header(f"archive/{name}", b"") + content
        head += _DESCRIPTOR + struct.pack("<III", zlib.crc32(content), len(content), len(content))
    name = "archive/data/0"
    padding = -(len(head) + 30 + len(name) + 4) % ALIGNMENT
    return head + _local_header(name, b"FB" + struct.pack("<H", padding) + b"Z" * padding)


def _local_header(name: str, extra: bytes) -> bytes:
    return (
        _LOCAL + struct.pack("<HHHHHIIIHH", 0, _FLAGS, 0, 0, 0, 0, 0, 0, len(name), len(extra)) + name.encode() + extra
    )


def _small_records(head: bytes) -> Iterator[tuple[str, int, int, int]]:
    """(name, offset, checksum, size) of all records but the last, found again in the bytes of ``_head``."""
    offset = 0
    while (end := head.find(_DESCRIPTOR, offset)) >= 0:
        (name_length,) = struct.unpack_from("<H", head, offset + 26)
        checksum, size, _ = struct.unpack_from("<III", head, end + 4)
        yield head[offset + 30 : offset + 30 + name_length].decode(), offset, checksum, size
        offset = end + 16


class _StorageMark:
    """Stands for the raw bytes in the pickle of a tensor."""


class _TensorMark:
    def __init__(self, extent: Extent, mark: _StorageMark) -> None:
        self.extent, self.mark = extent, mark

    def __reduce__(self) -> tuple[Any, tuple[Any, ...]]:
        strides, size = [1] * len(self.extent), 1
        for axis in reversed(range(len(self.extent))):
            strides[axis], size = size, size * max(1, self.extent[axis])
        return torch._utils._rebuild_tensor_v2, (self.mark, 0, self.extent, tuple(strides), False, OrderedDict())


class _Pickler(pickle.Pickler):
    def __init__(self, file: io.BytesIO, dtype: torch.dtype, num_elements: int) -> None:
        super().__init__(file, protocol=2)
        self._storage = ("storage", getattr(torch, _STORAGES[dtype]), "0", "cpu", num_elements)

    def persistent_id(self, value: object) -> Any:
        return self._storage if isinstance(value, _StorageMark) else None


def _pickled(dtype: torch.dtype, extent: Extent) -> bytes:
    buffer = io.BytesIO()
    _Pickler(buffer, dtype, prod(extent)).dump(_TensorMark(extent, _StorageMark()))
    return buffer.getvalue()


def pickled_metadata(tensors: dict[str, Stored], objects: dict[str, Chunk]) -> bytes:
    """The content of ``.metadata``.

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
                read = _MetadataUnpickler(file).load()
            self._take(read)
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
        self._raw: dict[Chunk, tuple[torch.dtype, int, Extent]] = {}
        self._index: dict[tuple[str, int], dict[Extent, list[Chunk]]] = {}
        self._check_files()

    @property
    def files(self) -> list[Path]:
        """The .distcp files that hold tensors."""
        return [self.directory / name for name in sorted(self._files)]

    def read(self, key: str, index: Extent, first: int, last: int, columns: tuple[int, int] | None = None) -> Tensor:
        """Rows [first, last) of a parameter, as a view of the file where one chunk holds them all, else copied together.

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
        """The chunks of a tensor cover it once.

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
        """The chunks of this parameter will be read soon."""
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
                    Chunk(tuple(chunk.offsets), tuple(chunk.sizes), place.relative_path, place.offset, place.length)
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

    def _chunks(self, key: str, index: Extent) -> list[Chunk]:
        """The chunks that hold something of this index."""
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
        self, key: str, dtype: torch.dtype, chunk: Chunk, index: Extent, low: list[int], high: list[int]
    ) -> Tensor:
        """The rectangle [low, high) of a chunk, in coordinates behind ``index``."""
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

    def _layout(self, key: str, dtype: torch.dtype, chunk: Chunk) -> tuple[int, Extent]:
        """(offset of the first element in the file, strides in elements) of a chunk's tensor."""
        found = self._raw.get(chunk)
        if found is None:
            path = self._files[chunk.file].path
            try:
                found = _read_archive(self._files[chunk.file], chunk)
            except Exception as error:  # damaged bytes can fail in any way
                raise UserError(f"{path}: {key}", None, f"its archive cannot be read ({error})", _SAVE_AGAIN) from error
            if found[0] != dtype:
                raise UserError(f"{path}: {key}", str(found[0]), f"{METADATA_FILE} says {dtype}", _SAVE_AGAIN)
            self._raw[chunk] = found
        return found[1], found[2]


def _has_overlap(stored: Stored) -> bool:
    """Sorted by the start of each, chunks of one place in the leading dimensions are few: those are compared in pairs."""
    groups: dict[tuple[int, int], list[Chunk]] = {}
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


def _read_archive(file: MappedFile, chunk: Chunk) -> tuple[torch.dtype, int, Extent]:
    """(dtype, offset of the first element in the file, strides) of an archive that ``torch.save`` wrote."""
    records = _directory(file, chunk)
    names = {name.partition("/")[2]: place for name, place in records.items()}
    if "byteorder" in names and _content(file, chunk, names["byteorder"]) not in (b"", b"little"):
        raise ValueError("big-endian")
    tensor = _TensorUnpickler(io.BytesIO(_content(file, chunk, names["data.pkl"]))).load()
    if not isinstance(tensor, _Described) or tensor.extent != chunk.size:
        raise ValueError(f"holds {getattr(tensor, 'extent', 'no tensor')}, not {chunk.size}")
    start, size = _span(file, chunk, names[f"data/{tensor.storage}"])
    last = tensor.offset + sum((n - 1) * step for n, step in zip(tensor.extent, tensor.strides, strict=True))
    if prod(tensor.extent) and (last + 1) * tensor.dtype.itemsize > size:
        raise ValueError("its storage is cut short")
    return tensor.dtype, start + tensor.offset * tensor.dtype.itemsize, tensor.strides


def _directory(file: MappedFile, chunk: Chunk) -> dict[str, tuple[int, int]]:
    """name -> (offset of the local header in the archive, size of the content)."""
    tail_bytes = min(chunk.num_bytes, 2**16)
    tail = bytes(file.bytes(chunk.offset + chunk.num_bytes - tail_bytes, tail_bytes).numpy().data)
    end = tail.rindex(_END)
    count, _, size, start = struct.unpack_from("<HHII", tail, end + 8)
    if (locator := tail.rfind(_LOCATOR_64, 0, end)) == end - 20:
        (at,) = struct.unpack_from("<Q", tail, locator + 8)
        wide = bytes(file.bytes(chunk.offset + at, 56).numpy().data)
        if wide[:4] != _END_64:
            raise ValueError("no central directory")
        count, _, size, start = struct.unpack_from("<QQQQ", wide, 24)
    directory = bytes(file.bytes(chunk.offset + start, size).numpy().data)
    found, at = {}, 0
    for _ in range(count):
        if directory[at : at + 4] != _CENTRAL:
            raise ValueError("no central directory")
        method, stored, real = (
            struct.unpack_from("<H", directory, at + 10)[0], *struct.unpack_from("<II", directory, at + 20)
        )  # fmt: skip
        lengths = struct.unpack_from("<HHH", directory, at + 28)
        (offset,) = struct.unpack_from("<I", directory, at + 42)
        name = directory[at + 46 : at + 46 + lengths[0]].decode()
        extra = directory[at + 46 + lengths[0] : at + 46 + lengths[0] + lengths[1]]
        stored, real, offset = _widen(extra, stored, real, offset)
        if method != 0 or stored != real:
            raise ValueError(f"{name} is compressed")
        found[name] = (offset, real)
        at += 46 + sum(lengths)
    return found


def _widen(extra: bytes, stored: int, real: int, offset: int) -> tuple[int, int, int]:
    """Fields of 32 bits that are full have their value in a zip64 extra field."""
    at = 0
    while at + 4 <= len(extra):
        kind, length = struct.unpack_from("<HH", extra, at)
        if kind == 1:
            wide = list(struct.unpack_from(f"<{length // 8}Q", extra, at + 4))
            real = wide.pop(0) if real == 0xFFFFFFFF else real
            stored = wide.pop(0) if stored == 0xFFFFFFFF else stored
            offset = wide.pop(0) if offset == 0xFFFFFFFF else offset
        at += 4 + length
    return stored, real, offset


def _span(file: MappedFile, chunk: Chunk, record: tuple[int, int]) -> tuple[int, int]:
    """(offset in the file, size) of a record's content."""
    offset, size = record
    header = bytes(file.bytes(chunk.offset + offset, 30).numpy().data)
    if header[:4] != _LOCAL:
        raise ValueError("no record where the directory says")
    start = chunk.offset + offset + 30 + sum(struct.unpack_from("<HH", header, 26))
    if start + size > chunk.offset + chunk.num_bytes:
        raise ValueError("a record ends behind the archive")
    return start, size


def _content(file: MappedFile, chunk: Chunk, record: tuple[int, int]) -> bytes:
    return bytes(file.bytes(*_span(file, chunk, record)).numpy().data)


@dataclass
class _Described:
    """What the pickle of a tensor says."""

    dtype: torch.dtype
    storage: str
    offset: int
    extent: Extent
    strides: Extent


def _describe(storage: tuple[torch.dtype, str], offset: int, extent: Any, strides: Any, *_: Any) -> _Described:
    return _Described(storage[0], storage[1], offset, tuple(extent), tuple(strides))


_DTYPE_OF_STORAGE = {name: dtype for dtype, name in _STORAGES.items()} | {
    "DoubleStorage": torch.float64, "LongStorage": torch.int64, "IntStorage": torch.int32,
    "ByteStorage": torch.uint8, "BoolStorage": torch.bool,
}  # fmt: skip


class _TensorUnpickler(pickle.Unpickler):
    """Reads where a tensor's bytes are, not the bytes."""

    def find_class(self, module: str, name: str) -> Any:
        if (module, name) == ("torch._utils", "_rebuild_tensor_v2"):
            return _describe
        if (module, name) == ("collections", "OrderedDict"):
            return OrderedDict
        if (module, name) == ("torch", "Size"):
            return tuple
        if module == "torch" and name in _DTYPE_OF_STORAGE:
            return _DTYPE_OF_STORAGE[name]
        raise pickle.UnpicklingError(f"{module}.{name} is not expected in a tensor")

    def persistent_load(self, identity: Any) -> tuple[torch.dtype, str]:
        return identity[1], identity[2]


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
        """As a list."""

    def extend(self, _values: Any) -> None:
        """As a list."""


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
}  # fmt: skip


class _MetadataUnpickler(pickle.Unpickler):
    """Knows the classes of the format."""

    def find_class(self, module: str, name: str) -> Any:
        if module == "torch" and isinstance(getattr(torch, name, None), torch.dtype):
            return getattr(torch, name)
        return _KNOWN.get((module, name), _Shell)

"""One archive of a ``.distcp`` file: the bytes around a tensor, written without ``torch.save`` and read without its data.

    data.pkl  byteorder  version  data/0 [raw bytes, at a multiple of 64]  central directory

It is an uncompressed zip file. The pickle, a few hundred bytes, says dtype, extent and strides.
"""

from __future__ import annotations

import io
import os
import pickle
import struct
import zipfile
import zlib
from collections import OrderedDict
from collections.abc import Iterator
from dataclasses import dataclass
from functools import cached_property, lru_cache
from math import prod
from typing import IO, Any, cast

import torch
from torch import Tensor

from megatron_rl.convert.hf.mapped import MappedFile
from megatron_rl.convert.tables.kinds import Extent

ALIGNMENT = 64

_STORAGES = {torch.float32: "FloatStorage", torch.bfloat16: "BFloat16Storage", torch.float16: "HalfStorage"}
_LOCAL, _DESCRIPTOR, _CENTRAL, _END = b"PK\x03\x04", b"PK\x07\x08", b"PK\x01\x02", b"PK\x05\x06"
_FLAGS = 0x0808
"""The flags that ``torch.save`` sets: the checksum stands after the data, names are in UTF-8."""


# ---------------------------------------------------------------------------------------------------------- writing


@dataclass(frozen=True)
class Archive:
    """The bytes around the raw bytes of one chunk."""

    head: bytes
    num_data_bytes: int

    @property
    def num_bytes(self) -> int:
        """Size of the whole archive."""
        return len(self.head) + self.num_data_bytes + len(self.tail)

    @cached_property
    def tail(self) -> bytes:
        """The bytes after the raw bytes.

        The CRC-32 of the raw bytes is left 0: torch does not look at it, computing it costs most after the disk, and the
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


def archive_of(dtype: torch.dtype, extent: Extent) -> Archive:
    """Return the archive of a contiguous tensor; the length of ``head`` is a multiple of ``ALIGNMENT``."""
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
    """Yield (name, offset, checksum, size) of all records but the last, found again in the bytes of ``_head``."""
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


# ---------------------------------------------------------------------------------------------------------- reading


def read_archive(file: MappedFile, offset: int, num_bytes: int, extent: Extent) -> tuple[torch.dtype, int, Extent]:
    """Find the raw bytes of a tensor that ``torch.save`` wrote.

    Args:
        file: holds the archive.
        offset: of the archive in the file.
        num_bytes: of the whole archive.
        extent: expected.

    Returns:
        The dtype, the offset of the first element in the file, and the strides in elements.

    Raises:
        Exception: of any kind, where the bytes are damaged or of another format.
    """
    view = _View(file, offset, num_bytes)
    with zipfile.ZipFile(view) as archive:
        records = archive.infolist()
        if any(record.compress_type != zipfile.ZIP_STORED for record in records):
            raise ValueError("it is compressed")
        for name in archive.namelist():  # torch would swap the bytes of a tensor that has none, and crash
            if name.endswith("/byteorder") and archive.read(name) != b"little":
                raise ValueError("it is big-endian")
    view.seek(0)
    # On the device "meta" nothing but the pickle is read, and each storage carries its place in the archive.
    try:
        tensor = torch.load(cast(IO[bytes], view), map_location="meta", weights_only=True)
    except pickle.UnpicklingError as error:  # its text is a page of advice
        raise ValueError("it holds more than a tensor") from error
    if not isinstance(tensor, Tensor) or tuple(tensor.shape) != extent:
        raise ValueError(f"it holds {getattr(tensor, 'shape', 'no tensor')}, not {extent}")
    storage = tensor.untyped_storage()
    start = storage._checkpoint_offset
    assert start is not None
    record = max(
        (record for record in records if record.header_offset < start), key=lambda record: record.header_offset
    )
    if storage.nbytes() > record.file_size:
        raise ValueError("its storage is cut short")
    return tensor.dtype, offset + start + int(tensor.storage_offset()) * tensor.dtype.itemsize, tensor.stride()


class _View(io.RawIOBase):
    """A range of a mapped file, as a file of its own."""

    def __init__(self, file: MappedFile, offset: int, num_bytes: int) -> None:
        self._file, self._offset, self._num_bytes, self._position = file, offset, num_bytes, 0

    def readable(self) -> bool:
        """Say that it can be read."""
        return True

    def seekable(self) -> bool:
        """Say that any position can be reached."""
        return True

    def seek(self, offset: int, whence: int = os.SEEK_SET) -> int:
        """Go to a position; return it."""
        origin = {os.SEEK_SET: 0, os.SEEK_CUR: self._position, os.SEEK_END: self._num_bytes}[whence]
        if origin + offset < 0:
            raise OSError("before the start of the archive")
        self._position = origin + offset
        return self._position

    def readinto(self, buffer: Any) -> int:
        """Fill a buffer from the position on; return the number of bytes."""
        count = max(0, min(len(buffer), self._num_bytes - self._position))
        buffer[:count] = self._file.bytes(self._offset + self._position, count).numpy().data
        self._position += count
        return count

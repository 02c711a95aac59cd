"""HF safetensors <-> Megatron torch_dist on disk: streaming, several files at a time, resumable, digests taken on the way.

    HF files --mapped--> blocks of rows --cast, digest--> chunks of .distcp files --synced--> renamed
    .distcp  --mapped--> blocks of rows --cast, digest--> safetensors files       --synced--> renamed

Neither a model nor a process group is built, and no tensor is ever whole in memory: where nothing is cast, pages go from
one file to the other.
"""

from __future__ import annotations

import io
import json
import os
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from math import prod
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from megatron_rl.convert.architecture.shape import Dtype, ModelShape
from megatron_rl.convert.hf.checkpoint_view import exported_config
from megatron_rl.convert.hf.mapped import dtype_name, dtype_of, row_blocks
from megatron_rl.convert.hf.writer import carry_companions, check_source, dtype_fields, plan_files, write_index
from megatron_rl.convert.offline.archive import ALIGNMENT, archive_of
from megatron_rl.convert.offline.distcp import (
    MAX_CHUNK_BYTES,
    METADATA_FILE,
    ArchivedChunk,
    Stored,
    pickled_metadata,
)
from megatron_rl.convert.offline.manifest import MANIFEST_FILE, Fingerprint, write_manifest
from megatron_rl.convert.offline.partial import BufferedStream, FilePart, PartialDirectory, part_bytes
from megatron_rl.convert.offline.reporter import Reporter
from megatron_rl.convert.offline.sources import HF_FOLDER, CheckpointSource, HFSource, MegatronSource
from megatron_rl.convert.offline.torch_dist import LayerSpec, Slot, StoredLayout, parameter_extent, runs
from megatron_rl.convert.tables.digest import MASK, digest
from megatron_rl.convert.tables.kinds import Extent
from megatron_rl.convert.tables.table import Entry, float32_tensors
from megatron_rl.errors import UserError

_MAX_SHARD_BYTES = 4 * 10**9
_MIN_SHARD_BYTES = 256 * 10**6
_WANTED_SHARDS = 8
_OBJECT_FILE = "__0_1.distcp"
_FORMAT_VERSION = 1


@dataclass(frozen=True)
class Converted:
    """The result of a conversion."""

    directory: Path
    shape: ModelShape
    tensors: dict[str, Fingerprint]
    """Content of the manifest, by HF name."""
    num_bytes: int
    """Size of all files of tensors."""


def default_threads() -> int:
    """Return a number that keeps the disk busy while other threads wait for it; each needs a few MB."""
    return min(8, 2 * (os.cpu_count() or 1))


# ------------------------------------------------------------------------------------------------------- HF -> Megatron


@dataclass(frozen=True)
class _ChunkRows:
    """Rows [first, last) of a parameter, which become one chunk."""

    entry: Entry
    slot: Slot
    first: int
    last: int
    offset: int
    is_counted: bool
    """False for the second place of a parameter that is stored under two names."""


def import_hf(
    source: str | Path,
    target: str | Path,
    *,
    dtype: Dtype | None = None,
    layer_spec: LayerSpec = "both",
    num_threads: int | None = None,
    reporter: Reporter | None = None,
) -> Converted:
    """Write a Hugging Face checkpoint as a Megatron ``torch_dist`` checkpoint, for any parallel layout.

    Args:
        source: directory of the checkpoint.
        target: the new directory; must not exist, or be empty. The same call again goes on where a killed one stopped.
        dtype: cast to this type; None: as stored. What Megatron keeps in float32 stays float32.
        layer_spec: of the models that will load it; see ``torch_dist``.
        num_threads: files written at a time; None: ``default_threads``.
        reporter: for progress.

    Raises:
        UserError: before anything is written, if the source is incomplete, damaged or at odds with its config.json, or the
            target is taken or too small. While writing: the disk fails, or a value does not fit the type.
    """
    reporter = reporter or Reporter()
    hf = HFSource(source)
    layout = StoredLayout(hf.shape, layer_spec)
    layout.check()
    if hf.view.dropped:
        reporter.say(hf.view.summary())
    dtypes = _stored_dtypes(layout, hf, dtype)
    parts, tensors = _plan_import(layout, dtypes)
    objects, object_bytes = _plan_objects(layout)
    identity = {
        "format": _FORMAT_VERSION, "from": "hf", "dtype": dtype, "layer_spec": layer_spec,
        "source": _identity([Path(source) / "config.json", *hf.files]),
    }  # fmt: skip
    file_bytes = {part.file: part.num_bytes for part in parts} | ({_OBJECT_FILE: len(object_bytes)} if objects else {})
    total_bytes = sum(part.num_bytes for part in parts)
    partial = PartialDirectory(target, identity, file_bytes, reporter)
    try:
        reporter.begin("HF -> Megatron", total_bytes)
        fill = _ImportFill(hf, dtypes)
        partial.write(parts, fill, num_threads=num_threads or default_threads())
        found = _fingerprints(
            hf, partial.digests, {name: dtypes[e.name] for e in layout.entries for name in e.hf_names}
        )
        (partial.path / METADATA_FILE).write_bytes(pickled_metadata(tensors, objects))
        if objects:
            (partial.path / _OBJECT_FILE).write_bytes(object_bytes)
        torch.save({}, partial.path / "common.pt")
        backend = {"sharded_backend": "torch_dist", "sharded_backend_version": 1}
        backend |= {"common_backend": "torch", "common_backend_version": 1}
        (partial.path / "metadata.json").write_text(json.dumps(backend), encoding="utf-8")
        (partial.path / HF_FOLDER).mkdir(exist_ok=True)
        _carry(hf, partial.path / HF_FOLDER, dtype)
        write_manifest(partial.path / MANIFEST_FILE, found)
        partial.finish()
    except OSError as error:
        raise partial.failed(error) from error
    finally:
        reporter.end()
        partial.close()
    return Converted(partial.target, hf.shape, found, total_bytes)


def _stored_dtypes(layout: StoredLayout, source: CheckpointSource, dtype: Dtype | None) -> dict[str, torch.dtype]:
    """Return the type of every parameter; those that share a stored tensor must share it.

    Raises:
        UserError: tensors that become one have several types, and none was given.
    """
    found: dict[str, torch.dtype] = {}
    by_key: dict[str, tuple[torch.dtype, str]] = {}
    for entry in layout.entries:
        for name in entry.hf_names:
            kind = source.dtype(name)
            if dtype is not None:
                kind = torch.float32 if entry.is_float32 else dtype_of(dtype)
            for slot in layout.slots[entry.name]:
                known, other = by_key.setdefault(slot.key, (kind, name))
                if known != kind:
                    raise UserError(
                        f"{source.directory}: {name}",
                        dtype_name(kind),
                        f"becomes one tensor with {other}, which is {dtype_name(known)}",
                        "name one type for all with --dtype",
                    )
            found[entry.name] = kind
    return found


def _plan_import(
    layout: StoredLayout, dtypes: Mapping[str, torch.dtype]
) -> tuple[list[FilePart[list[_ChunkRows]]], dict[str, Stored]]:
    """Plan the files, one a part, and the tensors in them."""
    parts: list[FilePart[list[_ChunkRows]]] = []
    pieces: list[_ChunkRows] = []
    chunks: dict[str, list[ArchivedChunk]] = {key: [] for key in layout.extents}
    position = 0
    limit = part_bytes(sum(prod(parameter_extent(e, layout.shape)) * dtypes[e.name].itemsize for e in layout.entries))

    def close() -> None:
        nonlocal pieces, position
        if pieces:
            parts.append(FilePart(len(parts), f"__{len(parts)}_0.distcp", pieces, position))
            pieces, position = [], 0

    kinds: dict[str, torch.dtype] = {}
    for entry in layout.entries:
        dtype, extent = dtypes[entry.name], parameter_extent(entry, layout.shape)
        for number, slot in enumerate(layout.slots[entry.name]):
            kinds[slot.key] = dtype
            for first, last in row_blocks(extent, dtype.itemsize, MAX_CHUNK_BYTES):
                size = (*(1 for _ in slot.index), last - first, *extent[1:])
                length = archive_of(dtype, size).num_bytes
                if position and position + length > limit:
                    close()
                start = (*slot.index, first, *(0 for _ in extent[1:]))
                chunks[slot.key].append(ArchivedChunk(start, size, f"__{len(parts)}_0.distcp", position, length))
                pieces.append(_ChunkRows(entry, slot, first, last, position, number == 0))
                position += length + -length % ALIGNMENT
    close()
    tensors = {key: Stored(kinds[key], extent, tuple(chunks[key])) for key, extent in layout.extents.items()}
    return parts, tensors


def _plan_objects(layout: StoredLayout) -> tuple[dict[str, ArchivedChunk], bytes]:
    """Place the ``_extra_state`` objects. Each is None, so all share the bytes of a list of the one object a rank asks for."""
    buffer = io.BytesIO()
    torch.save([None], buffer)
    place = ArchivedChunk((), (), _OBJECT_FILE, 0, len(buffer.getvalue()))
    return dict.fromkeys(layout.objects, place), buffer.getvalue()


class _ImportFill:
    """Writes the pieces of one .distcp file."""

    def __init__(self, source: HFSource, dtypes: Mapping[str, torch.dtype]) -> None:
        self._source, self._dtypes = source, dtypes

    def __call__(
        self, part: FilePart[list[_ChunkRows]], descriptor: int, advance: Callable[[int], None]
    ) -> dict[str, int]:
        found: dict[str, int] = {}
        shape = self._source.shape
        for piece in part.content:
            dtype = self._dtypes[piece.entry.name]
            extent = parameter_extent(piece.entry, shape)
            frame = archive_of(dtype, (*(1 for _ in piece.slot.index), piece.last - piece.first, *extent[1:]))
            stream = BufferedStream(descriptor, piece.offset)
            stream.write(frame.head)
            for run in runs(piece.entry, shape):
                low, high = max(piece.first, run.row), min(piece.last, run.row + run.num_rows)
                if low >= high:
                    continue
                shift = run.hf_row - run.row
                for start, block in self._source.blocks(run.hf_name, low + shift, high + shift):
                    block = cast(run.hf_name, block, dtype)
                    if piece.is_counted:
                        _add(found, run.hf_name, block, start, self._source.extents[run.hf_name])
                    stream.write(as_bytes(block))
            stream.write(frame.tail)
            stream.flush()
            advance(frame.num_bytes + -frame.num_bytes % ALIGNMENT)
        return found


# ------------------------------------------------------------------------------------------------------- Megatron -> HF


@dataclass(frozen=True)
class _Rows:
    """Rows [first, last) of an HF tensor, and where they go in its file."""

    name: str
    first: int
    last: int
    offset: int


def export_hf(
    source: str | Path,
    target: str | Path,
    *,
    config_from: str | Path | None = None,
    dtype: Dtype | None = None,
    max_shard_bytes: int | None = None,
    num_threads: int | None = None,
    reporter: Reporter | None = None,
) -> Converted:
    """Write the model weights of a Megatron ``torch_dist`` checkpoint as a Hugging Face checkpoint.

    Args:
        source: the checkpoint (``sources.find_weights`` says where in it weights are looked for).
        target: the new directory; must not exist, or be empty. The same call again goes on where a killed one stopped.
        config_from: directory with config.json and tokenizer; None: what the checkpoint brings along.
        dtype: cast to this type; None: as stored. What checkpoints keep in float32 stays float32.
        max_shard_bytes: limit of one file; a larger tensor has a file of its own. None: an eighth of the whole, but at least
            256 MB and at most 4 GB: threads that write to files of their own do not wait for each other.
        num_threads: ranges of files written at a time; None: ``default_threads``.
        reporter: for progress.

    Raises:
        UserError: as ``import_hf``.
    """
    reporter = reporter or Reporter()
    megatron = MegatronSource(source, config_from=config_from)
    check_source(megatron.hf_directory)
    kept = float32_tensors(megatron.shape)
    dtypes = {
        name: megatron.dtype(name) if dtype is None else torch.float32 if name in kept else dtype_of(dtype)
        for name in megatron.extents
    }
    layout = {name: (extent, dtypes[name]) for name, extent in megatron.extents.items()}
    if max_shard_bytes is None:
        total_bytes = sum(prod(extent) * dtype.itemsize for extent, dtype in layout.values())
        max_shard_bytes = min(max(total_bytes // _WANTED_SHARDS, _MIN_SHARD_BYTES), _MAX_SHARD_BYTES)
    places, headers = plan_files(layout, max_shard_bytes)
    ends = {file: len(header) for file, header in headers.items()}
    for place in places.values():
        ends[place.file] = max(ends[place.file], place.offset + prod(place.shape) * place.dtype.itemsize)
    parts = _plan_export(layout, {name: (place.file, place.offset) for name, place in places.items()})
    identity = {
        "format": _FORMAT_VERSION, "from": "megatron", "dtype": dtype, "max_shard_bytes": max_shard_bytes,
        "source": _identity([megatron.hf_directory / "config.json", *megatron.files]),
    }  # fmt: skip
    partial = PartialDirectory(target, identity, ends, reporter)
    try:
        reporter.begin("Megatron -> HF", sum(part.num_bytes for part in parts))
        partial.write(parts, _ExportFill(megatron, dtypes), num_threads=num_threads or default_threads())
        for file, header in headers.items():
            with (partial.path / file).open("r+b") as handle:
                handle.write(header)
        found = _fingerprints(megatron, partial.digests, dtypes)
        write_index(partial.path, places)
        _carry(megatron, partial.path, dtype or dtype_name(next(iter(dtypes.values()))))
        write_manifest(partial.path / MANIFEST_FILE, found)
        partial.finish()
    except OSError as error:
        raise partial.failed(error) from error
    finally:
        reporter.end()
        partial.close()
    return Converted(partial.target, megatron.shape, found, sum(part.num_bytes for part in parts))


def _plan_export(
    layout: Mapping[str, tuple[Extent, torch.dtype]], places: Mapping[str, tuple[str, int]]
) -> list[FilePart[list[_Rows]]]:
    parts: list[FilePart[list[_Rows]]] = []
    rows: list[_Rows] = []
    held, file = 0, ""
    limit = part_bytes(sum(prod(extent) * dtype.itemsize for extent, dtype in layout.values()))

    def close() -> None:
        nonlocal rows, held
        if rows:
            parts.append(FilePart(len(parts), file, rows, held))
            rows, held = [], 0

    for name, (extent, dtype) in sorted(layout.items(), key=lambda item: places[item[0]]):
        row_bytes = prod(extent[1:]) * dtype.itemsize
        for first, last in row_blocks(extent, dtype.itemsize, limit):
            num_bytes = (last - first) * row_bytes
            if places[name][0] != file or held + num_bytes > limit:
                close()
                file = places[name][0]
            rows.append(_Rows(name, first, last, places[name][1] + first * row_bytes))
            held += num_bytes
    close()
    return parts


class _ExportFill:
    """Writes a range of one safetensors file."""

    def __init__(self, source: MegatronSource, dtypes: Mapping[str, torch.dtype]) -> None:
        self._source, self._dtypes = source, dtypes

    def __call__(self, part: FilePart[list[_Rows]], descriptor: int, advance: Callable[[int], None]) -> dict[str, int]:
        found: dict[str, int] = {}
        for rows in part.content:
            extent, dtype = self._source.extents[rows.name], self._dtypes[rows.name]
            stream, num_bytes = BufferedStream(descriptor, rows.offset), 0
            for start, block in self._source.blocks(rows.name, rows.first, rows.last):
                block = cast(rows.name, block, dtype)
                _add(found, rows.name, block, start, extent)
                data = as_bytes(block)
                num_bytes += len(data)
                stream.write(data)
            stream.flush()
            advance(num_bytes)
        return found


# -------------------------------------------------------------------------------------------------------------- shared


def cast(name: str, block: Tensor, dtype: torch.dtype) -> Tensor:
    """Convert a block to another type.

    Raises:
        UserError: a finite value becomes infinite.
    """
    if block.dtype == dtype:
        return block
    result = block.to(dtype)
    if dtype == torch.float16 and bool((result.isinf() & ~block.isinf()).any()):
        raise UserError(
            "dtype", "float16", f"cannot hold a value of {name}, which is beyond 65504", "use bfloat16 or float32"
        )  # fmt: skip
    return result


def as_bytes(block: Tensor) -> memoryview:
    """Return the bytes of a tensor, copied only if they do not follow one another."""
    return block.contiguous().reshape(-1).view(torch.uint8).numpy().data


def block_digests(source: CheckpointSource, name: str, dtype: torch.dtype | None = None) -> Iterator[tuple[int, int]]:
    """Yield (digest, bytes) of each block of an HF tensor, cast to a type if one is given."""
    extent = source.extents[name]
    for start, block in source.blocks(name, 0, extent[0]):
        block = block if dtype is None else cast(name, block, dtype)
        yield digest(name, block, (start, *(0 for _ in extent[1:])), extent), block.numel() * block.element_size()


def _add(found: dict[str, int], name: str, block: Tensor, first: int, extent: Extent) -> None:
    start = (first, *(0 for _ in extent[1:]))
    found[name] = (found.get(name, 0) + digest(name, block, start, extent)) & MASK


def _fingerprints(
    source: CheckpointSource, digests: Mapping[str, int], dtypes: Mapping[str, torch.dtype]
) -> dict[str, Fingerprint]:
    assert digests.keys() == source.extents.keys(), "a tensor was not written"
    return {
        name: Fingerprint(dtype_name(dtypes[name]), extent, digests[name]) for name, extent in source.extents.items()
    }


def _carry(source: CheckpointSource, target: Path, dtype: Dtype | None) -> None:
    """Write config.json, adapted to the weights written, and the tokenizer."""
    carry_companions(source.hf_directory, target)
    text = (source.hf_directory / "config.json").read_text(encoding="utf-8")
    before: dict[str, Any] = json.loads(text)
    after = exported_config(before)
    if dtype is not None:
        after |= dtype_fields(before, dtype)
    (target / "config.json").write_text(
        text if after == before else json.dumps(after, indent=2) + "\n", encoding="utf-8"
    )


def _identity(files: list[Path]) -> list[list[Any]]:
    """Return path, size and time of files, which tell them from others without reading."""
    return [[str(path.absolute()), path.stat().st_size, path.stat().st_mtime_ns] for path in files]

"""A checkpoint of either format as a source of Hugging Face tensors, read block by block by conversion and verification.

HFSource          a Hugging Face directory
MegatronSource    a torch_dist directory: written by a conversion, by the trainer (<step>/model), or by NeMo 2 (weights/)
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from math import prod
from pathlib import Path
from typing import Protocol

import torch
from torch import Tensor

from megatron_rl.convert.architecture.shape import ModelShape, read_shape
from megatron_rl.convert.hf.checkpoint_view import CheckpointView
from megatron_rl.convert.hf.load import check_coverage
from megatron_rl.convert.hf.mapped import MappedHF, row_blocks
from megatron_rl.convert.hf.reader import HFReader
from megatron_rl.convert.offline.distcp import METADATA_FILE, Distcp
from megatron_rl.convert.offline.torch_dist import (
    RowRun,
    Slot,
    StoredLayout,
    hf_extents,
    parameter_extent,
    runs,
    stored_names,
)
from megatron_rl.convert.tables.kinds import Extent
from megatron_rl.convert.tables.table import Entry, float32_tensors
from megatron_rl.errors import UserError

HF_FOLDER = "hf"
"""Folder in a Megatron directory of ours with config.json and tokenizer, so that an export needs nothing else."""

_FLOATS = {torch.float32: "float32", torch.bfloat16: "bfloat16", torch.float16: "float16"}
_NOT_WEIGHTS = re.compile(
    r"(^|\.)(optimizer\.|_extra_state|rng_state|rerun_state|opt_param_scheduler|lr_scheduler)|^chained_\d+\."
)
"""Keys of a training checkpoint that an export leaves out."""
_HF_FILES = (
    "*.safetensors",
    "*.safetensors.index.json",
    "pytorch_model*.bin",
    "pytorch_model.bin.index.json",
    "*.gguf",
)
_EMBEDDING = "embedding.word_embeddings.weight"


class CheckpointSource(Protocol):
    """A source of the tensors of a model."""

    directory: Path
    hf_directory: Path
    """Directory of config.json and tokenizer."""
    shape: ModelShape
    extents: dict[str, Extent]
    """Extent of every HF tensor, in the order of the model."""

    def dtype(self, name: str) -> torch.dtype:
        """Return the type of the values that ``blocks`` gives: the stored one."""
        ...

    def blocks(self, name: str, first: int, last: int) -> Iterator[tuple[int, Tensor]]:
        """Yield (first row, whole rows) of rows [first, last) of an HF tensor, in order; views of a file if possible."""
        ...


class HFSource:
    """A Hugging Face checkpoint, proved to be complete: every tensor is there, used and of the shape of config.json.

    Raises:
        UserError: otherwise.
    """

    def __init__(self, directory: str | Path) -> None:
        self.directory = self.hf_directory = Path(directory)
        self.shape = read_shape(directory)
        reader = HFReader(directory)
        self.files = reader.files
        self.view = CheckpointView(reader, self.shape)
        check_coverage(self.shape, self.view)
        self._mapped = MappedHF(reader)
        self._float32 = float32_tensors(self.shape)
        self.extents = hf_extents(StoredLayout(self.shape))

    def dtype(self, name: str) -> torch.dtype:
        """Return the stored type; an 8-bit weight is made whole in the type that config.json gives."""
        if name in self._mapped:
            return self._mapped.dtype(name)
        return getattr(torch, self.shape.dtype)

    def blocks(self, name: str, first: int, last: int) -> Iterator[tuple[int, Tensor]]:
        """Yield the rows of an HF tensor, block by block."""
        extent, dtype = self.extents[name], self.dtype(name)
        if name in self._mapped:
            self._mapped.announce(name, first, last)
        for start, end in row_blocks((last - first, *extent[1:]), dtype.itemsize):
            start, end = start + first, end + first
            if name in self._mapped:
                yield start, self._mapped.rows(name, start, end)
            else:
                slices = (slice(start, end), *(slice(0, size) for size in extent[1:]))
                yield start, self.view.read(name, slices).to(dtype)


class MegatronSource:
    """The model weights of a torch_dist checkpoint, proved to be complete for a config.json.

    Args:
        directory: the checkpoint, or a directory that holds it (see ``find_weights``).
        config_from: directory with config.json and tokenizer; None: what the checkpoint brings along.

    Raises:
        UserError: no such checkpoint, no config.json, files missing or cut short, tensors missing, left over, of another
            shape or type, or chunks that do not cover them.
    """

    def __init__(self, directory: str | Path, *, config_from: str | Path | None = None) -> None:
        self.directory = find_weights(Path(directory))
        self.hf_directory = _find_config(Path(directory), self.directory, config_from)
        self.shape = read_shape(self.hf_directory)
        self._stored = Distcp(self.directory)
        self.files = [self.directory / METADATA_FILE, *self._stored.files]
        layout = StoredLayout(self.shape)
        layout.check()
        self.extents = hf_extents(layout)
        self._prefix = self._find_prefix()
        self._places: dict[str, tuple[Entry, Slot, bool]] = {}
        self._runs: dict[str, list[RowRun]] = {name: [] for name in self.extents}
        used: set[str] = set()
        for entry in layout.entries:
            slot, is_split, keys = self._locate(entry)
            used |= keys
            for run in runs(entry, self.shape):
                self._runs[run.hf_name].append(run)
            for name in entry.hf_names:
                self._places[name] = (entry, slot, is_split)
        self._check_rest(used)
        for key in used:
            self._stored.check_tiling(key)
        for found in self._runs.values():
            found.sort(key=lambda run: run.hf_row)

    def dtype(self, name: str) -> torch.dtype:
        """Return the stored type."""
        entry, slot, is_split = self._places[name]
        return self._stored.tensors[self._key(entry, slot, is_split, name)].dtype

    def blocks(self, name: str, first: int, last: int) -> Iterator[tuple[int, Tensor]]:
        """Yield the rows of an HF tensor, block by block."""
        entry, slot, is_split = self._places[name]
        key, extent, itemsize = self._key(entry, slot, is_split, name), self.extents[name], self.dtype(name).itemsize
        self._stored.announce(key, slot.index)
        for run in self._runs[name]:
            low, high = max(first, run.hf_row), min(last, run.hf_row + run.num_rows)
            if low >= high:
                continue
            shift = 0 if is_split else run.row - run.hf_row
            for start, end in row_blocks((high - low, *extent[1:]), itemsize):
                start, end = start + low, end + low
                yield start, self._stored.read(key, slot.index, start + shift, end + shift)

    def _find_prefix(self) -> str:
        """Find the prefix that a wrapper put before every name, such as NeMo's ``module.``."""
        found = [key for key in self._stored.tensors if key.endswith(_EMBEDDING) and not _NOT_WEIGHTS.search(key)]
        if len(found) != 1:
            rule = "holds no language model" if not found else f"holds several models: {', '.join(sorted(found))}"
            raise UserError(str(self.directory), None, rule, "give the checkpoint of one model")
        return found[0].removesuffix(_EMBEDDING)

    def _key(self, entry: Entry, slot: Slot, is_split: bool, hf_name: str) -> str:
        suffix = ("_w", "_v")[entry.hf_names.index(hf_name)] if is_split else ""
        return self._prefix + slot.key + suffix

    def _locate(self, entry: Entry) -> tuple[Slot, bool, set[str]]:
        """Return (slot of a parameter, whether gate and up are stored apart, all keys that hold it)."""
        extent = parameter_extent(entry, self.shape)
        found: list[tuple[Slot, bool]] = []
        for slot in stored_names(entry.name, self.shape):
            if self._prefix + slot.key in self._stored.tensors:
                found.append((slot, False))
            elif entry.kind.name == "gated" and self._prefix + slot.key + "_w" in self._stored.tensors:
                found.append((slot, True))
        if not found:
            raise UserError(
                f"{self.directory}: {entry.name}",
                None,
                "is required by config.json but not in the checkpoint",
                "use the config.json of this model (tie_word_embeddings, bias fields, num_hidden_layers)",
            )
        keys = set()
        for slot, is_split in found:
            for hf_name in entry.hf_names if is_split else entry.hf_names[:1]:
                key = self._key(entry, slot, is_split, hf_name)
                keys.add(key)
                self._check_stored(key, (*slot.counts, *(extent if not is_split else self.extents[hf_name])), entry)
        slot, is_split = found[0]
        for other, _ in found[1:]:  # a norm under the names of both layer specs
            self._check_copies(slot, other, extent)
        return slot, is_split, keys

    def _check_stored(self, key: str, expected: Extent, entry: Entry) -> None:
        stored = self._stored.tensors[key]
        is_good = stored.extent == expected
        if entry.kind.name == "vocab":  # training pads it
            is_good = len(stored.extent) == 2 and stored.extent[1] == expected[1] and stored.extent[0] >= expected[0]
        if not is_good:
            raise UserError(
                f"{self.directory}: {key}",
                stored.extent,
                f"config.json gives the shape {expected}",
                "use the config.json that belongs to these weights",
            )
        if stored.dtype not in _FLOATS:
            raise UserError(
                f"{self.directory}: {key}",
                str(stored.dtype),
                "must be float32, bfloat16 or float16",
                "save the weights in one of these types",
            )

    def _check_copies(self, one: Slot, other: Slot, extent: Extent) -> None:
        pair = [self._stored.read(self._prefix + slot.key, slot.index, 0, extent[0]) for slot in (one, other)]
        if pair[0].dtype != pair[1].dtype or not torch.equal(pair[0], pair[1]):
            raise UserError(
                f"{self.directory}: {self._prefix}{other.key}{list(other.index)}",
                None,
                f"differs from {self._prefix}{one.key}, which is the same parameter under another layer spec",
                "remove the one that was not trained",
            )

    def _check_rest(self, used: set[str]) -> None:
        rest = sorted(key for key in self._stored.tensors if key not in used and not _NOT_WEIGHTS.search(key))
        if rest:
            raise UserError(
                f"{self.directory}: {rest[0]}",
                None,
                f"nothing in this {self.shape.family} model uses this tensor ({len(rest)} such tensors)",
                "use the config.json of this model (model_type, bias fields, num_hidden_layers)",
            )


def find_weights(directory: Path) -> Path:
    """Find the torch_dist directory in a checkpoint.

    That is the directory itself, ``model/`` (a step of the trainer), ``weights/`` (NeMo 2), or the last iteration of a
    directory with ``latest_checkpointed_iteration.txt`` (Megatron-LM).

    Raises:
        UserError: there is none.
    """
    candidates = [directory, directory / "model", directory / "weights"]
    tracker = directory / "latest_checkpointed_iteration.txt"
    if tracker.is_file():
        last = tracker.read_text(encoding="utf-8").strip()
        candidates.append(directory / (f"iter_{int(last):07d}" if last.isdigit() else last))
    for candidate in candidates:
        if (candidate / METADATA_FILE).is_file():
            return candidate
    steps = sorted((directory / "checkpoints").glob("step_*"))
    raise UserError(
        str(directory),
        None,
        f"is no Megatron checkpoint in the torch_dist format: it has no {METADATA_FILE}, nor do model/ and weights/ in it",
        f"give a checkpoint of this run: {steps[-1]}"
        if steps
        else "give the directory that holds .metadata and .distcp files",
    )


def open_source(directory: str | Path, *, config_from: str | Path | None = None) -> HFSource | MegatronSource:
    """Open a directory as whichever of the two it is.

    Args:
        directory: of the checkpoint.
        config_from: where config.json is, if a Megatron checkpoint does not bring it along.
    """
    if not Path(directory).is_dir():
        raise UserError(str(directory), None, "is no directory", "give the directory of a checkpoint")
    if any(any(Path(directory).glob(pattern)) for pattern in _HF_FILES):
        return HFSource(directory)
    return MegatronSource(directory, config_from=config_from)


def num_bytes(source: CheckpointSource) -> int:
    """Return the size of all tensors, as stored."""
    return sum(prod(extent) * source.dtype(name).itemsize for name, extent in source.extents.items())


def _find_config(directory: Path, weights: Path, config_from: str | Path | None) -> Path:
    if config_from is not None:
        return Path(config_from)
    for candidate in (weights / HF_FOLDER, directory / HF_FOLDER):
        if (candidate / "config.json").is_file():
            return candidate
    raise UserError(
        str(directory),
        None,
        f"brings no {HF_FOLDER}/config.json along",
        "name the Hugging Face directory of the model with --hf (config.json and tokenizer; its weights are not read)",
    )

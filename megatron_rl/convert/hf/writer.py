"""Streaming writer of a Hugging Face checkpoint.

All sizes are known from the model's shape, so the files' headers are written first, and each tensor then goes to its
place as it arrives, in any order: memory is one tensor, and nothing is buffered that a caller could still change.
"""

from __future__ import annotations

import json
import shutil
from collections.abc import Mapping
from dataclasses import dataclass, replace
from io import BufferedIOBase
from math import prod
from pathlib import Path
from types import TracebackType
from typing import Self, get_args

import torch
from torch import Tensor

from megatron_rl.convert.architecture.shape import Dtype, ModelShape
from megatron_rl.convert.architecture.weight_files import INDEX_FILE, SINGLE_FILE
from megatron_rl.convert.tables.kinds import Extent
from megatron_rl.convert.tables.table import hf_tensors
from megatron_rl.errors import UserError
from megatron_rl.files import disk_error, publish_folder

HFLayout = Mapping[str, tuple[Extent, torch.dtype]]
"""Shape and dtype of each tensor of a checkpoint, in the order of its files."""

FORMAT_NAMES = {
    torch.float32: "F32", torch.bfloat16: "BF16", torch.float16: "F16", torch.float8_e4m3fn: "F8_E4M3",
}  # fmt: skip
"""Types that are written, and safetensors' names for them."""
_COMPANIONS = (
    "generation_config.json", "tokenizer.json", "tokenizer_config.json", "tokenizer.model", "special_tokens_map.json",
    "added_tokens.json", "vocab.json", "merges.txt", "chat_template.jinja", "chat_template.json",
    "sentencepiece.bpe.model", "spiece.model", "tiktoken.model",
)  # fmt: skip
_MAX_SPARE_BYTES = 2**26
"""Room for what is not counted, such as headers; less beside small weights."""


CALL_BYTES = 2**18
"""Size of one call of the system. For a large write, ext4 takes large runs of free memory for its cache, which a virtual
machine may have to fetch from its host first: 4 MB a call took ten times as long as this."""


@dataclass(frozen=True)
class Place:
    """The place of a tensor in its file."""

    file: str
    offset: int
    shape: Extent
    dtype: torch.dtype


class LayoutWriter:
    """Writes ``directory`` as a whole or not at all: under a temporary name beside it, renamed at the end.

    Args:
        directory: the new checkpoint; must not exist, or be empty.
        layout: of its tensors.
        source: the checkpoint that the model came from: config.json, tokenizer and generation_config are copied.
        config: fields to change or add in config.json.
        max_shard_bytes: limit of one file; a larger tensor has a file of its own.

    Raises:
        UserError: a non-empty ``directory``, a ``source`` without config.json, not enough free disk space, or an error of
            the system on creating the files. From ``add`` and ``finish`` such errors come as OSError.
    """

    def __init__(
        self, directory: str | Path, layout: HFLayout, *, source: str | Path,
        config: Mapping[str, object] | None = None, max_shard_bytes: int = 4 * 2**30,
    ) -> None:  # fmt: skip
        self.directory, self.source = Path(directory).absolute(), Path(source)
        self._config = dict(config or {})
        self._partial = self.directory.with_name(f".{self.directory.name}.partial")
        self._places, headers = plan_files(layout, max_shard_bytes)
        self._missing = set(self._places)
        self._total_bytes = sum(prod(place.shape) * place.dtype.itemsize for place in self._places.values())
        try:
            self._check_target()
            self._create(headers)
        except OSError as error:
            self.abort()
            raise disk_error(self.directory, error) from error

    def add(self, name: str, tensor: Tensor) -> None:
        """Write one tensor, converted to its dtype here; it may change again as soon as this returns."""
        if name not in self._missing:
            raise ValueError(f"{name} was already written" if name in self._places else f"{name} is not in this model")
        place = self._places[name]
        if tuple(tensor.shape) != place.shape:
            raise ValueError(f"{name} has shape {tuple(tensor.shape)}, expected {place.shape}")
        # Without its scale a conversion to eight bits would be no weight.
        assert place.dtype.itemsize > 1 or tensor.dtype == place.dtype, f"{name} is {tensor.dtype}"
        data = tensor.detach().to("cpu", place.dtype).contiguous().reshape(-1).view(torch.uint8)
        with open(self._partial / place.file, "r+b") as file:
            file.seek(place.offset)
            write_in_calls(file, data.numpy().data)
        self._missing.remove(name)

    def add_file(self, name: str, text: str) -> None:
        """Put a file beside the weights."""
        (self._partial / name).write_text(text, encoding="utf-8")

    def finish(self) -> None:
        """Check that every tensor arrived, and give the checkpoint its final name."""
        if self._missing:
            raise ValueError(f"{len(self._missing)} tensors were not written, for example {min(self._missing)}")
        publish_folder(self._partial, self.directory)

    def abort(self) -> None:
        """Remove what was written."""
        shutil.rmtree(self._partial, ignore_errors=True)

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        try:
            if error is None:
                self.finish()
        finally:
            self.abort()  # after a rename nothing is left under the temporary name

    def _check_target(self) -> None:
        companions = [path for path in (self.source / file for file in _COMPANIONS) if path.is_file()]
        check_target(self.directory, self._total_bytes + sum(path.stat().st_size for path in companions))
        check_source(self.source)
        self.directory.parent.mkdir(parents=True, exist_ok=True)
        shutil.rmtree(self._partial, ignore_errors=True)  # left by an export that was killed

    def _create(self, headers: dict[str, bytes]) -> None:
        self._partial.mkdir()
        for file, header in headers.items():
            (self._partial / file).write_bytes(header)
        write_index(self._partial, self._places)
        carry_companions(self.source, self._partial)
        config = json.loads((self.source / "config.json").read_text(encoding="utf-8"))
        fields = self._config_fields(config)
        (self._partial / "config.json").write_text(json.dumps(config | fields, indent=2) + "\n", encoding="utf-8")

    def _config_fields(self, config: Mapping[str, object]) -> dict[str, object]:
        """Return the fields of config.json to change or add, given those of the source."""
        return self._config


def write_in_calls(file: BufferedIOBase, data: memoryview) -> None:
    """Write contiguous data in calls of ``CALL_BYTES``."""
    view = data.cast("B") if data.nbytes else data
    for start in range(0, data.nbytes, CALL_BYTES):
        file.write(view[start : start + CALL_BYTES])


class HFWriter(LayoutWriter):
    """Writes the checkpoint of a model whose tensors are all of one dtype.

        with HFWriter(directory, shape, source=model_path) as writer:
            for name in entries(shape):
                for hf_name, tensor in merge_parameter(name, shards_of(name), shape).items():
                    writer.add(hf_name, tensor)

    Args:
        directory: the new checkpoint; must not exist, or be empty.
        shape: of the model.
        source: the checkpoint that the model came from: config.json, tokenizer and generation_config are copied.
        dtype: type of the written tensors, also set in config.json; by default the source's.
        max_shard_bytes: limit of one file; a larger tensor has a file of its own.
    """

    def __init__(
        self, directory: str | Path, shape: ModelShape, *, source: str | Path, dtype: Dtype | None = None,
        max_shard_bytes: int = 4 * 2**30,
    ) -> None:  # fmt: skip
        self._dtype: Dtype = dtype or shape.dtype
        assert self._dtype in get_args(Dtype), self._dtype
        layout = {name: (extent, getattr(torch, self._dtype)) for name, extent in hf_tensors(shape).items()}
        super().__init__(directory, layout, source=source, max_shard_bytes=max_shard_bytes)

    def _config_fields(self, config: Mapping[str, object]) -> dict[str, object]:
        return dtype_fields(config, self._dtype)


def dtype_fields(config: Mapping[str, object], dtype: Dtype) -> dict[str, object]:
    """Return the fields that give the type of the weights, following those that a config.json has.

    transformers 4 writes torch_dtype, 5 writes dtype; each reads its own, and 5 also the old one.
    """
    return dict.fromkeys({"dtype", "torch_dtype"} & set(config) or {"torch_dtype"}, dtype)


def check_target(directory: Path, num_bytes: int) -> None:
    """Check that a new directory can be made there, and that the disk has room for ``num_bytes``.

    Raises:
        UserError: something is there already, or there is not enough free space.
    """
    if directory.exists() and (not directory.is_dir() or any(directory.iterdir())):
        raise UserError(
            str(directory),
            None,
            "already exists and is not an empty directory",
            "choose another output directory, or remove it",
        )
    parent = next(path for path in directory.absolute().parents if path.exists())
    needed = num_bytes + min(_MAX_SPARE_BYTES, num_bytes // 8 + 2**20)
    free = shutil.disk_usage(parent).free
    if free < needed:
        raise UserError(
            str(parent),
            None,
            f"has {_amount(free)} free, the checkpoint needs {_amount(needed)}",
            "free disk space or choose another output directory",
        )


def _amount(num_bytes: int) -> str:
    return f"{num_bytes / 2**30:.1f} GiB" if num_bytes >= 2**30 else f"{num_bytes / 2**20:.1f} MiB"


def check_source(source: Path) -> None:
    """Check that the source has the config.json that the new checkpoint needs."""
    path = source / "config.json"
    if not path.is_file():
        raise UserError(str(path), None, "is missing", "give the checkpoint that the model came from")


def carry_companions(source: Path, target: Path) -> None:
    """Copy the tokenizer and the other files beside the weights, as far as they exist; config.json is not among them."""
    for file in _COMPANIONS:
        if (source / file).is_file():
            shutil.copyfile(source / file, target / file)


def write_index(directory: Path, places: Mapping[str, Place]) -> None:
    """Write the index of a checkpoint of several files; nothing for one file."""
    if {place.file for place in places.values()} == {SINGLE_FILE}:
        return
    index = {
        "metadata": {"total_size": sum(prod(place.shape) * place.dtype.itemsize for place in places.values())},
        "weight_map": {name: place.file for name, place in places.items()},
    }
    (directory / INDEX_FILE).write_text(json.dumps(index, indent=2) + "\n", encoding="utf-8")


def plan_files(layout: HFLayout, max_shard_bytes: int) -> tuple[dict[str, Place], dict[str, bytes]]:
    """Return the place of each tensor, and the header of each file (8 bytes of length, then json)."""
    groups: list[list[str]] = [[]]
    used = 0
    for name, (shape, dtype) in layout.items():
        num_bytes = prod(shape) * dtype.itemsize
        if groups[-1] and used + num_bytes > max_shard_bytes:
            groups.append([])
            used = 0
        groups[-1].append(name)
        used += num_bytes
    places, headers = {}, {}
    for number, names in enumerate(groups, start=1):
        file = SINGLE_FILE if len(groups) == 1 else f"model-{number:05d}-of-{len(groups):05d}.safetensors"
        fields: dict[str, object] = {"__metadata__": {"format": "pt"}}
        end = 0
        # Wide types first: readers map the file, and a float32 behind an odd number of bytes could not be mapped.
        for name in sorted(names, key=lambda name: -layout[name][1].itemsize):
            shape, dtype = layout[name]
            start, end = end, end + prod(shape) * dtype.itemsize
            fields[name] = {"dtype": FORMAT_NAMES[dtype], "shape": shape, "data_offsets": [start, end]}
            places[name] = Place(file, start, shape, dtype)
        text = json.dumps(fields, separators=(",", ":")).encode()
        text += b" " * (-len(text) % 8)  # the data starts at a multiple of 8
        headers[file] = len(text).to_bytes(8, "little") + text
        for name in names:
            places[name] = replace(places[name], offset=places[name].offset + len(headers[file]))
    return places, headers

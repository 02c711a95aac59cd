"""A Hugging Face checkpoint, of safetensors or of torch's ``.bin`` files, opened for reading slices."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Protocol

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from megatron_rl.convert.architecture.weight_files import DOWNLOAD_AGAIN, find_weight_files
from megatron_rl.convert.tables.kinds import Extent
from megatron_rl.errors import UserError, described

_DTYPES = {"F32", "BF16", "F16"}
_TORCH_NAMES = {torch.float32: "F32", torch.bfloat16: "BF16", torch.float16: "F16"}


class _Slice(Protocol):
    """The result of safetensors' ``get_slice``, a class without a public name."""

    def get_shape(self) -> list[int]: ...
    def get_dtype(self) -> str: ...
    def __getitem__(self, slices: tuple[slice, ...]) -> Tensor: ...


class _TorchSlice:
    """A tensor of a ``.bin`` file, with the answers of safetensors' slices."""

    def __init__(self, tensor: Tensor) -> None:
        self._tensor = tensor

    def get_shape(self) -> list[int]:
        return list(self._tensor.shape)

    def get_dtype(self) -> str:
        return _TORCH_NAMES.get(self._tensor.dtype, str(self._tensor.dtype))

    def __getitem__(self, slices: tuple[slice, ...]) -> Tensor:
        return self._tensor[slices]


class _LazySlices:
    """The slices of a safetensors file, made when they are asked for."""

    def __init__(self, handle: safe_open) -> None:
        self._handle = handle

    def __getitem__(self, name: str) -> _Slice:
        return self._handle.get_slice(name)


class TensorReader(Protocol):
    """A source of weights: a checkpoint, or something that stands for one."""

    directory: Path
    """Name of the source in messages."""

    @property
    def names(self) -> set[str]:
        """Names of all tensors."""
        ...

    def check(self, name: str, shape: Extent) -> None:
        """Raise UserError unless the tensor exists with this shape."""
        ...

    def read(self, name: str, slices: tuple[slice, ...] | None = None) -> Tensor:
        """Read one rectangle of a tensor, or all of it."""
        ...


class HFReader:
    """Opens every file of ``directory`` at once, so that a damaged checkpoint is refused before anything is filled.

    Files are memory-mapped: opening costs the headers, reading a slice costs its pages.

    Raises:
        UserError: no checkpoint, or a file that is missing, incomplete or at odds with the index.
    """

    def __init__(self, directory: str | Path) -> None:
        self.directory = Path(directory)
        self._files: dict[str, Mapping[str, _Slice] | _LazySlices] = {}
        self._file_of: dict[str, str] = {}
        self.torch_tensors: dict[str, Tensor] = {}
        """Tensors of ``.bin`` files, as views of them; empty where the checkpoint is safetensors."""
        self._found = find_weight_files(self.directory)
        for file in self._found.files:
            self._open(file)
        for name, file in (self._found.index or {}).items():
            if self._file_of.get(name) != file:
                rule = f"lacks {name}, which {self._found.index_file} places there"
                raise UserError(str(self.directory / file), None, rule, DOWNLOAD_AGAIN)

    @property
    def names(self) -> set[str]:
        """Names of the tensors in the files."""
        return set(self._file_of)

    @property
    def files(self) -> list[Path]:
        """The files with the weights, in the order of their names."""
        return [self.directory / file for file in self._files]

    def shape(self, name: str) -> Extent:
        """Shape of a tensor, from the header."""
        return tuple(self._slice(name).get_shape())

    def read(self, name: str, slices: tuple[slice, ...] | None = None) -> Tensor:
        """Read one rectangle of a tensor, or all of it. The result may be a read-only view of the file."""
        if slices is None:
            slices = tuple(slice(0, n) for n in self.shape(name))
        return self._slice(name)[slices]

    def check(self, name: str, shape: Extent) -> None:
        """Check that the tensor exists, with this shape and a floating type that we read.

        Raises:
            UserError: otherwise.
        """
        if name not in self._file_of:
            raise UserError(
                f"{self.directory}: {name}",
                None,
                "is required by config.json but not in the checkpoint",
                "check tie_word_embeddings and the bias fields, or " + DOWNLOAD_AGAIN,
            )
        path = self.directory / self._file_of[name]
        if self.shape(name) != shape:
            raise UserError(
                f"{path}: {name}",
                self.shape(name),
                f"config.json gives the shape {shape}",
                "use the config.json that belongs to these weights",
            )
        if self._slice(name).get_dtype() not in _DTYPES:
            raise UserError(
                f"{path}: {name}",
                self._slice(name).get_dtype(),
                "must be F32, BF16 or F16",
                "use the original, unquantized weights",
            )

    def _slice(self, name: str) -> _Slice:
        return self._files[self._file_of[name]][name]

    def _open(self, file: str) -> None:
        path = self.directory / file
        slices: Mapping[str, _Slice] | _LazySlices
        if self._found.is_torch:
            self.torch_tensors |= (tensors := _load_torch(path))
            names, slices = list(tensors), {name: _TorchSlice(tensor) for name, tensor in tensors.items()}
        else:
            try:
                handle = safe_open(path, framework="pt")
                names, slices = handle.keys(), _LazySlices(handle)
            except (SafetensorError, OSError) as error:
                raise UserError(
                    str(path),
                    None,
                    f"is not a complete safetensors file ({error})",
                    DOWNLOAD_AGAIN + " (a git-lfs pointer is not the file)",
                ) from error
        self._files[file] = slices
        for name in names:
            if name in self._file_of:
                raise UserError(f"{path}: {name}", None, f"is also in {self._file_of[name]}", "remove the stale file")
            self._file_of[name] = file


def _load_torch(path: Path) -> dict[str, Tensor]:
    """Return the tensors of a ``.bin`` file as views of it; nothing that the file names is run."""
    try:
        found = torch.load(path, map_location="cpu", mmap=True, weights_only=True)
    except Exception as error:  # pickle, zip and torch have kinds of their own
        rule = f"is not a complete file of tensors that torch wrote ({described(error)})"
        raise UserError(str(path), None, rule, DOWNLOAD_AGAIN) from error
    if not isinstance(found, dict) or not all(isinstance(tensor, Tensor) for tensor in found.values()):
        raise UserError(str(path), None, "holds more than tensors by name", "give the weights of the model alone")
    return {name: tensor.detach() for name, tensor in found.items()}

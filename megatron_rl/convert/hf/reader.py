"""A Hugging Face safetensors checkpoint, opened for reading slices."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Protocol

from safetensors import SafetensorError, safe_open
from torch import Tensor

from megatron_rl.convert.tables.kinds import Extent
from megatron_rl.errors import UserError

SINGLE_FILE = "model.safetensors"
INDEX_FILE = "model.safetensors.index.json"

_DTYPES = {"F32", "BF16", "F16"}
_DOWNLOAD_AGAIN = "download or export the checkpoint again"


class _Slice(Protocol):
    """The result of safetensors' ``get_slice``, a class without a public name."""

    def get_shape(self) -> list[int]: ...
    def get_dtype(self) -> str: ...
    def __getitem__(self, slices: tuple[slice, ...]) -> Tensor: ...


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
        self._files: dict[str, safe_open] = {}
        self._file_of: dict[str, str] = {}
        index = self._read_index()
        for file in sorted(set(index.values())) if index is not None else [SINGLE_FILE]:
            self._open(file)
        for name, file in (index or {}).items():
            if self._file_of.get(name) != file:
                raise UserError(
                    str(self.directory / file), None, f"lacks {name}, which {INDEX_FILE} places there", _DOWNLOAD_AGAIN
                )

    @property
    def names(self) -> set[str]:
        """Names of the tensors in the files."""
        return set(self._file_of)

    @property
    def files(self) -> list[Path]:
        """The safetensors files, in the order of their names."""
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
                "check tie_word_embeddings and the bias fields, or " + _DOWNLOAD_AGAIN,
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
        return self._files[self._file_of[name]].get_slice(name)

    def _read_index(self) -> dict[str, str] | None:
        """Return tensor name -> file; None if the checkpoint is one file."""
        path, single = self.directory / INDEX_FILE, self.directory / SINGLE_FILE
        if path.exists() and single.exists():
            raise UserError(
                str(self.directory), None, f"has both {SINGLE_FILE} and {INDEX_FILE}", "remove the stale one"
            )
        if single.exists():
            return None
        if not path.exists():
            raise UserError(
                str(self.directory),
                None,
                f"has neither {SINGLE_FILE} nor {INDEX_FILE}",
                "point model_path at a checkpoint in safetensors format",
            )
        try:
            index = json.loads(path.read_text(encoding="utf-8"))["weight_map"]
            # A file name with a folder in it would read outside the checkpoint.
            is_valid = bool(index) and all(Path(file).name == file for file in index.values())
        except (ValueError, KeyError, TypeError, AttributeError) as error:
            raise UserError(str(path), None, "is not a valid safetensors index", _DOWNLOAD_AGAIN) from error
        if not is_valid:
            raise UserError(str(path), None, "weight_map must name files beside the index", _DOWNLOAD_AGAIN)
        return index

    def _open(self, file: str) -> None:
        path = self.directory / file
        try:
            handle = safe_open(path, framework="pt")
            names = handle.keys()
        except FileNotFoundError as error:
            raise UserError(str(path), None, f"is named in {INDEX_FILE} but missing", _DOWNLOAD_AGAIN) from error
        except (SafetensorError, OSError) as error:
            raise UserError(
                str(path),
                None,
                f"is not a complete safetensors file ({error})",
                _DOWNLOAD_AGAIN + " (a git-lfs pointer is not the file)",
            ) from error
        self._files[file] = handle
        for name in names:
            if name in self._file_of:
                raise UserError(f"{path}: {name}", None, f"is also in {self._file_of[name]}", "remove the stale file")
            self._file_of[name] = file

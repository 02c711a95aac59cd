"""The files with the weights of a Hugging Face folder: which they are, and that none is missing or cut short. Without torch."""

from __future__ import annotations

import json
import zipfile
from collections.abc import Collection
from dataclasses import dataclass
from pathlib import Path

from megatron_rl.errors import UserError

SINGLE_FILE, INDEX_FILE = "model.safetensors", "model.safetensors.index.json"
TORCH_FILE, TORCH_INDEX_FILE = "pytorch_model.bin", "pytorch_model.bin.index.json"
WEIGHT_FILES = (SINGLE_FILE, INDEX_FILE, TORCH_FILE, TORCH_INDEX_FILE)
_KINDS = ((SINGLE_FILE, INDEX_FILE), (TORCH_FILE, TORCH_INDEX_FILE))
DOWNLOAD_AGAIN = "download or export the checkpoint again"
_GGUF = ".gguf"
_LFS_POINTER = b"version https://git-lfs"
_MAX_HEADER_BYTES = 100_000_000
"""Limit of safetensors itself."""


@dataclass(frozen=True)
class WeightFiles:
    """What holds the weights of a folder."""

    directory: Path
    files: tuple[str, ...]
    """Names, sorted."""
    index: dict[str, str] | None
    """Tensor -> file; None: there is one file."""
    index_file: str
    is_torch: bool
    """``.bin`` files, which torch wrote; else safetensors."""


def find_weight_files(directory: Path) -> WeightFiles:
    """Return the files of a folder. Safetensors come first where there are both kinds.

    Raises:
        UserError: there are none; an index and a single file; an index that is none; a file that the index names is missing.
    """
    for single, index_file in _KINDS:
        has_single, has_index = (directory / single).exists(), (directory / index_file).exists()
        if has_single and has_index:
            raise UserError(str(directory), None, f"has both {single} and {index_file}", "remove the stale one")
        if has_single or has_index:
            index = _read_index(directory / index_file) if has_index else None
            files = (single,) if index is None else tuple(sorted(set(index.values())))
            for file in files:
                if not (directory / file).is_file():
                    rule = f"is named in {index_file} but missing"
                    raise UserError(str(directory / file), None, rule, DOWNLOAD_AGAIN)
            return WeightFiles(directory, files, index, index_file, single == TORCH_FILE)
    refuse_gguf(directory)
    raise UserError(
        str(directory),
        None,
        f"holds no weights: it has neither {SINGLE_FILE}, {INDEX_FILE} nor {TORCH_FILE}, {TORCH_INDEX_FILE}",
        "give the folder of a whole model",
    )


def check_weight_files(directory: Path) -> WeightFiles:
    """Find the files, and check that each is what its name says and has its full length. Only headers are read.

    Raises:
        UserError: naming the file.
    """
    found = find_weight_files(directory)
    for file in found.files:
        _check_torch_file(directory / file) if found.is_torch else _check_safetensors(directory / file)
    return found


def needed_files(directory: Path, offered: Collection[str]) -> tuple[str, ...]:
    """Return the names of the files with the weights; safetensors if there are both kinds.

    Args:
        directory: has the index, where there is one.
        offered: names of all files that can be had.
    """
    for single, index_file in _KINDS:
        if (directory / index_file).exists():
            return tuple(sorted(set(_read_index(directory / index_file).values())))
        if single in offered:
            return (single,)
    return ()


def refuse_gguf(path: Path, field: str | None = None) -> None:
    """Refuse a GGUF file, and a folder that has one.

    Args:
        path: a file or a folder, perhaps of something else.
        field: config key, for the error; None: the file is named alone.

    Raises:
        UserError: with the way to a folder of a model.
    """
    found = [path] if path.name.endswith(_GGUF) else sorted(path.glob(f"*{_GGUF}")) if path.is_dir() else []
    if found:
        fix = f"python tools/gguf_to_hf.py {found[0].name} FOLDER, and give FOLDER"
        rule = "is a GGUF file, which cannot be trained as it is"
        raise UserError(field or str(found[0]), str(found[0]) if field else None, rule, fix)


def _read_index(path: Path) -> dict[str, str]:
    """Return tensor name -> file."""
    try:
        index = json.loads(path.read_text(encoding="utf-8"))["weight_map"]
        # A file name with a folder in it would read outside the checkpoint.
        is_valid = bool(index) and all(Path(file).name == file for file in index.values())
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        raise UserError(str(path), None, "is not a valid index of weights", DOWNLOAD_AGAIN) from error
    if not is_valid:
        raise UserError(str(path), None, "weight_map must name files beside the index", DOWNLOAD_AGAIN)
    return index


def _check_safetensors(path: Path) -> None:
    """Compare a file's length with what its header says."""
    try:
        size = path.stat().st_size
        with path.open("rb") as file:
            start = file.read(len(_LFS_POINTER))
            length = int.from_bytes(start[:8], "little")
            file.seek(8)
            header = json.loads(file.read(length)) if 2 <= length <= min(_MAX_HEADER_BYTES, size - 8) else None
        ends = [field["data_offsets"][1] for name, field in (header or {}).items() if name != "__metadata__"]
    except OSError as error:
        raise UserError(str(path), None, f"cannot be read ({error.strerror})", DOWNLOAD_AGAIN) from error
    except (ValueError, KeyError, TypeError, AttributeError, IndexError):
        header = None
    if header is None or 8 + length + max(ends, default=0) != size:
        raise _incomplete(path, "safetensors file", start)


def _check_torch_file(path: Path) -> None:
    """Check that torch can map a file: it is a whole zip archive."""
    try:
        with path.open("rb") as file:
            start = file.read(len(_LFS_POINTER))
        is_archive = zipfile.is_zipfile(path)
    except OSError as error:
        raise UserError(str(path), None, f"cannot be read ({error.strerror})", DOWNLOAD_AGAIN) from error
    if not is_archive and start[:1] == b"\x80" and not start.startswith(b"PK"):
        raise UserError(
            str(path),
            None,
            "is in the form that torch wrote before 1.6, which cannot be read in parts",
            "load the model with transformers once and save_pretrained it: that writes safetensors",
        )
    if not is_archive:
        raise _incomplete(path, "file of torch", start)


def is_lfs_pointer(path: Path) -> bool:
    """Say whether a file is git-lfs's note of a file that was not fetched."""
    with path.open("rb") as file:
        return file.read(len(_LFS_POINTER)) == _LFS_POINTER


def _incomplete(path: Path, what: str, start: bytes) -> UserError:
    rule = "is a git-lfs pointer, not the file" if start == _LFS_POINTER else f"is not a complete {what}"
    return UserError(str(path), None, rule, DOWNLOAD_AGAIN)

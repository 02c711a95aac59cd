"""The manifest of a checkpoint: whether all its files are there, and as they were written.

What is absent or cut short makes a checkpoint incomplete, and another one may be taken. What cannot be read at the moment
(rights, a server that does not answer, a failing disk) says nothing about the checkpoint: that ends the run, by name.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path, PurePosixPath
from typing import Any

from megatron_rl.errors import UserError

MANIFEST, STATE = "manifest.json", "state.json"
_REQUIRED = (STATE, "model/.metadata", "model/metadata.json")
_ABSENT = (FileNotFoundError, NotADirectoryError, IsADirectoryError)


def generators_file(rank: int) -> str:
    """Return the name of the file with the random generators of a rank."""
    return f"rng_rank_{rank}.json"


def entry_of(path: Path) -> dict[str, Any]:
    """Return what the manifest says of a file."""
    return {"bytes": path.stat().st_size, "blake2b": digest(path)}


def write_manifest(directory: Path, entries: dict[str, dict[str, Any]]) -> None:
    """Write the manifest of a checkpoint whose other files are all there."""
    (directory / MANIFEST).write_text(json.dumps({"files": entries}, indent=1))


def read_state(path: Path) -> dict[str, Any]:
    """Return the plain data of a complete checkpoint."""
    with _readable(path / STATE):
        return json.loads((path / STATE).read_text())


def incompleteness(path: Path) -> str | None:
    """Return what a checkpoint lacks, going by names and sizes; None: nothing.

    Raises:
        UserError: it cannot be read.
    """
    with _readable(path):
        try:
            entries = _read_manifest(path)
        except _ABSENT:
            return f"is incomplete: it has no readable {MANIFEST}" if path.exists() else "does not exist"
        except (ValueError, KeyError, TypeError, AttributeError):
            return f"is incomplete: it has no readable {MANIFEST}"
        for name, size in entries.items():
            if PurePosixPath(name).is_absolute() or ".." in PurePosixPath(name).parts:
                return f"is no checkpoint of ours: its {MANIFEST} names {name}, outside of it"
            try:
                found = (path / name).stat().st_size
            except _ABSENT:
                found = -1
            if found != size:
                return f"is incomplete: {name} is missing or cut short"
        return _unlisted(path, set(entries))


def damage(path: Path, *, rank: int, world_size: int) -> str | None:
    """Return which file of a complete checkpoint has another digest, or None; each rank reads a share of the files.

    Raises:
        UserError: one cannot be read.
    """
    with _readable(path):
        files = json.loads((path / MANIFEST).read_text())["files"]
        for name in sorted(files)[rank::world_size]:
            if digest(path / name) != files[name]["blake2b"]:
                return f"is damaged: {name} has another digest than when it was written"
    return None


def digest(path: Path) -> str:
    """Return the digest of a file, in hexadecimal."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, lambda: hashlib.blake2b(digest_size=16)).hexdigest()


def _read_manifest(path: Path) -> dict[str, int]:
    """Return the size of each file, by name in order."""
    files = json.loads((path / MANIFEST).read_text())["files"]
    return {name: int(files[name]["bytes"]) for name in sorted(files) if isinstance(files[name]["blake2b"], str)}


def _unlisted(path: Path, names: set[str]) -> str | None:
    """Return which file the manifest lacks that every checkpoint has."""
    missing = [name for name in _REQUIRED if name not in names]
    if not missing:
        try:
            num_ranks = int(json.loads((path / STATE).read_text())["num_ranks"])
        except (ValueError, KeyError, TypeError):
            return f"is incomplete: {STATE} does not say how many ranks wrote it"
        missing = [name for name in map(generators_file, range(num_ranks)) if name not in names]
    return f"is incomplete: its {MANIFEST} lacks {missing[0]}" if missing else None


@contextmanager
def _readable(path: Path) -> Iterator[None]:
    try:
        yield
    except OSError as error:
        rule = f"cannot be read ({error.strerror or error})"
        fix = "mend the file system or its rights and give the same command again: nothing was changed"
        raise UserError(str(error.filename or path), None, rule, fix) from error

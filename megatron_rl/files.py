"""Atomic writes of files and folders, and disk errors as sentences that a user can act on.

    with disk_errors(path, field="exp_manager.exp_dir", fix=SAME_COMMAND):
        write_atomic(path, data)                 # one file, given its bytes

    with atomic_file(path) as temporary:         # one file that a library writes
        save_file(tensors, temporary)

    publish_folder(temporary, final)             # a folder that was filled under another name

The new content is brought to disk under a temporary name in the same folder, and only then renamed: a rename is atomic
inside one file system, and without the sync a power cut could leave the new name with no bytes behind it.
"""

from __future__ import annotations

import hashlib
import os
import shutil
from collections.abc import Collection, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

from megatron_rl.errors import UserError

OTHER_FOLDER = "free disk space or choose another directory"
SAME_COMMAND = "free some disk space or mend the folder's rights, and give the same command again"
"""The two fixes for a disk error; a caller may add what is still intact or what to turn off."""
LARGE_BYTES = 16 * 2**20
PIECE_BYTES, NUM_PIECES = 2**16, 16
"""Pieces of a file above ``LARGE_BYTES`` that enter the digest of its folder."""


def write_atomic(path: Path, data: bytes | str) -> None:
    """Replace a file: a reader, or a crash at any moment, finds the old content or the new, never a mixture."""
    with atomic_file(path) as temporary:
        temporary.write_bytes(data.encode() if isinstance(data, str) else data)


@contextmanager
def atomic_file(path: Path) -> Iterator[Path]:
    """Give a temporary path to write to; it replaces ``path`` at the end, or is removed after an error. Makes the folder."""
    path = path.resolve()  # what a link points to is replaced, not the link
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(f".{path.name}.tmp")
    temporary.unlink(missing_ok=True)  # left by a crash, or a link that somebody else has put there
    os.close(os.open(temporary, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o666))
    try:
        yield temporary
        sync(temporary)
        os.replace(temporary, path)
        sync(path.parent)
    except BaseException:
        with suppress(OSError):
            temporary.unlink(missing_ok=True)
        raise


def fresh_folder(path: Path) -> None:
    """Make an empty folder in place of what has this name; a link is removed and not followed."""
    path.parent.mkdir(parents=True, exist_ok=True)
    if path.is_symlink() or path.is_file():
        path.unlink()
    elif path.exists():
        shutil.rmtree(path)
    path.mkdir()


def publish_folder(temporary: Path, final: Path, *, replaces: bool = False) -> None:
    """Bring a filled folder to disk and give it its final name.

    Args:
        temporary: the filled folder, in the same file system.
        final: its name; must be free, or an empty folder.
        replaces: remove a folder that has this name, between the sync and the rename.
    """
    for path in (*temporary.rglob("*"), temporary):
        sync(path)
    if replaces:
        shutil.rmtree(final, ignore_errors=True)
    os.replace(temporary, final)
    sync(final.parent)


def sync(path: Path) -> None:
    """Bring one file, or the names in one folder, to disk."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


@contextmanager
def disk_errors(
    path: Path, *, field: str | None = None, fix: str = OTHER_FOLDER, also: tuple[type[Exception], ...] = ()
) -> Iterator[None]:
    """Turn the system's errors inside the block into one UserError.

    Args:
        path: the file or folder being written.
        field: the setting that chose the path; None: the path itself is the field.
        fix: what to do about it.
        also: further errors that a library raises for a full disk.

    Raises:
        UserError: the disk is full, or the path cannot be written.
    """
    errors: tuple[type[Exception], ...] = (OSError, *also)
    try:
        yield
    except errors as error:
        raise disk_error(path, error, field=field, fix=fix) from error


def disk_error(path: Path, error: Exception | str, *, field: str | None = None, fix: str = OTHER_FOLDER) -> UserError:
    """Return the error of ``disk_errors``, for a caller that has something to clean up before it raises."""
    reason = (error.strerror or str(error)) if isinstance(error, OSError) else str(error)
    rule = f"could not be written ({reason})"
    return UserError(str(path), None, rule, fix) if field is None else UserError(field, str(path), rule, fix)


def content_digest(path: Path, *, suffixes: Collection[str] = ()) -> str:
    """Return a digest of a file, or of a folder without what is hidden in it. Of large files in a folder pieces count.

    Args:
        path: the file or folder.
        suffixes: of the files in a folder that count, such as ``.safetensors``; none: all of them.
    """
    digest = hashlib.blake2b(digest_size=16)
    try:
        for file in sorted(path.rglob("*")) if path.is_dir() else [path]:
            name = file.relative_to(path)
            is_meant = not suffixes or file.suffix in suffixes or not path.is_dir()
            if is_meant and file.is_file() and not any(part.startswith(".") for part in name.parts):
                size = file.stat().st_size
                digest.update(f"{name} {size} ".encode())
                with file.open("rb") as opened:
                    if path.is_dir() and size > LARGE_BYTES:
                        for index in range(NUM_PIECES):
                            opened.seek(index * (size - PIECE_BYTES) // (NUM_PIECES - 1))
                            digest.update(opened.read(PIECE_BYTES))
                    else:
                        digest.update(hashlib.file_digest(opened, "blake2b").digest())
    except OSError as error:
        return f"unreadable: {error.strerror}"
    return digest.hexdigest()

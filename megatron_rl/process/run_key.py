"""The run's key: a secret that all processes of one start share, and nobody else has.

Each start has another one, so nothing that was signed in an earlier start is believed. The launcher hands it on by environment,
which only the owner's processes can read; a command line can be read by every user of the machine. It comes from

    the user          MEGATRON_RL_RUN_KEY on every node, drawn anew for each start
    else one node     memory; no file holds it
    else several      <run>/.key, readable for its owner alone: node 0, which holds the folder's lock, writes it anew at every
                      start, and the others read it (``signed_store.find_key``)
"""

from __future__ import annotations

import errno
import os
import secrets
from pathlib import Path

from megatron_rl.errors import UserError
from megatron_rl.files import disk_errors

VARIABLE = "MEGATRON_RL_RUN_KEY"
FILE_VARIABLE = "MEGATRON_RL_RUN_KEY_FILE"
"""Tells the launcher of a node above 0 where the key lies."""
FILE = ".key"
WAY_OUT = f"draw a key for this start (openssl rand -hex 32), and set {VARIABLE} to it on every node"
_NUM_BYTES = 32


def given_key() -> bytes | None:
    """Return the key that the environment holds, from the user or the launcher; None: it holds none.

    Raises:
        UserError: what it holds is no key.
    """
    text = os.environ.get(VARIABLE)
    return _parsed(text, VARIABLE) if text else None


def draw_key() -> bytes:
    """Draw a key."""
    return secrets.token_bytes(_NUM_BYTES)


def write_key(folder: Path) -> bytes:
    """Draw the key of a start on several nodes and put it in place of an earlier one; for the holder of the folder's lock.

    Raises:
        UserError: the folder cannot be written, or the file system lets others read the file.
    """
    key, temporary = draw_key(), folder / f"{FILE}.tmp"
    with disk_errors(folder, field="exp_manager.exp_dir"):
        folder.mkdir(parents=True, exist_ok=True)
        temporary.unlink(missing_ok=True)  # left by a start that was killed
        descriptor = os.open(temporary, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600)
        try:
            _check_private(descriptor, folder / FILE)
            os.write(descriptor, key.hex().encode())
            os.fsync(descriptor)
            os.replace(temporary, folder / FILE)
        except BaseException:
            temporary.unlink(missing_ok=True)
            raise
        finally:
            os.close(descriptor)
    return key


def read_key(path: Path) -> bytes | None:
    """Return the key that node 0 has written, or that of an earlier start; None: there is none, or it is just being replaced.

    Raises:
        UserError: the file cannot be read, others can read it, or it holds no key.
    """
    try:
        with open(path, "rb", opener=lambda name, flags: os.open(name, flags | os.O_NOFOLLOW)) as file:
            _check_private(file.fileno(), path)
            text = file.read(1024)
    except OSError as error:
        if error.errno in (errno.ENOENT, errno.ESTALE):
            return None
        raise UserError(str(path), None, f"cannot be read ({error.strerror})", WAY_OUT) from error
    return _parsed(text.decode(errors="replace"), str(path))


def _check_private(descriptor: int, path: Path) -> None:
    status = os.fstat(descriptor)
    if status.st_uid != os.getuid() or status.st_mode & 0o077:
        rule = "must belong to this user alone, but gets "
        rule += f"owner {status.st_uid} and mode {status.st_mode & 0o777:o} on this file system"
        raise UserError(str(path), None, rule, WAY_OUT)


def _parsed(text: str, field: str) -> bytes:
    try:
        key = bytes.fromhex(text)
    except ValueError:
        key = b""
    if len(key) != _NUM_BYTES:
        raise UserError(field, None, f"must hold {2 * _NUM_BYTES} hex digits", WAY_OUT)
    return key

"""The run's key: a secret that all processes of a run share, and nobody else has.

It lies in the run's folder, which all nodes share, readable for its owner alone. The launcher hands it on by environment, which
only the owner's processes can read; a command line can be read by every user of the machine.
"""

from __future__ import annotations

import os
import secrets
from contextlib import suppress
from pathlib import Path

from megatron_rl.errors import UserError
from megatron_rl.files import disk_errors

VARIABLE = "MEGATRON_RL_RUN_KEY"
FILE = ".key"
_NUM_BYTES = 32


def run_key(folder: Path) -> bytes:
    """Return the key of the run in this folder, drawn by whoever comes first.

    Raises:
        UserError: the folder cannot be written, or others can read the key.
    """
    given = os.environ.get(VARIABLE)
    return bytes.fromhex(given) if given else _from_file(folder / FILE)


def _from_file(path: Path) -> bytes:
    with disk_errors(path.parent, field="exp_manager.exp_dir"):
        if not path.exists():
            path.parent.mkdir(parents=True, exist_ok=True)
            _draw(path)
        status, text = path.stat(), path.read_text()
    if status.st_uid != os.getuid() or status.st_mode & 0o077:
        rule = f"must belong to this user alone (it has owner {status.st_uid} and mode {status.st_mode & 0o777:o})"
        raise UserError(str(path), None, rule, "delete it and start again, as the owner of the run's folder")
    try:
        key = bytes.fromhex(text)
    except ValueError:
        key = b""
    if len(key) != _NUM_BYTES:
        raise UserError(str(path), None, f"must hold {2 * _NUM_BYTES} hex digits", "delete it and start again")
    return key


def _draw(path: Path) -> None:
    """Write a new key; where several nodes do so at once, the first one counts."""
    own = path.with_name(f"{path.name}.{secrets.token_hex(8)}")
    descriptor = os.open(own, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600)
    try:
        os.write(descriptor, secrets.token_hex(_NUM_BYTES).encode())
        os.fsync(descriptor)
        with suppress(FileExistsError):  # a link is whole from the start, and fails where the name is taken
            os.link(own, path)
    finally:
        os.close(descriptor)
        own.unlink()

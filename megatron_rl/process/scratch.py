"""One folder for the temporary files of a run on this machine, and no leftovers of earlier ones.

    /tmp/megatron_rl-a1b2c3d4/      TMPDIR of the launcher, its ranks, their scoring workers and servers
        torchelastic_*, pymp-*, ...

Most of a run's processes end by a signal and tidy nothing up. So the launcher removes the folder; and where it was killed
itself, the next launcher on the machine does. The lock of the launcher's open folder tells living ones from dead ones:
process ids do not, since containers that share ``/tmp`` count them for themselves.
"""

from __future__ import annotations

import atexit
import contextlib
import fcntl
import getpass
import os
import shutil
import tempfile
from pathlib import Path

PREFIX = "megatron_rl-"
MAX_PARENT_LENGTH = 50
"""Sockets lie in the folder, some levels down, and the kernel takes paths of 107 bytes for them."""


def use_own_folder() -> Path:
    """Make this process's temporary folder, for its children too; ``atexit`` removes it. Remove those of dead processes.

    Raises:
        OSError: no folder can be made.
    """
    parent = Path(tempfile.gettempdir())
    # A cache that later runs profit from keeps its place.
    os.environ.setdefault("TORCHINDUCTOR_CACHE_DIR", str(parent / f"torchinductor_{_user()}"))
    if len(str(parent)) > MAX_PARENT_LENGTH:
        parent = Path("/tmp")
    for old in parent.glob(f"{PREFIX}*"):
        if (lock := _lock(old)) is not None:
            _remove(old)
            os.close(lock)
    folder = Path(tempfile.mkdtemp(prefix=PREFIX, dir=parent))
    while _lock(folder) is None:  # another launcher took it for a leftover, in the instant before the lock
        folder = Path(tempfile.mkdtemp(prefix=PREFIX, dir=parent))
    atexit.register(_remove, folder)
    os.environ["TMPDIR"] = tempfile.tempdir = str(folder)
    return folder


def _lock(folder: Path) -> int | None:
    """Return a descriptor that holds the lock of one of our folders; None if another process has it, or the folder is gone."""
    try:
        descriptor = os.open(folder, os.O_RDONLY | os.O_DIRECTORY | os.O_NOFOLLOW)
    except OSError:
        return None
    with contextlib.suppress(OSError):
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        status = os.fstat(descriptor)
        if status.st_uid == os.getuid() and os.path.samestat(status, folder.stat()):
            return descriptor
    os.close(descriptor)
    return None


def _remove(folder: Path) -> None:
    shutil.rmtree(folder, ignore_errors=True)


def _user() -> str:
    try:
        return getpass.getuser()
    except (KeyError, OSError):  # a container may have no name for the user
        return str(os.getuid())

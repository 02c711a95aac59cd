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
UNLOCKED_PREFIX = "megatron_rl_"
"""Begins the name of a folder on a file system without locks. A kill leaves it behind for good."""
NUM_TRIES = 3
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
    _remove_leftovers(parent)
    folder = _locked_folder(parent)
    atexit.register(_remove, folder)
    os.environ["TMPDIR"] = tempfile.tempdir = str(folder)
    return folder


def _remove_leftovers(parent: Path) -> None:
    """Remove folders of dead processes: our user's, whose lock can be had. What the file system does not say is left alone."""
    for old in parent.glob(f"{PREFIX}*"):
        with contextlib.suppress(OSError):
            lock = _lock(old)
            if os.fstat(lock).st_uid == os.getuid():
                _remove(old)
            os.close(lock)


def _locked_folder(parent: Path) -> Path:
    """Make a folder whose lock this process holds until its end; without locks, one that nobody takes for a leftover."""
    for _ in range(NUM_TRIES):
        folder = Path(tempfile.mkdtemp(prefix=PREFIX, dir=parent))
        try:
            _lock(folder)
        except OSError as error:
            _remove(folder)
            if not isinstance(error, BlockingIOError | FileNotFoundError):
                break
            # Another launcher took it for a leftover, in the instant before the lock.
        else:
            return folder
    return Path(tempfile.mkdtemp(prefix=UNLOCKED_PREFIX, dir=parent))


def _lock(folder: Path) -> int:
    """Return a descriptor that holds the lock of a folder.

    Raises:
        BlockingIOError: another process has it.
        FileNotFoundError: the folder is gone.
        OSError: the file system cannot say, or the folder is none of ours.
    """
    descriptor = os.open(folder, os.O_RDONLY | os.O_DIRECTORY | os.O_NOFOLLOW)
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        if not os.path.samestat(os.fstat(descriptor), folder.stat()):
            raise FileNotFoundError(f"{folder} was replaced")
    except OSError:
        os.close(descriptor)
        raise
    return descriptor


def _remove(folder: Path) -> None:
    shutil.rmtree(folder, ignore_errors=True)


def _user() -> str:
    try:
        return getpass.getuser()
    except (KeyError, OSError):  # a container may have no name for the user
        return str(os.getuid())

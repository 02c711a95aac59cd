"""One owner for a folder: a lock that ends with its process, however that ends.

    <folder>/.lock      JSON: who holds it, and a number that grows every ``BEAT_S``; empty after a clean end

The system's lock (flock; over NFS, Linux makes it one of the server's) decides. The file only tells who holds it, and helps
where the system cannot know: a file that a process on another machine has left may belong to a dead machine, or to a live one
on a file system whose locks do not reach across machines. Then the number is watched for ``SILENT_S``. Clocks are never
compared: a lock counts as left if nothing was seen to change.

A process that becomes another program by exec keeps its lock: ``handed_on`` before, ``inherited_lock`` after.
"""

from __future__ import annotations

import contextlib
import errno
import fcntl
import getpass
import json
import os
import socket
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from megatron_rl.errors import UserError
from megatron_rl.files import disk_errors

FILE = ".lock"
BEAT_S = 2.0
"""Seconds between two signs of life in the file."""
SILENT_S = 10.0
"""Seconds without a sign of life after which a lock of another machine counts as left behind."""
VARIABLE = "MEGATRON_RL_LOCK"
"""``pid:descriptor:folder`` of the lock that a starter holds."""
_NO_LOCKS = {errno.ENOLCK, errno.ENOSYS, errno.EOPNOTSUPP}


def try_lock(descriptor: int) -> bool:
    """Lock an open file until it is closed; return False if another process has it.

    Raises:
        OSError: the file system cannot say, for example because it has no locks.
    """
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except (BlockingIOError, PermissionError):
        return False
    return True


class FolderLock:
    """The lock of one folder, held by this process; a thread writes its signs of life."""

    def __init__(self, folder: Path, descriptor: int) -> None:
        """Hold on to a locked file. ``take_lock`` and ``inherited_lock`` call this."""
        self.folder, self._descriptor = folder, descriptor
        self._holder = _myself()
        self._stopping = threading.Event()
        self._write(0)
        self._thread = threading.Thread(target=self._beat, name="lock", daemon=True)
        self._thread.start()

    def handed_on(self) -> dict[str, str]:
        """Let the lock survive exec; return the variable that the next program must find."""
        os.set_inheritable(self._descriptor, True)
        return {VARIABLE: f"{os.getpid()}:{self._descriptor}:{self.folder}"}

    def release(self) -> None:
        """Give the folder free, with nothing left to ask about."""
        self._stopping.set()
        self._thread.join(BEAT_S)  # a file system that hangs must not hold up the end
        with contextlib.suppress(OSError):
            os.ftruncate(self._descriptor, 0)
        with contextlib.suppress(OSError):
            fcntl.flock(self._descriptor, fcntl.LOCK_UN)  # a process that was forked meanwhile has the file open too
        os.close(self._descriptor)

    def _beat(self) -> None:
        beat = 0
        while not self._stopping.wait(BEAT_S):
            beat += 1
            self._write(beat)

    def _write(self, beat: int) -> None:
        with contextlib.suppress(OSError):  # a full disk, say, of which the run itself will complain
            data = json.dumps({**self._holder, "beat": beat}).encode()
            os.pwrite(self._descriptor, data, 0)
            os.ftruncate(self._descriptor, len(data))
            os.fsync(self._descriptor)


def take_lock(folder: Path, *, field: str = "exp_manager.exp_dir") -> FolderLock:
    """Take the lock of a folder, which is made if it is missing.

    Raises:
        UserError: another process has it, or the folder cannot be written.
    """
    folder = folder.absolute()
    with disk_errors(folder, field=field, fix="choose a folder that can be written, or mend its rights"):
        folder.mkdir(parents=True, exist_ok=True)
        descriptor, is_proven = _open_locked(folder, field)
        found = _read(descriptor)
        if found and not (is_proven and found.get("machine") == _machine()):
            print(f"{folder / FILE} names {_described(found)}: watching it for {SILENT_S:g} s", flush=True)
            if _still_beats(folder / FILE):
                os.close(descriptor)
                raise _taken(folder, found, field)
            print("it gave no sign of life: its machine has gone, and this start takes over", flush=True)
    return FolderLock(folder, descriptor)


@contextlib.contextmanager
def inherited_lock() -> Iterator[None]:
    """Hold, and release at the end, the lock that this process had before it became this program, if it had one."""
    process, descriptor, folder = _handed_on()
    if process != os.getpid():
        yield
        return
    os.set_inheritable(descriptor, False)
    lock = FolderLock(Path(folder), descriptor)
    try:
        yield
    finally:
        lock.release()


def is_held_by_parent(folder: Path) -> bool:
    """Return whether the process that started this one holds the lock of the folder for it."""
    process, _, held = _handed_on()
    return process == os.getppid() and held == str(folder.absolute())


def identity(folder: Path) -> tuple[int, int] | None:
    """Return what tells the folder's lock file from any other; None: it has none.

    It changes when the folder is removed, replaced or unmounted, and when somebody removes the file to take the folder over.
    """
    try:
        found = os.stat(folder / FILE)
    except (FileNotFoundError, NotADirectoryError):
        return None
    return found.st_dev, found.st_ino


def _open_locked(folder: Path, field: str) -> tuple[int, bool]:
    """Return the locked file, and whether the file system has locks at all."""
    path = folder / FILE
    while True:
        descriptor = os.open(path, os.O_RDWR | os.O_CREAT | os.O_NOFOLLOW, 0o644)
        try:
            has_locked, is_proven = try_lock(descriptor), True
        except OSError as error:
            if error.errno not in _NO_LOCKS:
                os.close(descriptor)
                raise
            has_locked, is_proven = True, False
        if not has_locked:
            found = _read(descriptor)
            os.close(descriptor)
            raise _taken(folder, found, field)
        opened = os.fstat(descriptor)
        if identity(folder) == (opened.st_dev, opened.st_ino):
            return descriptor, is_proven
        os.close(descriptor)  # somebody removed the file in between


def _still_beats(path: Path) -> bool:
    """Watch the file for a change. It is opened anew for each look, which makes NFS ask the server."""
    first, end = path.read_bytes(), time.monotonic() + SILENT_S
    while time.monotonic() < end:
        time.sleep(min(BEAT_S / 4, SILENT_S / 4))
        if path.read_bytes() != first:
            return True
    return False


def _taken(folder: Path, found: dict[str, Any], field: str) -> UserError:
    fix = "wait for that run, or end it, or choose another exp_manager.name"
    if found.get("machine") != _machine():
        fix += f"; if its machine is gone for good, remove {folder / FILE}"
    return UserError(field, str(folder), f"is in use by {_described(found)}", fix)


def _described(holder: dict[str, Any]) -> str:
    if not holder:
        return "another process"
    return "process {pid} of user {user} on {host}, since {since}".format(**holder)


def _myself() -> dict[str, Any]:
    try:
        user = getpass.getuser()
    except (KeyError, OSError):  # a container's user without a name
        user = str(os.getuid())
    since = time.strftime("%Y-%m-%d %H:%M:%S %Z")
    return {"pid": os.getpid(), "host": socket.gethostname(), "user": user, "since": since, "machine": _machine()}


def _machine() -> str:
    """Return what tells this kernel, since it was started, from any other: within it the system's lock knows all holders."""
    with contextlib.suppress(OSError):
        return Path("/proc/sys/kernel/random/boot_id").read_text().strip()
    return socket.gethostname()


def _read(descriptor: int) -> dict[str, Any]:
    """Return the holder that the file names; nothing after a clean end, or if it names none."""
    try:
        found = json.loads(os.pread(descriptor, 4096, 0))
    except ValueError:
        return {}
    return found if isinstance(found, dict) and found.keys() >= _myself().keys() else {}


def _handed_on() -> tuple[int, int, str]:
    process, descriptor, folder = (os.environ.get(VARIABLE) or "-1:-1:").split(":", 2)
    return int(process), int(descriptor), folder

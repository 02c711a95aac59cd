"""One owner for a folder: a lock that ends with its process, however that ends.

    <folder>/.lock      JSON: who holds it, and a number that grows every ``BEAT_S``; empty after a clean end
    <folder>/.lock.1    the same of node 1 of a run on several nodes, and so on: one start at a time on each node

The system's lock (flock; over NFS, Linux makes it one of the server's) decides. The file only tells who holds it, and helps
where the system cannot know: a file that a process on another machine has left may belong to a dead machine, or to a live one
on a file system whose locks do not reach across machines. Then the number is watched for ``SILENT_S``. Clocks are never
compared: a lock counts as left if nothing was seen to change. Who takes such a lock over puts a new file in its place. The old
owner may only have been stopped for a while: it finds another name there, writes no more, and ``other_holder`` tells its run.

A process that becomes another program by exec keeps its lock: ``handed_on`` before, ``inherited_lock`` after.
"""

from __future__ import annotations

import contextlib
import errno
import fcntl
import getpass
import json
import os
import secrets
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
"""``pid:descriptor:file`` of the lock that a starter holds."""
_HOLDER = {"pid", "host", "user", "since", "machine"}
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

    def __init__(self, path: Path, descriptor: int) -> None:
        """Hold on to a locked file. ``take_lock`` and ``inherited_lock`` call this."""
        self._path, self._descriptor = path, descriptor
        self._holder = _myself()
        self._stopping = threading.Event()
        self._write(0)
        self._thread = threading.Thread(target=self._beat, name="lock", daemon=True)
        self._thread.start()

    def handed_on(self) -> dict[str, str]:
        """Let the lock survive exec; return the variable that the next program must find."""
        os.set_inheritable(self._descriptor, True)
        return {VARIABLE: f"{os.getpid()}:{self._descriptor}:{self._path}"}

    def release(self) -> None:
        """Give the folder free, with nothing left to ask about."""
        self._stopping.set()
        self._thread.join(BEAT_S)  # a file system that hangs must not hold up the end
        with contextlib.suppress(OSError):
            if self._is_ours():
                os.ftruncate(self._descriptor, 0)
        with contextlib.suppress(OSError):
            fcntl.flock(self._descriptor, fcntl.LOCK_UN)  # a process that was forked meanwhile has the file open too
        os.close(self._descriptor)

    def _beat(self) -> None:
        beat = 0
        while not self._stopping.wait(BEAT_S):
            beat += 1
            with contextlib.suppress(OSError):
                if self._is_ours():
                    self._write(beat)

    def _is_ours(self) -> bool:
        """Return whether the file still names this process. Two starts that no lock could part may have come at once."""
        found = _read(self._path)
        return not found or _is_one_of(found, os.getpid())

    def _write(self, beat: int) -> None:
        with contextlib.suppress(OSError):  # a full disk, say, of which the run itself will complain
            data = json.dumps({**self._holder, "beat": beat}).encode()
            os.pwrite(self._descriptor, data, 0)
            os.ftruncate(self._descriptor, len(data))
            os.fsync(self._descriptor)


def take_lock(folder: Path, node_rank: int = 0, *, field: str = "exp_manager.exp_dir") -> FolderLock:
    """Take a node's lock of a folder, which is made if it is missing.

    Raises:
        UserError: another process has it, or the folder cannot be written.
    """
    folder = folder.absolute()
    path = folder / _name(node_rank)
    with disk_errors(folder, field=field, fix="choose a folder that can be written, or mend its rights"):
        folder.mkdir(parents=True, exist_ok=True)
        descriptor, is_proven = _open_locked(path, field)
        found = _read(path)
        if found and not (is_proven and found.get("machine") == _machine()):
            print(f"{path} names {_described(found)}: watching it for {SILENT_S:g} s", flush=True)
            if _still_beats(path):
                os.close(descriptor)
                raise _taken(path, _read(path) or found, field)
            print("it gave no sign of life: its machine has gone, and this start takes over", flush=True)
            descriptor = _replaced(path, descriptor)
    return FolderLock(path, descriptor)


@contextlib.contextmanager
def inherited_lock() -> Iterator[None]:
    """Hold, and release at the end, the lock that this process had before it became this program, if it had one."""
    process, descriptor, path = _handed_on()
    if process != os.getpid():
        yield
        return
    os.set_inheritable(descriptor, False)
    lock = FolderLock(Path(path), descriptor)
    try:
        yield
    finally:
        lock.release()


def is_held_by_parent(folder: Path, node_rank: int = 0) -> bool:
    """Return whether the process that started this one holds the node's lock of the folder for it."""
    process, _, held = _handed_on()
    return process == os.getppid() and held == str(folder.absolute() / _name(node_rank))


def other_holder(folder: Path) -> str | None:
    """Describe the process that the folder's lock names; None where that is this one or its parent, or where it names none."""
    found = _read(folder / FILE)
    return None if not found or _is_one_of(found, os.getpid(), os.getppid()) else _described(found)


def identity(folder: Path) -> tuple[int, int] | None:
    """Return what tells the folder's lock file from any other; None: it has none.

    It changes when the folder is removed, replaced or unmounted, and when another start takes the folder over.
    """
    return _identity(folder / FILE)


def _identity(path: Path) -> tuple[int, int] | None:
    try:
        found = os.stat(path)
    except (FileNotFoundError, NotADirectoryError):
        return None
    return found.st_dev, found.st_ino


def _name(node_rank: int) -> str:
    return FILE if node_rank == 0 else f"{FILE}.{node_rank}"


def _open_locked(path: Path, field: str) -> tuple[int, bool]:
    """Return the locked file, and whether the file system has locks at all."""
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
            os.close(descriptor)
            raise _taken(path, _read(path), field)
        opened = os.fstat(descriptor)
        if _identity(path) == (opened.st_dev, opened.st_ino):
            return descriptor, is_proven
        os.close(descriptor)  # somebody removed the file in between


def _replaced(path: Path, descriptor: int) -> int:
    """Put a new, locked file in the place of one that was left behind; return it in place of the old one."""
    temporary = path.with_name(f"{path.name}.{secrets.token_hex(8)}.tmp")
    new = os.open(temporary, os.O_RDWR | os.O_CREAT | os.O_EXCL, 0o644)
    try:
        try:
            try_lock(new)
        except OSError as error:
            if error.errno not in _NO_LOCKS:
                raise
        os.replace(temporary, path)
    except OSError:
        os.close(new)
        temporary.unlink(missing_ok=True)
        raise
    os.close(descriptor)
    return new


def _still_beats(path: Path) -> bool:
    """Watch the file for a change. It is opened anew for each look, which makes NFS ask the server."""
    first, end = path.read_bytes(), time.monotonic() + SILENT_S
    while time.monotonic() < end:
        time.sleep(min(BEAT_S / 4, SILENT_S / 4))
        if path.read_bytes() != first:
            return True
    return False


def _taken(path: Path, found: dict[str, Any], field: str) -> UserError:
    fix = "wait for that run, or end it, or choose another exp_manager.name"
    if found.get("machine") != _machine():
        fix += f"; if its machine is gone for good, remove {path}"
    return UserError(field, str(path.parent), f"is in use by {_described(found)}", fix)


def _described(holder: dict[str, Any]) -> str:
    if not holder:
        return "another process"
    return "process {pid} of user {user} on {host}, since {since}".format(**holder)


def _is_one_of(holder: dict[str, Any], *pids: int) -> bool:
    """Return whether a holder is one of these processes here. In another container ids may be equal, but the host is not."""
    return (holder["host"], holder["machine"]) == (socket.gethostname(), _machine()) and holder["pid"] in pids


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


def _read(path: Path) -> dict[str, Any]:
    """Return the holder that the file names; nothing after a clean end, or if it names none.

    It is opened anew each time, which makes NFS ask the server.
    """
    try:
        found = json.loads(path.read_bytes())
    except (FileNotFoundError, NotADirectoryError, ValueError):
        return {}
    return found if isinstance(found, dict) and found.keys() >= _HOLDER else {}


def _handed_on() -> tuple[int, int, str]:
    process, descriptor, path = (os.environ.get(VARIABLE) or "-1:-1:").split(":", 2)
    return int(process), int(descriptor), path

"""One owner for a folder: who is refused, who takes over, and when."""

from __future__ import annotations

import errno
import fcntl
import json
import os
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

from megatron_rl.errors import UserError
from megatron_rl.process import lock

HOLD = """
import os, sys, time
from pathlib import Path
from megatron_rl.process.lock import take_lock
held = take_lock(Path(sys.argv[1]))
{then}
print("holds", flush=True)
time.sleep(60)
"""
BECOME_ANOTHER = """
again = "import time; from megatron_rl.process.lock import inherited_lock\\nwith inherited_lock():\\n"
again += " print('holds', flush=True); time.sleep(60)"
os.execve(sys.executable, [sys.executable, "-c", again], {**os.environ, **held.handed_on()})
"""

WITHOUT_LOCKS = """
import errno, fcntl, sys
from pathlib import Path
from megatron_rl.process import lock
def no_locks(*_):
    raise OSError(errno.ENOLCK, "No locks available")
fcntl.flock, lock.BEAT_S, lock.SILENT_S = no_locks, 0.05, 0.3
held = lock.take_lock(Path(sys.argv[1]))
print("holds", flush=True)
for _ in sys.stdin:
    print(lock.other_holder(Path(sys.argv[1])), flush=True)
"""


def no_locks(*_: object) -> None:
    raise OSError(errno.ENOLCK, "No locks available")


@contextmanager
def holder(folder: Path, then: str = "") -> Iterator[subprocess.Popen[str]]:
    """A process that holds the lock of a folder until it is killed."""
    command = [sys.executable, "-c", HOLD.format(then=then), str(folder)]
    process = subprocess.Popen(command, stdout=subprocess.PIPE, text=True)
    try:
        assert process.stdout is not None and process.stdout.readline() == "holds\n"
        yield process
    finally:
        process.kill()
        process.communicate()


def left_by_another_machine(folder: Path) -> None:
    found = {"pid": 7, "host": "node7", "user": "ann", "since": "long ago", "machine": "another", "beat": 3}
    (folder / ".lock").write_text(json.dumps(found))


def beat_of(folder: Path, number: int) -> None:
    found = json.loads((folder / ".lock").read_text())
    (folder / ".lock").write_text(json.dumps({**found, "beat": number}))


@pytest.fixture
def quick(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(lock, "BEAT_S", 0.05)
    monkeypatch.setattr(lock, "SILENT_S", 0.3)


@pytest.mark.parametrize("then", ["", BECOME_ANOTHER], ids=["stays", "becomes another program"])
def test_a_holder_is_named_and_a_killed_one_is_followed_at_once(tmp_path: Path, then: str) -> None:
    with holder(tmp_path / "run", then) as process:
        with pytest.raises(UserError, match=f"is in use by process {process.pid} of user .* on .*, since 2") as error:
            lock.take_lock(tmp_path / "run")
        assert "exp_manager.name" in str(error.value) and "remove" not in str(error.value)
        process.kill()
        process.wait()
        started = time.monotonic()
        mine = lock.take_lock(tmp_path / "run")
        assert time.monotonic() - started < 1.0
    assert json.loads((tmp_path / "run/.lock").read_text())["pid"] == os.getpid()
    mine.release()
    assert (tmp_path / "run/.lock").read_bytes() == b""
    lock.take_lock(tmp_path / "run").release()


def test_a_silent_lock_of_another_machine_is_taken_over(
    tmp_path: Path, quick: None, capsys: pytest.CaptureFixture[str]
) -> None:
    left_by_another_machine(tmp_path)
    lock.take_lock(tmp_path).release()
    output = capsys.readouterr().out
    assert "process 7 of user ann on node7, since long ago: watching it" in output and "takes over" in output


def test_a_lock_of_another_machine_that_beats_is_refused_whatever_the_system_says(tmp_path: Path, quick: None) -> None:
    left_by_another_machine(tmp_path)
    beating = threading.Timer(0.1, beat_of, (tmp_path, 4))
    beating.start()
    with pytest.raises(UserError, match="on node7") as error:
        lock.take_lock(tmp_path)
    beating.join()
    assert f"if its machine is gone for good, remove {tmp_path}/.lock" in str(error.value)


def test_a_lock_that_the_server_keeps_for_a_dead_machine_has_a_way_out(tmp_path: Path) -> None:
    left_by_another_machine(tmp_path)
    with (tmp_path / ".lock").open("r+") as kept:
        fcntl.flock(kept, fcntl.LOCK_EX)
        with pytest.raises(UserError, match=r"on node7, since long ago.*gone for good, remove .*/\.lock"):
            lock.take_lock(tmp_path)
        (tmp_path / ".lock").unlink()
        lock.take_lock(tmp_path).release()


def test_signs_of_life_decide_where_the_file_system_has_no_locks(
    tmp_path: Path, quick: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(fcntl, "flock", no_locks)
    first = lock.take_lock(tmp_path)
    with pytest.raises(UserError, match=f"process {os.getpid()} of user"):
        lock.take_lock(tmp_path)
    first._stopping.set()
    first._thread.join()
    lock.take_lock(tmp_path).release()


def test_the_file_is_not_written_through_a_link(tmp_path: Path) -> None:
    (tmp_path / "precious").write_text("kept")
    (tmp_path / ".lock").symlink_to(tmp_path / "precious")
    with pytest.raises(UserError, match="could not be written"):
        lock.take_lock(tmp_path)
    assert (tmp_path / "precious").read_text() == "kept"


def test_a_lock_that_is_replaced_is_another_one(tmp_path: Path) -> None:
    mine = lock.take_lock(tmp_path)
    before = lock.identity(tmp_path)
    assert before is not None and lock.identity(tmp_path) == before
    (tmp_path / ".lock").unlink()
    assert lock.identity(tmp_path) is None
    lock.take_lock(tmp_path).release()
    assert lock.identity(tmp_path) != before
    mine.release()


@contextmanager
def holder_without_locks(folder: Path) -> Iterator[subprocess.Popen[str]]:
    """A process that holds the lock of a folder whose file system has none, and says who holds it when it is asked."""
    command = [sys.executable, "-c", WITHOUT_LOCKS, str(folder)]
    process = subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)
    try:
        assert process.stdout is not None
        while process.stdout.readline() != "holds\n":
            assert process.poll() is None
        yield process
    finally:
        process.kill()
        process.communicate()


def asked(process: subprocess.Popen[str]) -> str:
    assert process.stdin is not None and process.stdout is not None
    process.stdin.write("who has it?\n")
    process.stdin.flush()
    return process.stdout.readline().strip()


def test_an_owner_that_was_only_stopped_learns_who_has_the_folder(tmp_path: Path) -> None:
    with holder_without_locks(tmp_path) as old:
        before = lock.identity(tmp_path)
        old.send_signal(signal.SIGSTOP)
        with holder_without_locks(tmp_path) as new:
            assert lock.identity(tmp_path) != before
            old.send_signal(signal.SIGCONT)
            time.sleep(0.5)  # several of its beats
            assert json.loads((tmp_path / ".lock").read_text())["pid"] == new.pid
            assert asked(old).startswith(f"process {new.pid} of user") and asked(new) == "None"


def test_of_two_owners_at_once_the_one_that_is_named_goes_on(
    tmp_path: Path, quick: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    mine = lock.take_lock(tmp_path)
    other = {**json.loads((tmp_path / ".lock").read_text()), "pid": 1}
    (tmp_path / ".lock").write_text(json.dumps(other))  # into the same file
    time.sleep(0.2)
    mine.release()
    assert json.loads((tmp_path / ".lock").read_text()) == other
    assert "process 1 of user" in str(lock.other_holder(tmp_path))


def test_each_node_has_a_lock_of_its_own(tmp_path: Path) -> None:
    first, second = lock.take_lock(tmp_path), lock.take_lock(tmp_path, 1)
    for node_rank in (0, 1):
        with pytest.raises(UserError, match=f"is in use by process {os.getpid()} of user"):
            lock.take_lock(tmp_path, node_rank)
    first.release()
    second.release()
    assert {path.name for path in tmp_path.iterdir()} == {".lock", ".lock.1"}

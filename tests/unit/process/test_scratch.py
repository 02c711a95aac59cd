"""The temporary folder of a run, and those of runs that were killed."""

from __future__ import annotations

import errno
import fcntl
import os
import signal
import subprocess
import sys
import tempfile
from pathlib import Path

import pytest

from megatron_rl.process import scratch

PROGRAM = """
import sys, tempfile
from megatron_rl.process import lifetime, scratch
def program():
    folder = scratch.use_own_folder()
    tempfile.mkdtemp(prefix="pymp-")
    print(folder, flush=True)
    sys.stdin.readline()
    return 0
lifetime.run(program)
"""


def start(parent: Path) -> tuple[subprocess.Popen[str], Path]:
    process = subprocess.Popen(
        [sys.executable, "-c", PROGRAM], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True,
        env=os.environ | {"TMPDIR": str(parent)},
    )  # fmt: skip
    return process, Path(process.stdout.readline().strip())


def test_one_that_lives_keeps_its_folder_and_one_that_died_does_not() -> None:
    with tempfile.TemporaryDirectory(dir="/tmp", prefix="t") as name:  # sockets need a short path
        parent = Path(name)
        (parent / "megatron_rl-of-somebody").write_text("no folder")
        alive, its_folder = start(parent)
        dead, left = start(parent)
        assert its_folder.parent == left.parent == parent
        dead.send_signal(signal.SIGKILL)
        dead.wait()
        assert list(left.iterdir())
        last, _ = start(parent)
        assert not left.exists() and [path.name[:5] for path in its_folder.iterdir()] == ["pymp-"]
        for process in (alive, last):
            process.communicate("end\n", timeout=30)
            assert process.returncode == 0
        assert [path.name for path in parent.iterdir()] == ["megatron_rl-of-somebody"]


@pytest.mark.parametrize(
    "error", [OSError(errno.ENOLCK, "none"), OSError(errno.EBADF, "NFS"), BlockingIOError()], ids=repr
)
def test_without_locks_there_is_one_folder_that_no_launcher_takes(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, error: OSError
) -> None:
    def refuse(_descriptor: int, _how: int) -> None:
        raise error

    left = tmp_path / "megatron_rl-left"
    left.mkdir()
    with monkeypatch.context() as patched:
        patched.setattr(fcntl, "flock", refuse)
        scratch._remove_leftovers(tmp_path)
        folder = scratch._locked_folder(tmp_path)
    assert sorted(tmp_path.iterdir()) == sorted([folder, left])
    scratch._remove_leftovers(tmp_path)
    assert [*tmp_path.iterdir()] == [folder], "one with a lock again judges what has one"


def test_a_file_system_that_says_another_owner_gives_one_folder_too(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(os, "getuid", lambda: 12345)
    folder = scratch._locked_folder(tmp_path)
    scratch._remove_leftovers(tmp_path)
    assert [*tmp_path.iterdir()] == [folder]

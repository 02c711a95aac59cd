"""How the launcher ends its ranks, here small programs without torch; and what it leaves."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path

import psutil
import pytest

ROOT = Path(__file__).parents[3]
RANK = """
import multiprocessing.util, os, time
from pathlib import Path
from megatron_rl.process import lifetime
def program():
    import mine  # of the folder in which the command is given
    multiprocessing.util.get_temp_dir()
    Path(os.environ["RANK"] + ".pid").write_text(str(os.getpid()))
    time.sleep(60)
    return 0
if __name__ == "__main__":
    lifetime.run(program)
"""


@pytest.fixture
def temporary() -> Iterator[Path]:
    with tempfile.TemporaryDirectory(dir="/tmp", prefix="t") as name:  # sockets need a short path
        yield Path(name)


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """A folder to give commands in, with a user's module, and others that a careless path takes for the library's."""
    (tmp_path / "rank").mkdir()
    (tmp_path / "rank" / "light.py").write_text(RANK)
    (tmp_path / "work").mkdir()
    (tmp_path / "work" / "mine.py").touch()
    for name in ("secrets", "random", "types", "torch"):
        (tmp_path / "work" / f"{name}.py").write_text("raise SystemExit('a module of the user, for another purpose')")
    return tmp_path


def start(folder: Path, temporary: Path) -> subprocess.Popen[str]:
    """Start two ranks, as a shell that ignores SIGHUP does (nohup)."""
    command = [sys.executable, "-P", "-m", "megatron_rl.launch", "--standalone", "--nproc-per-node=2", "-m", "light"]
    set_signals = "import os, signal, sys; signal.signal(signal.SIGHUP, signal.SIG_IGN); "
    set_signals += "signal.signal(signal.SIGINT, signal.SIG_DFL); os.execv(sys.argv[1], sys.argv[1:])"
    return subprocess.Popen(
        [sys.executable, "-P", "-c", set_signals, *command], cwd=folder / "work", text=True, start_new_session=True,
        stdout=subprocess.PIPE, stderr=subprocess.STDOUT,
        env=os.environ | {"PYTHONPATH": f"{ROOT}:{folder / 'rank'}", "TMPDIR": str(temporary)},
    )  # fmt: skip


def pids(process: subprocess.Popen[str], folder: Path) -> list[int]:
    files = [folder / "work" / f"{rank}.pid" for rank in range(2)]
    while not all(file.exists() and file.read_text() for file in files):
        assert process.poll() is None, process.communicate()[0]
        time.sleep(0.02)
    found = [int(file.read_text()) for file in files]
    for file in files:
        file.unlink()
    return found


def test_ctrl_c_is_one_line_and_leaves_nothing(folder: Path, temporary: Path) -> None:
    process = start(folder, temporary)
    ranks = pids(process, folder)
    os.killpg(process.pid, signal.SIGHUP)
    assert [path.name[:12] for path in temporary.iterdir()] == ["megatron_rl-"]
    time.sleep(0.3)
    assert process.poll() is None, "nohup holds"
    os.killpg(process.pid, signal.SIGINT)
    assert process.communicate(timeout=30)[0] == "error: ended by SIGINT\n"
    assert process.returncode == 130
    assert not any(map(psutil.pid_exists, ranks))
    assert not list(temporary.iterdir())


def test_after_a_kill_the_next_start_tidies_up(folder: Path, temporary: Path) -> None:
    process = start(folder, temporary)
    pids(process, folder)
    process.kill()
    process.wait()
    (left,) = temporary.iterdir()
    assert any(path.name.startswith("pymp-") for path in left.iterdir())
    process = start(folder, temporary)
    pids(process, folder)
    process.send_signal(signal.SIGTERM)
    assert process.communicate(timeout=30)[0] == "error: ended by SIGTERM\n"
    assert process.returncode == 143
    assert not list(temporary.iterdir())

"""The temporary folder of a run, and those of runs that were killed."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import tempfile
from pathlib import Path

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

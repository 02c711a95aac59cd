"""Signs of life of the processes that a program of ours consists of, and of those that stopped giving any.

    process     a thread touches FOLDER/<process id> once a second
    starter     Heartbeats looks which files have not changed

A process that is stopped, that the machine no longer runs, or that holds the interpreter's lock for ever gives none; one that
waits, computes or loads weights does. So silence means the same in every phase, which no answer over a network does. Times of
files are compared for being equal only: clocks may jump.
"""

from __future__ import annotations

import contextlib
import os
import shutil
import tempfile
import threading
import time
from pathlib import Path

VARIABLE = "MEGATRON_RL_HEARTBEATS"
"""Environment variable with the folder."""
BEAT_S = 1.0


def start() -> None:
    """Give signs of life in the folder that the environment names; a program started by hand has none."""
    folder = os.environ.get(VARIABLE)
    if folder is not None:
        threading.Thread(target=_beat, args=(Path(folder) / str(os.getpid()),), name="heartbeat", daemon=True).start()


def _beat(file: Path) -> None:
    while True:
        with contextlib.suppress(OSError):  # the disk is full for a while, or the starter is gone, and so are we soon
            file.touch(mode=0o600)
        time.sleep(BEAT_S)


class Heartbeats:
    """The folder of one program's processes, and how long each has been silent."""

    def __init__(self) -> None:
        """Make the folder, under the machine's folder for temporary files."""
        self.folder = Path(tempfile.mkdtemp(prefix="megatron_rl_heartbeats_"))
        self._seen: dict[str, tuple[int, float]] = {}
        """By process id: time of the last sign as the file has it, and seconds that this starter has waited since."""

    def silence_s(self, passed_s: float) -> float:
        """Return for how long the most silent living process has given no sign.

        Args:
            passed_s: seconds since the last call.
        """
        for name in os.listdir(self.folder):
            with contextlib.suppress(OSError):
                if not _lives(int(name)):
                    (self.folder / name).unlink()
                    self._seen.pop(name, None)
                    continue
                sign = (self.folder / name).stat().st_mtime_ns
                last, waited = self._seen.get(name, (0, 0.0))
                self._seen[name] = (sign, waited + passed_s if sign == last else 0.0)
        return max((waited for _, waited in self._seen.values()), default=0.0)

    def forget(self) -> None:
        """Forget the processes of an earlier start."""
        self._seen.clear()
        for name in os.listdir(self.folder):
            (self.folder / name).unlink(missing_ok=True)

    def close(self) -> None:
        """Remove the folder. Safe to call twice."""
        shutil.rmtree(self.folder, ignore_errors=True)


def _lives(pid: int) -> bool:
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return False
    except PermissionError:
        pass
    return True

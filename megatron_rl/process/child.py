"""A child process in its own session, killed with everything that it has started."""

from __future__ import annotations

import contextlib
import os
import signal
import subprocess
from collections.abc import Mapping, Sequence
from pathlib import Path

from megatron_rl.process.lifetime import PARENT_VARIABLE
from megatron_rl.process.output import open_log

TRAINER_ALONE = ("PYTORCH_ALLOC_CONF", "PYTORCH_CUDA_ALLOC_CONF", "CUDA_DEVICE_MAX_CONNECTIONS")
"""Variables that suit the trainer and not a server: torch_memory_saver, by which a colocated server releases its memory,
refuses expandable segments, and one hardware queue serialises a server's streams."""


class ChildProcess:
    """One start of one program. It ends when this process ends, at the latest (lifetime.py)."""

    def __init__(self, command: Sequence[str], *, log: Path, environment: Mapping[str, str]) -> None:
        """Start the program.

        Args:
            command: program and arguments.
            log: file that its output is appended to; a link is replaced.
            environment: variables added to this process's; torchrun's and those of ``TRAINER_ALONE`` are not handed on.
        """
        log.parent.mkdir(parents=True, exist_ok=True)
        with open(open_log(log), "ab") as output:
            self._process = subprocess.Popen(
                list(command),
                stdin=subprocess.DEVNULL,
                stdout=output,
                stderr=subprocess.STDOUT,
                env={**_inherited(), **environment, PARENT_VARIABLE: str(os.getpid())},
                start_new_session=True,  # this process handles Ctrl-C, and can kill the whole session at once
            )

    @property
    def pid(self) -> int:
        """Return the process id, which is its process group's as well."""
        return self._process.pid

    def status(self) -> int | None:
        """Return the exit status, negative for a signal; None while it runs."""
        return self._process.poll()

    def kill(self) -> None:
        """Kill it and its children at once. Safe to call twice."""
        with contextlib.suppress(ProcessLookupError, PermissionError):
            os.killpg(self.pid, signal.SIGKILL)
        self._process.wait()


def _inherited() -> dict[str, str]:
    """Return the environment without torchrun's variables, by which a server would take itself for this rank, and without
    those that are for the trainer."""
    prefixes = ("TORCHELASTIC_", "GROUP_", "ROLE_", "LOCAL_")
    names = ("RANK", "WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT", *TRAINER_ALONE)
    return {key: value for key, value in os.environ.items() if key not in names and not key.startswith(prefixes)}


def how_it_ended(status: int, log: Path, since: int = 0) -> str:
    """``exited with status 1 (what its log says)``, ``was killed by SIGKILL``.

    Args:
        status: the one of ``ChildProcess.status``.
        log: of the process; read from byte ``since`` on. Not asked where somebody else ended it: what it said last is not why.
    """
    names = {known.value: known.name for known in signal.Signals}
    how = f"exited with status {status}" if status >= 0 else f"was killed by {names.get(-status, f'signal {-status}')}"
    return how if -status in (signal.SIGKILL, signal.SIGTERM) else f"{how} ({_last_error(log, since)})"


def _last_error(log: Path, since: int) -> str:
    """Return a log's last line that looks like the reason of a failure, from byte ``since`` on."""
    with log.open("rb") as file:
        file.seek(since)
        lines = [line.strip() for line in file.read().decode(errors="replace").splitlines() if line.strip()]
    errors = [line for line in lines if "Error" in line and not line.startswith("File ")]
    return (errors or lines or ["it wrote nothing"])[-1][:400]

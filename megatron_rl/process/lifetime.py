"""End of our programs: with their parent, however it ends, and with the status they mean.

No orphan trains on, serves on, or holds a port.
"""

from __future__ import annotations

import atexit
import contextlib
import ctypes
import os
import signal
import sys
from typing import NoReturn

PARENT_VARIABLE = "MEGATRON_RL_PARENT"
"""Process id of the starter of a program of ours, which passes it to ``die_with``."""


def die_with(parent: int) -> None:
    """Ask the kernel (Linux) to end this process when ``parent`` ends, more exactly: the thread that started it.

    Call it first: a process whose parent dies before this call lives on.
    """
    pr_set_pdeathsig = 1
    ctypes.CDLL(None).prctl(pr_set_pdeathsig, signal.SIGKILL)
    if os.getppid() != parent:  # it died before the request: no signal will come
        os._exit(1)


def die_with_starter() -> None:
    """Call ``die_with`` for the starter that the environment names; a program started by hand has none."""
    parent = os.environ.get(PARENT_VARIABLE)
    if parent is not None:
        die_with(int(parent))


def leave(status: int) -> NoReturn:
    """End this process with ``status``, after its exit handlers, and with its output flushed.

    Make it the last line of every program that may hold a process group or a store. Their threads belong to C++; while the
    interpreter is taken apart one of them aborts the process now and then ("terminate called without an active
    exception"), and a run that had said its error, or had ended well, then looks like a crash.
    """
    atexit._run_exitfuncs()
    for stream in (sys.stdout, sys.stderr):
        with contextlib.suppress(OSError):  # nobody reads any more
            stream.flush()
    os._exit(status)

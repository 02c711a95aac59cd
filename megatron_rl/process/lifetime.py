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
from collections.abc import Callable
from typing import NoReturn

from megatron_rl.process.output import keep_output

INTERRUPTED = 128 + signal.SIGINT
"""Exit status after Ctrl-C."""
PARENT_VARIABLE = "MEGATRON_RL_PARENT"
"""Process id of the starter of a program of ours, which passes it to ``die_with``."""


def run(program: Callable[[], int]) -> NoReturn:
    """Be one of our programs: do its work, and end with the status that it returns.

    It ends with its starter at the latest; output whose reader has gone does not end it; Ctrl-C ends it without a traceback.
    Import the work inside ``program``: this begins to hold here.
    """
    die_with_starter()
    keep_output()
    see_current_folder()
    for name in (PARENT_VARIABLE, "PYTHONSAFEPATH"):  # they are for this start, and not for what a user's reward starts
        os.environ.pop(name, None)
    try:
        status = program()
    except KeyboardInterrupt:
        status = INTERRUPTED
    except SystemExit as end:  # of a parser of arguments, which has said why
        status = end.code if isinstance(end.code, int) else int(end.code is not None)
    leave(status)


def see_current_folder() -> None:
    """Put the current folder last on the path: a user's tasks and rewards lie there.

    First, where ``python -m`` puts it without ``-P``, it would be in the way (path.py).
    """
    with contextlib.suppress(FileNotFoundError):  # it has been removed
        here = os.getcwd()
        if not {here, ""} & set(sys.path):
            sys.path.append(here)


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
        # There is none, nobody reads it any more, or a signal has interrupted its writing.
        with contextlib.suppress(AttributeError, OSError, RuntimeError):
            stream.flush()
    os._exit(status)

"""Children that end when their parent does, however it ends. No orphan trains on, serves on, or holds a port."""

from __future__ import annotations

import ctypes
import os
import signal

PARENT_VARIABLE = "MEGATRON_RL_PARENT"
"""Process id of who started a program of ours; the program passes it to ``die_with``."""


def die_with(parent: int) -> None:
    """Ask the kernel (Linux) to end this process when ``parent`` ends, more exactly: the thread that started it.

    Call it first of all: what the parent's death leaves behind before this call lives on.
    """
    pr_set_pdeathsig = 1
    ctypes.CDLL(None).prctl(pr_set_pdeathsig, signal.SIGKILL)
    if os.getppid() != parent:  # it died before the request: no signal will come
        os._exit(1)


def die_with_starter() -> None:
    """``die_with`` whoever the environment names; nothing for a program that was started by hand."""
    parent = os.environ.get(PARENT_VARIABLE)
    if parent is not None:
        die_with(int(parent))

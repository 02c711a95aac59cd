"""Leftovers of a killed SGLang server: 16 KB of shared memory, through which its scheduler tells its load."""

from __future__ import annotations

import contextlib
import re
from pathlib import Path

_SHARED = Path("/dev/shm")
_PATTERN = "sglang_loads_*.shm"


def remove_leftovers() -> None:
    """Remove such files that no process maps. Servers always end by SIGKILL, and cannot do so themselves.

    The next run's start removes them too, since a launcher that is killed takes its ranks with it. A server whose processes
    this one cannot see (another container with the same ``/dev/shm``) loses the figure, and nothing else.
    """
    mapped: set[str] = set()
    for maps in Path("/proc").glob("[0-9]*/maps"):
        with contextlib.suppress(OSError):  # it has ended, or is another user's, as are its files then
            mapped.update(re.findall(rf"{_SHARED}/sglang_loads_\S+", maps.read_text()))
    for path in _SHARED.glob(_PATTERN):
        if str(path) not in mapped:
            with contextlib.suppress(OSError):
                path.unlink()

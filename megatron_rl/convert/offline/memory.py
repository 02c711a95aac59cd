"""Setting of the allocator: freed memory stays with the process."""

from __future__ import annotations

import ctypes
from contextlib import suppress


def keep_freed_memory() -> None:
    """Ask the allocator (glibc) to reuse blocks of up to 64 MB instead of handing each back to the system.

    Temporary tensors of a MB come and go by the thousand; with fresh pages for each, zeroing them takes longer than all else.
    Measured: it helps most when called before torch is imported, as the commands do.
    """
    trim_threshold, mmap_threshold = -1, -3  # M_TRIM_THRESHOLD, M_MMAP_THRESHOLD
    with suppress(AttributeError):  # another allocator or system: slower, not wrong
        set_option = ctypes.CDLL(None).mallopt
        set_option(mmap_threshold, 2**26)
        set_option(trim_threshold, 2**26)

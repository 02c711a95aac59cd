"""The heap of the C library."""

from __future__ import annotations

import ctypes


def trim_heap() -> None:
    """Give the free pages of the heap back to the kernel; a C library other than glibc keeps them."""
    trim = getattr(ctypes.CDLL(None), "malloc_trim", None)
    if trim is not None:
        trim(0)

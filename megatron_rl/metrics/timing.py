"""Seconds and peak memory of the phases of a step."""

from __future__ import annotations

import contextlib
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from io import FileIO
from typing import Protocol

from megatron_rl.metrics.rows import Row


class MemoryMeter(Protocol):
    """Measures the peak of memory between two calls."""

    def peak_bytes(self) -> int:
        """Return the highest number of bytes since the last call."""


class ProcessMemory:
    """Peak bytes that torch allocated on the current device once it uses CUDA, else the peak of this process's resident size.

    Each reading resets the counter that it reads: torch's, or the kernel's ``VmHWM``. A kernel that has none, or lets nobody
    reset it, has the resident size sampled: memory that a phase frees before its end is then not seen.
    """

    def __init__(self) -> None:
        self._status: FileIO | None = None
        self._resident = resident_bytes()
        with contextlib.suppress(OSError):  # kept open: a border comes many times a step
            self._reset = open("/proc/self/clear_refs", "wb", buffering=0)  # noqa: SIM115
            self._reset.write(b"5")
            self._status = open("/proc/self/status", "rb", buffering=0)  # noqa: SIM115

    def peak_bytes(self) -> int:
        """Return the highest number of bytes since the last call."""
        import torch

        if torch.cuda.is_initialized():  # not is_available: a run on the CPU of a GPU machine has its data in memory
            peak = torch.cuda.max_memory_allocated()
            torch.cuda.reset_peak_memory_stats()
            return peak
        if self._status is None:
            before, self._resident = self._resident, resident_bytes()
            return max(before, self._resident)
        self._status.seek(0)
        _, found, rest = self._status.read(8192).partition(b"VmHWM:")
        assert found, "/proc/self/status has no VmHWM"
        self._reset.write(b"5")
        return 1024 * int(rest.split(maxsplit=1)[0])


def resident_bytes() -> int:
    """Return the resident size of this process now."""
    import psutil

    return psutil.Process().memory_info().rss


class PhaseTimer:
    """Seconds and peak memory of each phase of a step. A nested phase does not count into the one around it.

    The phases and ``other`` therefore add up to the step. Seconds are the host's: CUDA work still queued at the end of a phase
    is counted where the host waits for it, unless ``synchronize`` waits at every border (which costs overlap).
    Use it in one thread, and not across an ``await``: phases must end in the reverse order of their start.

    Args:
        memory: None takes ``ProcessMemory``.
        synchronize: called at every border, such as ``torch.cuda.synchronize``.
        on_border: called at every border with the innermost phase after it, "" for none.

    Example:
        ``with timer("update"): a(); with timer("optimizer"): b()`` gives the seconds of a to ``update``, of b to
        ``optimizer``.
    """

    def __init__(
        self,
        *,
        clock: Callable[[], float] = time.perf_counter,
        memory: MemoryMeter | None = None,
        synchronize: Callable[[], None] | None = None,
        on_border: Callable[[str], None] | None = None,
    ) -> None:
        self._clock = clock
        self._memory = memory or ProcessMemory()
        self._synchronize = synchronize
        self._on_border = on_border
        self._open: list[str] = []
        self._seconds: dict[str, float] = {}
        self._bytes: dict[str, int] = {}
        self._border_s = self._flushed_s = clock()

    @contextmanager
    def __call__(self, phase: str) -> Iterator[None]:
        """Time a phase; repeated phases add up, and their peak is the highest."""
        self._charge()
        self._open.append(phase)
        self._tell()
        try:
            yield
        except BaseException as error:
            error.add_note(f"in phase {phase}")  # by the time it is reported, no phase is open
            raise
        finally:
            self._charge()
            inner = self._open[-1]
            assert inner == phase, f"phase {phase!r} ended while {inner!r} was open: interleaved tasks share a timer"
            self._open.pop()
            self._tell()

    def flush(self, total_s: float | None = None) -> Row:
        """Return seconds and bytes since the last flush, and start anew; open phases go on.

        Args:
            total_s: length of the step in seconds; None takes the time since the last flush.

        Returns:
            ``time/<phase>_s``, ``memory/<phase>_bytes``, ``time/step_s`` and ``time/other_s`` = step minus phases.
        """
        self._charge()
        if total_s is None:
            total_s = self._border_s - self._flushed_s
        row: Row = {f"time/{phase}_s": seconds for phase, seconds in self._seconds.items()}
        row["time/other_s"] = max(0.0, total_s - sum(self._seconds.values()))
        row["time/step_s"] = total_s
        row |= {f"memory/{phase}_bytes": peak for phase, peak in self._bytes.items()}
        self._seconds, self._bytes, self._flushed_s = {}, {}, self._border_s
        return row

    def _tell(self) -> None:
        if self._on_border is not None:
            self._on_border(self._open[-1] if self._open else "")

    def _charge(self) -> None:
        """Charge the time since the last border to the innermost open phase."""
        if self._synchronize is not None:
            self._synchronize()
        now, peak = self._clock(), self._memory.peak_bytes()
        if self._open:
            phase = self._open[-1]
            self._seconds[phase] = self._seconds.get(phase, 0.0) + now - self._border_s
            self._bytes[phase] = max(self._bytes.get(phase, 0), peak)
        self._border_s = now

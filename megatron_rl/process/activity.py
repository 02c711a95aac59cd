"""The main thread's reported activity, which the watchdog of this and other ranks reads.

Every room may call ``beat``, ``note`` and ``phase``: this module imports nothing of the package, and a call costs next to
nothing.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from dataclasses import dataclass, field


@dataclass
class Activity:
    """The main thread's reported activity."""

    step: int = 0
    """The step under way, as ``metrics.jsonl`` counts; 0 before the first."""
    outer: list[str] = field(default_factory=list)
    inner: str = ""
    num_phases: int = 0
    """Number of phases entered. Ranks run the same program, so a smaller number means behind."""
    progress: int = 0
    """Grows with every sign of work."""
    note: str = ""

    @property
    def phase(self) -> str:
        """Open phases, outermost first, as ``outer/inner``."""
        names = [*self.outer, self.inner] if self.inner else self.outer
        return "/".join(names) or ("setup" if self.step == 0 else "")


_activity = Activity()


def beat() -> None:
    """Report progress, such as an answered request, from any thread. It costs next to nothing.

    Do not call it from a thread that goes on while the work stands still: a beat on a timer hides every hang.
    """
    _activity.progress += 1


def note(text: str) -> None:
    """Set the line that the message quotes for this rank, such as ``120 of 256, waiting for server 1``; "" clears it.

    A note is no progress: a line about one wait may change for ever.
    """
    _activity.note = text


def set_step(step: int) -> None:
    """Report the start of a training step, counted from 1."""
    _activity.step = step
    beat()


def enter(phase: str) -> None:
    """Report the innermost open phase of ``PhaseTimer``; "" for none."""
    _activity.inner = phase
    _activity.num_phases += bool(phase)
    beat()


@contextlib.contextmanager
def phase(name: str) -> Iterator[None]:
    """Name work outside the step's timer, such as a checkpoint; phases inside are shown as name/phase."""
    _activity.outer.append(name)
    _activity.num_phases += 1
    beat()
    try:
        yield
    except BaseException as error:
        error.add_note(f"in phase {name}")
        raise
    finally:
        _activity.outer.pop()
        beat()


def current() -> Activity:
    """Return what this process has reported so far."""
    return _activity


def forget() -> None:
    """Forget all that was reported."""
    global _activity
    _activity = Activity()

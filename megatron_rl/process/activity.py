"""What the main thread is at, as far as it has told: for the watchdog, which other threads and ranks read.

Every room may call ``beat``, ``note`` and ``phase``: this module imports nothing of the package, and a call costs nothing where
nobody watches.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from dataclasses import dataclass, field


@dataclass
class Activity:
    """What the main thread is at, as far as it has told."""

    step: int = 0
    """The one under way, as ``metrics.jsonl`` counts; 0 is before the first."""
    outer: list[str] = field(default_factory=list)
    inner: str = ""
    num_phases: int = 0
    """Phases entered. Ranks run the same program, so fewer means behind."""
    progress: int = 0
    """Grows with whatever is a sign of work."""
    note: str = ""

    @property
    def phase(self) -> str:
        """Open phases, outermost first, as ``outer/inner``."""
        names = [*self.outer, self.inner] if self.inner else self.outer
        return "/".join(names) or ("setup" if self.step == 0 else "")


_activity = Activity()


def beat() -> None:
    """Say that work goes on, such as a request answered. From any thread; costs nothing, with and without a watchdog.

    Not for a thread that would go on although the work stands still: a beat on a timer hides every hang.
    """
    _activity.progress += 1


def note(text: str) -> None:
    """Set the line that the message quotes for this rank, such as ``120 of 256, waiting for server 1``; "" clears it.

    It is not progress: a line about the same wait may change for ever.
    """
    _activity.note = text


def set_step(step: int) -> None:
    """A training step begins, counted from 1."""
    _activity.step = step
    beat()


def enter(phase: str) -> None:
    """The innermost open phase has changed; "" is none. For ``PhaseTimer``."""
    _activity.inner = phase
    _activity.num_phases += bool(phase)
    beat()


@contextlib.contextmanager
def phase(name: str) -> Iterator[None]:
    """Name what is no phase of a step and has no timer, such as a checkpoint; phases inside are shown as name/phase."""
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
    """What this process has told so far."""
    return _activity


def forget() -> None:
    """Begin anew: nothing has been told."""
    global _activity
    _activity = Activity()

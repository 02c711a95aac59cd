"""The message about a hang: the state of each rank, and who waits for whom."""

from __future__ import annotations

import contextlib
import functools
import itertools
import os
import sysconfig
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from types import FrameType

HANG = "hang: "
"""First line of the message."""
_PACKAGE = str(Path(__file__).parent.parent) + os.sep
_STORE = f"{_PACKAGE}process/signed_store.py"
_LIBRARIES = tuple(sysconfig.get_path(name) + os.sep for name in ("stdlib", "platstdlib", "purelib", "platlib"))
_COLLECTIVES = tuple(f"torch/distributed/{name}.py" for name in ("distributed_c10d", "c10d_logger", "rendezvous"))


@dataclass(frozen=True)
class RankState:
    """The state that one rank reports."""

    rank: int
    pid: int
    host: str
    parent: int
    """Process id of the launcher."""
    error_file: str
    """File in which the launcher looks for a message if this rank fails; "" without a launcher."""
    beat: int
    """Grows with every state written; it stands still if the process is frozen."""
    time: float
    """Unix time, for people who read the file."""
    step: int
    phase: str
    num_phases: int
    progress: int
    idle_s: float
    """Seconds since ``progress`` last grew."""
    collective: str
    """The collective that the main thread waits in; "" for none."""
    where: str
    """Innermost function outside libraries, as file:function."""
    note: str = ""
    has_ended: bool = False

    @property
    def name(self) -> str:
        """Return rank and process."""
        return f"rank {self.rank} (pid {self.pid} on {self.host})"

    @property
    def place(self) -> str:
        """Return phase and step."""
        if self.step == 0:
            return f"phase {self.phase}"
        return f"phase {self.phase} of step {self.step}" if self.phase else f"step {self.step}, between phases"


def locate(frame: FrameType | None) -> tuple[str, str]:
    """Find the collective and the place that a thread is in.

    Returns:
        Name of the collective that the innermost frames are in, or ""; and file:function of the innermost frame that is of
        this package, its shared helpers in ``parallel`` left out, or of a user's own file. A collective on a GPU has
        returned long before it is done, so its wait shows as the place that needs the result.
    """
    while frame is not None and frame.f_code.co_filename == _STORE:  # which a collective asks while ranks meet
        frame = frame.f_back
    collective, where = _collective(frame), ""
    while frame is not None:
        path = frame.f_code.co_filename
        short = path.removeprefix(_PACKAGE) if path.startswith(_PACKAGE) else os.path.basename(path)
        if _is_ours(path):
            where = f"{short}:{frame.f_code.co_name}"
            if not short.startswith("parallel/"):
                break
        frame = frame.f_back
    return collective, where


def _collective(frame: FrameType | None) -> str:
    names: list[str] = []
    innermost = frame
    while frame is not None and frame.f_code.co_filename.endswith(_COLLECTIVES):
        names.insert(0, frame.f_code.co_name)
        frame = frame.f_back
    for name in names:  # outermost first: all_gather_object and not the all_gather inside
        if not name.startswith("_") and name != "wrapper":
            return name
    if names:  # several at once, started by a context manager: whoever uses it has the better name
        while frame is not None and frame.f_code.co_filename == contextlib.__file__:
            frame = frame.f_back
        return frame.f_code.co_name if frame is not None else names[0]
    # A collective that was started without waiting is waited for in C++: the caller's line is all that can be seen.
    # Other waits (threads, processes) have a Python frame of their own. A frame that runs may have no line.
    if innermost is None or innermost.f_lineno is None:
        return ""
    return innermost.f_code.co_name if _is_wait(innermost.f_code.co_filename, innermost.f_lineno) else ""


@functools.lru_cache(maxsize=1024)
def _is_wait(path: str, number: int) -> bool:
    """Return whether a line of code waits. ``linecache`` would keep every file that a rank was ever seen in."""
    with contextlib.suppress(OSError), open(path, encoding="utf-8", errors="replace") as lines:
        return ".wait()" in next(itertools.islice(lines, number - 1, None), "")
    return False


def _is_ours(path: str) -> bool:
    return path.startswith(_PACKAGE) or not path.startswith((*_LIBRARIES, "<"))


def explain(states: Sequence[RankState | None], silent_s: Mapping[int, float], limit: str) -> str:
    """Compose the message about a hang: who is waited for, and who waits.

    Args:
        states: the last one of each rank; None for a rank that never wrote one.
        silent_s: ranks that stopped writing -> seconds since then.
        limit: the time limit that was passed, such as ``900 s``.
    """
    awake = [state for state in states if state is not None and not state.has_ended and state.rank not in silent_s]
    ended = [state for state in states if state is not None and state.has_ended and state.rank not in silent_s]
    busy = [state for state in awake if not state.collective]
    waiting = [state for state in awake if state.collective]
    if silent_s:
        culprits = list(silent_s)
        lines = [_describe_silent(rank, states[rank], seconds) for rank, seconds in sorted(silent_s.items())]
    elif busy and (waiting or ended):
        behind = _furthest_behind(busy)
        culprits = [state.rank for state in behind]
        lines = _group(behind, lambda state: f"is busy in {_at(state)}, not in a collective")
    elif ended:
        culprits = [state.rank for state in ended]
        lines = _group(ended, lambda _: "has ended its work")
    elif len(behind := _furthest_behind(awake)) < len(awake):
        culprits = [state.rank for state in behind]
        lines = _group(behind, lambda state: f"is the furthest behind: {_does(state)}")
    else:
        culprits = []
        places = {(state.collective, state.where) for state in awake}
        lines = ["the ranks wait in different collectives, each for the others"] if waiting and len(places) > 1 else []
    others = [state for state in awake if state.rank not in culprits]
    whom = " for it" if len(culprits) == 1 else " for them" if culprits else ""
    lines += _group(others, lambda state: _does(state, whom))
    lines += [f"rank {state.rank} noted: {state.note}" for state in states if state is not None and state.note]
    return "\n  ".join([f"{HANG}no progress for {limit}", *lines])


def _furthest_behind(states: Sequence[RankState]) -> list[RankState]:
    def position(state: RankState) -> tuple[int, int]:
        return state.step, state.num_phases

    first = min(map(position, states), default=None)
    return [state for state in states if position(state) == first]


def _describe_silent(rank: int, state: RankState | None, seconds: float) -> str:
    if state is None:
        return f"rank {rank} has given no sign of life since the start, {seconds:.0f} s ago"
    return f"{state.name} has given no sign of life for {seconds:.0f} s; it was last seen in {_at(state)}"


def _group(states: Iterable[RankState], describe: Callable[[RankState], str]) -> list[str]:
    """Put all ranks with the same description in one line."""
    groups: dict[str, list[RankState]] = {}
    for state in states:
        groups.setdefault(describe(state), []).append(state)
    return [
        f"{same[0].name} {text}" if len(same) == 1 else f"ranks {', '.join(str(s.rank) for s in same)}: each {text}"
        for text, same in groups.items()
    ]


def _does(state: RankState, whom: str = "") -> str:
    return f"waits{whom} in {state.collective}, {_at(state)}" if state.collective else f"is busy in {_at(state)}"


def _at(state: RankState) -> str:
    return f"{state.place}, at {state.where}" if state.where else state.place

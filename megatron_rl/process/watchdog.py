"""End a run that hangs, and say which rank waits in which phase for whom.

A thread of each rank writes the rank's state to ``<run>/logs/state/rank_N.json`` and reads states of others:

    main thread                thread of the watchdog, every 1/20 of the time limit, at most 5 s
    phases, bars, beat() --->  write own state; read the right neighbour's (rank 0: everybody's, once it is idle itself)
                               silent for the limit, or nobody moved for the limit?  first to notice: logs/hang.txt
                               logs/hang.txt is there?  stacks to logs/stacks_rank_N.txt, exit with status 4

Files and not a store over TCP, because a store lives in one process, and that process can be the one that is frozen. The
run's folder is on a file system that all nodes share; checkpoints need that too. The price: while the file system itself
hangs, so does the watchdog.

A rank that waits for one that works does not hang, however long the work takes: what counts is that *no* rank has moved.
So only one rank must look at all, and the reads grow with the number of ranks, not with its square. A rank that does not
even write its state (stopped, its machine gone, the interpreter's lock held for ever) is found by its left neighbour, also
if it is rank 0. Times are those that each process measures; clocks of different machines are never compared.
"""

from __future__ import annotations

import contextlib
import faulthandler
import json
import os
import signal
import socket
import sys
import threading
import time
from collections.abc import Iterable
from dataclasses import asdict
from pathlib import Path

from megatron_rl.process import activity
from megatron_rl.process.hang_report import RankState, explain, locate

EXIT_STATUS = 4
"""Exit status of a rank that the watchdog ends."""
SETUP_S = 60.0
"""Least limit before the first step: ranks import, read and build for a while without reporting progress."""
_watchdog: Watchdog | None = None


# ---------------------------------------------------------------------------------------------------- the thread


class Watchdog:
    """One rank's thread: writes its state, reads others', and ends the process if the run hangs."""

    def __init__(self, directory: Path, *, rank: int, world_size: int, timeout_s: float) -> None:
        """Start to watch.

        Args:
            directory: ``<run>/logs``, the same for all ranks.
            rank: this rank.
            world_size: number of ranks.
            timeout_s: limit in seconds; a hang ends the run at most a quarter later.
        """
        self.rank, self.world_size, self.timeout_s = rank, world_size, timeout_s
        self.interval_s = min(timeout_s / 20, 5.0)
        self._hang_file = directory / "hang.txt"
        self._state_dir = directory / "state"
        self._stacks_file = directory / f"stacks_rank_{rank}.txt"
        self._state_dir.mkdir(parents=True, exist_ok=True)
        # Halves: of a rank that was killed in the midst of writing.
        halves = (*self._state_dir.glob(f"rank_{rank}.json.*.tmp"), directory / f"hang.{rank}.tmp")
        for old in (self._hang_file, self._stacks_file, self._state_file(rank), *halves):
            old.unlink(missing_ok=True)
        self._host, self._parent = socket.gethostname(), os.getppid()
        self._error_file = os.environ.get("TORCHELASTIC_ERROR_FILE", "")
        self._num_written = 0
        self._ticked_s = time.monotonic()
        self._now_s = 0.0
        """A clock that stops while this process is stopped: after Ctrl-Z and fg no rank counts as idle or silent."""
        self._progress, self._moved_s = -1, 0.0
        self._states: dict[int, RankState] = {}
        self._heard_s: dict[int, float] = {}
        self._verdict = ""
        """This rank's own message, for when it is the first or the disk is full."""
        self._stopping = threading.Event()
        self._thread = threading.Thread(target=self._watch, name="watchdog", daemon=True)
        self._thread.start()

    @property
    def limit_s(self) -> float:
        """Return the current limit, in seconds."""
        return self.timeout_s if activity.current().step > 0 else max(self.timeout_s, SETUP_S)

    def stop(self) -> None:
        """Report that this rank's work is over, and stop watching."""
        self._stopping.set()
        self._thread.join()
        self._write_state(has_ended=True)

    def _watch(self) -> None:
        while not self._stopping.wait(self.interval_s):
            moment = time.monotonic()
            self._now_s += min(moment - self._ticked_s, 3 * self.interval_s)
            self._ticked_s = moment
            if self._progress != activity.current().progress:
                self._progress, self._moved_s = activity.current().progress, self._now_s
            self._write_state()
            self._listen(self._whom_to_watch())
            if self._is_hang():
                self._accuse()
            if self._verdict or self._hang_file.exists():
                self._leave()

    # ------------------------------------------------------------------------------------------------ states

    def _state_file(self, rank: int) -> Path:
        return self._state_dir / f"rank_{rank}.json"

    def _write_state(self, *, has_ended: bool = False) -> None:
        main_thread = threading.main_thread().ident
        assert main_thread is not None
        collective, where = locate(sys._current_frames().get(main_thread))
        self._num_written += 1
        state = RankState(
            rank=self.rank,
            pid=os.getpid(),
            host=self._host,
            parent=self._parent,
            error_file=self._error_file,
            beat=self._num_written,
            time=time.time(),
            step=activity.current().step,
            phase=activity.current().phase,
            num_phases=activity.current().num_phases,
            progress=activity.current().progress,
            idle_s=self._now_s - self._moved_s,
            collective=collective,
            where=where,
            note=activity.current().note,
            has_ended=has_ended,
        )
        self._states[self.rank], self._heard_s[self.rank] = state, self._now_s
        with contextlib.suppress(OSError):  # a full disk: the next one may succeed, and its own writer will complain
            _write_whole(self._state_file(self.rank), json.dumps(asdict(state)))

    def _whom_to_watch(self) -> Iterable[int]:
        """Return the right neighbour; or all ranks, once there is a doubt: early enough to know who is silent at the limit."""
        neighbour = (self.rank + 1) % self.world_size
        is_idle = self.rank == 0 and self._now_s - self._moved_s > self.limit_s / 2
        if is_idle or self._silent_s(neighbour) > self.limit_s / 2:
            return range(self.world_size)
        for rank in self._heard_s.keys() - {neighbour, self.rank}:  # states read by then are old at the next doubt
            del self._heard_s[rank]
        return [neighbour]

    def _listen(self, ranks: Iterable[int]) -> None:
        for rank in ranks:
            if rank == self.rank:
                continue
            state = _read_state(self._state_file(rank))
            if state is not None and state.has_ended and rank not in self._states:
                state = None  # left by an earlier run in this folder
            is_news = state is not None and (rank not in self._states or self._states[rank].beat != state.beat)
            if state is not None:
                self._states[rank] = state
            if is_news or rank not in self._heard_s or (state is not None and state.has_ended):
                self._heard_s[rank] = self._now_s

    def _silent_s(self, rank: int) -> float:
        return self._now_s - self._heard_s.get(rank, self._now_s)

    # ------------------------------------------------------------------------------------------------ the end

    def _is_hang(self) -> bool:
        """Return True if a rank was silent for the limit, or if none of the others made progress (rank 0 looks at all)."""
        if any(self._silent_s(rank) >= self.limit_s for rank in self._heard_s):
            return True
        if self._heard_s.keys() != set(range(self.world_size)):
            return False
        moving = (
            state.idle_s + self._silent_s(rank)
            for rank, state in self._states.items()
            if rank not in self._silent() and not state.has_ended
        )
        return min(moving) >= self.limit_s

    def _silent(self) -> dict[int, float]:
        """Return the ranks that missed five states in a row."""
        seconds = {rank: self._silent_s(rank) for rank in self._heard_s}
        return {rank: silent for rank, silent in seconds.items() if silent >= self.limit_s / 4}

    def _accuse(self) -> None:
        """Write the message, unless another rank was first."""
        states = [self._states.get(rank) for rank in range(self.world_size)]
        limit = f"{self.limit_s:g} s ({'trainer.hang_timeout_s' if activity.current().step else 'in setup'})"
        self._verdict = explain(states, self._silent(), limit)
        self._verdict += f"\n  stacks: {self._hang_file.parent}/stacks_rank_*.txt"
        own = self._hang_file.with_name(f"hang.{self.rank}.tmp")
        with contextlib.suppress(OSError):
            try:
                own.write_text(self._verdict + "\n")
                os.link(own, self._hang_file)  # unlike a rename it fails where the name is taken
            finally:
                own.unlink()

    def _leave(self) -> None:
        """End this process with the message."""
        text = self._verdict
        with contextlib.suppress(OSError):
            text = self._hang_file.read_text().rstrip()
        with contextlib.suppress(OSError), open(self._stacks_file, "w") as file:
            faulthandler.dump_traceback(file, all_threads=True)
        if self.rank > 0 or not self._error_file:  # the launcher prints it to the console, once
            os.write(2, f"error: {text}\n".encode())  # not sys.stderr: the main thread may hold its lock
        stopped = [state for state in map(self._read_sibling, range(self.world_size)) if state is not None]
        for error_file in {self._error_file, *(state.error_file for state in stopped)} - {""}:
            # Any rank may exit first, so every rank's error file carries the message.
            write_error_file(Path(error_file), text)
        time.sleep(2 * self.interval_s)  # the others need this long to see the file and write their stacks
        for state in stopped:
            # A stopped process ignores the launcher's SIGTERM, and the launcher would wait for half a minute.
            with contextlib.suppress(ProcessLookupError):
                os.kill(state.pid, signal.SIGKILL)
        os._exit(EXIT_STATUS)

    def _read_sibling(self, rank: int) -> RankState | None:
        """Find another rank of this launcher whose process is stopped (SIGSTOP), and return its state."""
        state = _read_state(self._state_file(rank))
        if state is None or rank == self.rank or (state.host, state.parent) != (self._host, self._parent):
            return None
        try:
            status, parent = Path(f"/proc/{state.pid}/stat").read_text().rpartition(")")[2].split()[:2]
        except OSError:
            return None
        return state if status in "tT" and int(parent) == self._parent else None


def _read_state(path: Path) -> RankState | None:
    try:
        return RankState(**json.loads(path.read_text()))
    except (OSError, ValueError, TypeError):  # not there yet; or half a file, or one of another version
        return None


def _write_whole(path: Path, text: str) -> None:
    # Not files.write_atomic: it syncs, which may take longer than the time between two states, and gives all writers one
    # temporary name, while several processes may write the same error file.
    partial = path.with_name(f"{path.name}.{os.getpid()}.tmp")
    try:
        partial.write_text(text)
        partial.replace(path)
    except OSError:
        with contextlib.suppress(OSError):
            partial.unlink()
        raise


# ---------------------------------------------------------------------------------------------------- for the runtime


def start(directory: Path, *, rank: int, world_size: int, timeout_s: float | None) -> None:
    """Start a ``Watchdog`` of this process, until ``stop``; none if ``timeout_s`` is None."""
    global _watchdog
    assert _watchdog is None, "this process is watched already"
    activity.forget()
    if timeout_s is not None:
        _watchdog = Watchdog(directory, rank=rank, world_size=world_size, timeout_s=timeout_s)


def stop() -> None:
    """Stop the watchdog, if there is one."""
    global _watchdog
    if _watchdog is not None:
        _watchdog.stop()
        _watchdog = None


def report_failure(error: BaseException, rank: int) -> None:
    """Tell the launcher, if there is one, why this rank ends."""
    path = os.environ.get("TORCHELASTIC_ERROR_FILE")
    if path:
        notes = [
            *getattr(error, "__notes__", []),
            *([f"step {activity.current().step}"] if activity.current().step else []),
        ]
        where = f" ({', '.join(notes)})" if notes else ""
        write_error_file(Path(path), f"rank {rank} failed{where}: {type(error).__name__}: {error}")


def write_error_file(path: Path, text: str) -> None:
    """Leave a message for the launcher in torchrun's format."""
    with contextlib.suppress(OSError):
        _write_whole(path, json.dumps({"message": text, "timestamp": time.time()}))

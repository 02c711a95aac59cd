"""Run a function on several ranks: import once, fork one process a rank, gloo over a file, results back to the caller.

A layout costs a fraction of a second here, where torchrun imports everything again in each rank. The price: the parent
must not have threads of its own (OMP_NUM_THREADS=1, see conftest.py) nor a process group.
"""

from __future__ import annotations

import ctypes
import faulthandler
import gc
import os
import pickle
import signal
import sys
import tempfile
import time
import traceback
from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass
from datetime import timedelta
from multiprocessing import forkserver
from pathlib import Path
from typing import Any, NoReturn, TypeVar

import torch
import torch.distributed as dist

Result = TypeVar("Result")

_PR_SET_PDEATHSIG = 1
_LEAVE = "leave"
"""The file that says that all ranks have their results."""
_SHOW_STACKS = signal.SIGUSR2
"""Sent to a rank that runs past the time limit."""
_NO_RESULT = object()
_POLL_S = 0.005
_GRACE_S = 1.0
"""How long the others may go on once a rank has failed: mostly they fail too, or wait for it for ever."""


@dataclass(frozen=True)
class _Failure:
    traceback: str
    time_s: float


def run_ranks(
    function: Callable[..., Result], world_size: int, *args: Any, timeout_s: float = 60.0, **kwargs: Any
) -> list[Result]:
    """Call ``function(*args, **kwargs)`` on ``world_size`` ranks, each a process in its own session, seeded with 0.

    Args:
        function: runs with the default process group (gloo) up; need not be picklable, its result must be.
        world_size: number of ranks.
        timeout_s: for all ranks together, and for each of their collectives.

    Returns:
        What each rank returned, in rank order.

    Raises:
        AssertionError: a rank raised or died (its traceback, that of the first if there are several), or ran past the
            time limit. No process of any rank, nor a child of one, is left in any case.
    """
    assert not dist.is_initialized(), "the parent of forked ranks must not have a process group"
    sys.stdout.flush()
    sys.stderr.flush()
    with tempfile.TemporaryDirectory(prefix="ranks_") as name:
        directory = Path(name)
        pids: list[int] = []
        try:
            for rank in range(world_size):
                pid = os.fork()
                if pid == 0:
                    _run_rank(function, args, kwargs, rank, world_size, directory, timeout_s)
                pids.append(pid)
            exit_codes = _wait(pids, directory, timeout_s)
            stacks = _stacks(pids, exit_codes, directory)
        finally:
            _kill(pids)
        outcomes = [_read(directory, rank) for rank in range(world_size)]
    _raise_failures(outcomes, exit_codes, timeout_s, stacks)
    return outcomes  # type: ignore[return-value]


def run_child(action: Callable[[], object]) -> int:
    """Exit status of a forked process that calls ``action``: 0 where nothing ends it, 1 where it raises, negative for a signal.

    No process group, unlike :func:`run_ranks`: for what may be killed, or must not change the parent.
    """
    pid = os.fork()
    if pid == 0:
        _begin_child()
        try:
            action()
            os._exit(0)
        except BaseException:
            traceback.print_exc()
            sys.stderr.flush()
            os._exit(1)
    return os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1])


def _begin_child() -> None:
    # What the parent left to its garbage collector stays: some of it (tokenizers) waits, when it is dropped, for threads that
    # only the parent has.
    gc.freeze()
    # After a fork torch makes its thread pool anew, at its first use. Two threads that come to it first at the same time break
    # it ("Invalid thread pool"), so it is made here.
    torch.set_num_threads(1)


def _run_rank(
    function: Callable[..., Any],
    args: tuple[Any, ...],
    kwargs: dict[str, Any],
    rank: int,
    world_size: int,
    directory: Path,
    timeout_s: float,
) -> NoReturn:
    """The life of one rank. Leaves by ``os._exit``: what the parent registered to run at exit is not ours to run."""
    code = 1
    _begin_child()
    try:
        os.setsid()  # so that its children can be ended with it
        ctypes.CDLL(None).prctl(_PR_SET_PDEATHSIG, signal.SIGKILL)  # and itself with its parent
        stacks = (directory / f"stacks_{rank}").open("w")
        faulthandler.register(_SHOW_STACKS, stacks)
        # A fork server that an earlier test has started is the parent's child, which we cannot wait for.
        forkserver._forkserver.__init__()  # type: ignore[misc]
        outcome: Any
        try:
            os.environ.update(RANK=str(rank), WORLD_SIZE=str(world_size), LOCAL_RANK=str(rank))
            torch.manual_seed(0)
            store = dist.FileStore(str(directory / "store"), world_size)
            timeout = timedelta(seconds=timeout_s)
            dist.init_process_group("gloo", store=store, rank=rank, world_size=world_size, timeout=timeout)
            store.add("num_connected", 1)
            while store.add("num_connected", 0) < world_size:  # a rank may end as soon as it starts: see below
                time.sleep(_POLL_S)
            outcome = function(*args, **kwargs)
            data = pickle.dumps(outcome)
            code = 0
        except BaseException:  # also SystemExit and pytest's outcomes: a rank reports whatever ends it
            data = pickle.dumps(_Failure(traceback.format_exc(), time.monotonic()))
        partial = directory / f"rank_{rank}.part"
        partial.write_bytes(data)
        partial.rename(directory / f"rank_{rank}")
        sys.stdout.flush()
        sys.stderr.flush()
        # Who is done stays: gloo takes a closed connection for a failure of whatever the others are still doing.
        while code == 0 and not (directory / _LEAVE).exists():
            time.sleep(_POLL_S)
    finally:
        os._exit(code)


def _wait(pids: list[int], directory: Path, timeout_s: float) -> dict[int, int]:
    """Exit codes (negative: signal) of the ranks that ended in time, or within the grace after the first failure."""
    deadline = time.monotonic() + timeout_s
    exit_codes: dict[int, int] = {}
    while len(exit_codes) < len(pids) and time.monotonic() < deadline:
        if all((directory / f"rank_{rank}").exists() for rank in range(len(pids))):
            (directory / _LEAVE).touch()
        for rank, pid in enumerate(pids):
            if rank not in exit_codes and os.waitid(os.P_PID, pid, os.WEXITED | os.WNOHANG | os.WNOWAIT) is not None:
                _kill_session(pid)  # before the rank is reaped, while its number cannot be anybody else's
                exit_codes[rank] = os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1])
                if exit_codes[rank] != 0:
                    deadline = min(deadline, time.monotonic() + _GRACE_S)
        time.sleep(_POLL_S)
    return exit_codes


def _stacks(pids: list[int], exit_codes: dict[int, int], directory: Path) -> str:
    """Return the stacks of the ranks that have no result; "" where all have ended."""
    late = [rank for rank in range(len(pids)) if rank not in exit_codes and not (directory / f"rank_{rank}").exists()]
    for rank in late:
        os.kill(pids[rank], _SHOW_STACKS)
    if late:
        time.sleep(_GRACE_S)
    files = {rank: directory / f"stacks_{rank}" for rank in late}
    return "\n".join(f"rank {rank}:\n{file.read_text()}" for rank, file in files.items() if file.exists())


def _kill(pids: list[int]) -> None:
    """End the ranks that have not been reaped, and their children."""
    for pid in pids:
        with suppress(ChildProcessError):
            os.waitid(os.P_PID, pid, os.WEXITED | os.WNOHANG | os.WNOWAIT)  # raises once it is reaped
            _kill_session(pid)
            with suppress(ProcessLookupError):
                os.kill(pid, signal.SIGKILL)  # it may not have come as far as its own session
            os.waitpid(pid, 0)


def _kill_session(pid: int) -> None:
    with suppress(ProcessLookupError, PermissionError):
        os.killpg(pid, signal.SIGKILL)


def _read(directory: Path, rank: int) -> Any:
    path = directory / f"rank_{rank}"
    return pickle.loads(path.read_bytes()) if path.exists() else _NO_RESULT


def _raise_failures(outcomes: list[Any], exit_codes: dict[int, int], timeout_s: float, stacks: str) -> None:
    world_size = len(outcomes)
    failures = {rank: outcome for rank, outcome in enumerate(outcomes) if isinstance(outcome, _Failure)}
    if failures:
        first = min(failures, key=lambda rank: failures[rank].time_s)
        lines = [f"rank {first} of {world_size} failed", failures.pop(first).traceback]
        lines += [f"rank {rank}: {failure.traceback.strip().splitlines()[-1]}" for rank, failure in failures.items()]
        raise AssertionError("\n".join(lines))
    died = {rank: code for rank, code in exit_codes.items() if code != 0}
    if died:
        how = ", ".join(f"rank {rank} by {_name_of_exit(code)}" for rank, code in died.items())
        raise AssertionError(f"died without a result, of {world_size} ranks: {how}")
    running = [rank for rank, outcome in enumerate(outcomes) if outcome is _NO_RESULT]
    if running:
        raise AssertionError(
            f"ranks {running} of {world_size} were still running after {timeout_s:g} s, here:\n{stacks}"
        )


def _name_of_exit(code: int) -> str:
    return f"signal {signal.Signals(-code).name}" if code < 0 else f"exit code {code}"

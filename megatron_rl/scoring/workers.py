"""Scores in worker processes that can be killed: a response that never finishes costs its deadline, not the run.

    score(jobs) -> chunks -> pebble -> worker: task.score or data.reward, job by job, for a part of the deadline
         ^                     |          |
         |                     |          +-- out of time: scores so far; the rest of the chunk is sent again
         +---------------------+------------- stuck or dead: its jobs are sent again one by one, each with the whole
                                              deadline, so that a failure has exactly one culprit

Sending one job takes as long as scoring a hundred cheap ones, hence chunks.

Ties of life: the trainer holds a pipe to each worker (multiprocessing's parent sentinel). However the trainer dies, the
kernel closes that pipe and kills the worker; the fork server, which lives as long as its children, then ends as well.
"""

from __future__ import annotations

import contextlib
import fcntl
import importlib
import io
import json
import math
import multiprocessing
import multiprocessing.spawn
import os
import select
import signal
import sys
import threading
import time
from collections.abc import Iterable, Mapping, Sequence
from concurrent.futures import FIRST_COMPLETED, wait
from concurrent.futures.process import BrokenProcessPool
from dataclasses import dataclass, replace
from multiprocessing.context import ForkServerContext, ForkServerProcess
from pathlib import Path
from types import TracebackType
from typing import Any, TextIO, cast

from pebble import ProcessExpired, ProcessFuture, ProcessPool

from megatron_rl.errors import UserError
from megatron_rl.scoring.reward import crash, failure, get_verifier, judge
from megatron_rl.tasks import get_task
from megatron_rl.tasks.reward import Attempt, Verifier
from megatron_rl.types import Score

CHUNKS_PER_WORKER = 4
"""More even out unequal jobs, fewer cost less traffic."""
MAX_CHUNK_JOBS = 256
MAX_ATTEMPTS = 3
"""A chunk is sent this often at most when pools break and nothing says which job did it."""
DYING_S = 1.0
"""Seconds until a fork server that was killed is gone, and a new one is started in its place."""
STALL_S = 60.0
"""A pool that gives no sign for this long beyond a job's deadline is replaced; its first workers start within this time."""
MAX_PRINTED_LINES = 20
"""Lines that a worker's code may print over its life; the rest is left out."""
RESTALL_S = 15.0
"""The same for later workers, whose fork server has imported everything already."""


@dataclass(frozen=True)
class _JobChunk:
    """Jobs that travel together."""

    indices: tuple[int, ...]
    """Positions in the caller's list."""
    attempt: int = 1
    is_single: bool = False
    """One job with the whole deadline to itself: if it fails, this job is to blame."""

    def singles(self) -> list[_JobChunk]:
        """Return a chunk for each job, with the whole deadline to itself."""
        return [_JobChunk((index,), is_single=True) for index in self.indices]


@dataclass(frozen=True)
class _How:
    """The way to judge: a reward or the task's score, its arguments, and the time it may take."""

    reward: str | None
    kwargs: str
    """JSON."""
    timeout_s: float

    def verifier(self, task_name: str) -> Verifier:
        return get_verifier(task_name, self.reward, self.kwargs)

    def judges_together(self, task_names: Sequence[str]) -> bool:
        """Tell whether several responses are judged at once."""
        return any(self.verifier(name).judges_together for name in task_names)


class ScoringPool:
    """The worker processes that score responses to problems of one task or several. For one thread at a time."""

    def __init__(
        self,
        task_names: Sequence[str],
        *,
        num_workers: int,
        timeout_s: float,
        reward: str | None = None,
        reward_kwargs: Mapping[str, Any] | None = None,
    ) -> None:
        """Start the workers; they are ready by the time the trainer has loaded its model.

        Args:
            task_names: names that ``megatron_rl.tasks.get_task`` knows; ``Problem.task`` is one of them.
            num_workers: processes.
            timeout_s: deadline of one score in seconds, kept to about 0.2 s by killing the worker. A job that meets it
                costs up to 1.25 times as long: once with the others of its chunk, once alone.
            reward: ``package.module:FUNCTION`` that judges in place of the tasks' ``score``.
            reward_kwargs: further arguments of either.

        Raises:
            UserError: no such task or reward, or a number is not positive.
        """
        for name, value in (("data.num_scoring_workers", num_workers), ("data.scoring_timeout_s", timeout_s)):
            if not value > 0:
                raise UserError(name, value, "must be above 0", "give a positive number")
        _hide_main()
        self._context = _WorkerContext()
        how = _How(reward, json.dumps(reward_kwargs or {}), timeout_s)
        for name in task_names:  # what is wrong with them is an error here, where the user reads it
            how.verifier(name)
        self._task_names, self._how = tuple(task_names), how
        self._preload = tuple(dict.fromkeys(module for name in task_names for module in get_task(name).preload))
        self._context.set_forkserver_preload(["megatron_rl.tasks", __name__, *self._preload])
        self._num_workers, self._timeout_s = num_workers, timeout_s
        self._has_answered = False
        self._pool: ProcessPool | None = self._start()

    def score(self, jobs: Sequence[Attempt]) -> list[Score]:
        """Judge each response to its problem. A problem that recurs within a chunk travels once.

        Returns:
            One score per job, in order. A job beyond the deadline has reason ``timeout``; one that raises or brings its
            worker down has ``crash: ...`` (or ``timeout``, after the deadline, where it does so in the first instant and
            pebble misses whose job it was). Both have ``is_failure``, reward 0, and touch no other job.

        Raises:
            RuntimeError: the workers cannot be started at all, or the pool is closed.
            ValueError: a problem is of a task that the pool was not started for.
        """
        foreign = {attempt.problem.task for attempt in jobs} - set(self._task_names)
        if foreign:
            raise ValueError(f"problems of {sorted(foreign)} in a pool for {list(self._task_names)}")
        scores: dict[int, Score] = {}
        todo = _split(len(jobs), self._num_workers)
        running: dict[Any, _JobChunk] = {}  # pebble's futures; ``wait`` knows only their base class
        while todo or running:
            try:
                while todo:
                    running[self._send(todo[-1], jobs)] = todo[-1]
                    todo.pop()
            except BrokenProcessPool:
                todo = self._replace_pool([*todo, *running.values()], scores)
                running = {}
                continue
            stall_s = RESTALL_S if self._has_answered else STALL_S
            finished, _ = wait(running, timeout=self._timeout_s + stall_s, return_when=FIRST_COMPLETED)
            broken = [] if finished else list(running)
            for future in cast("set[ProcessFuture]", finished):
                if isinstance(future.exception(), BrokenProcessPool):
                    broken.append(future)
                else:
                    todo += self._take(future, running.pop(future), scores)
            if broken:
                todo = self._replace_pool([*todo, *running.values()], scores)
                running = {}
        return [scores[index] for index in range(len(jobs))]

    def close(self) -> None:
        """Kill the workers; jobs under way are lost. Harmless when repeated."""
        pool, self._pool = self._pool, None
        if pool is not None:
            pool.stop()
            pool.join()

    def __enter__(self) -> ScoringPool:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        self.close()

    def _start(self) -> ProcessPool:
        for _ in range(MAX_ATTEMPTS):
            pool = ProcessPool(
                max_workers=self._num_workers,
                initializer=_prepare_worker,
                initargs=(self._preload, self._task_names, self._how),
                context=self._context,
            )
            try:
                pool.schedule(_score_chunk, args=(self._how, [], 0.0))  # pebble starts workers at the first task
                return pool
            except RuntimeError:  # somebody has killed the fork server in that instant
                pool.stop()
                pool.join()
                time.sleep(DYING_S)
        raise self._no_start()

    def _no_start(self) -> RuntimeError:
        return RuntimeError(
            f"scoring workers for {', '.join(self._task_names)} do not start: {MAX_ATTEMPTS} pools broke before the first "
            "score. What the workers wrote to stderr says why"
        )

    def _send(self, chunk: _JobChunk, jobs: Sequence[Attempt]) -> ProcessFuture:
        if self._pool is None:
            raise RuntimeError("the scoring pool is closed")
        # A chunk may take a part of the deadline and should use half of that: little is lost when one of its jobs is
        # stuck, and a job that is only slow gets the whole deadline afterwards.
        limit_s = self._timeout_s if chunk.is_single else max(0.2, self._timeout_s / 4)
        if self._how.judges_together(
            self._task_names
        ):  # many at once: they have one deadline, which async ones keep by themselves
            limit_s = self._timeout_s + max(1.0, self._timeout_s / 4)
        args = (self._how, [jobs[index] for index in chunk.indices], limit_s / 2)
        try:
            return self._pool.schedule(_score_chunk, args=args, timeout=limit_s)
        except RuntimeError as error:  # how pebble reports a pool that broke since the last call
            raise BrokenProcessPool from error

    def _take(self, future: ProcessFuture, chunk: _JobChunk, scores: dict[int, Score]) -> list[_JobChunk]:
        """Store the scores of a finished chunk; return what is still to do for it."""
        error = future.exception()
        if error is None:
            self._has_answered = True
            done = future.result()
            scores.update(zip(chunk.indices, done))
            rest = chunk.indices[len(done) :]
            return [_JobChunk(rest)] if rest else []
        if not chunk.is_single:
            return chunk.singles()
        scores[chunk.indices[0]] = failure(_reason(error))
        return []

    def _replace_pool(self, chunks: Iterable[_JobChunk], scores: dict[int, Score]) -> list[_JobChunk]:
        """Start a new pool after the old one broke; return the chunks to send again, each at most MAX_ATTEMPTS times."""
        self.close()
        todo: list[_JobChunk] = []
        for chunk in chunks:
            if chunk.attempt < MAX_ATTEMPTS:
                todo.append(replace(chunk, attempt=chunk.attempt + 1))
            elif not self._has_answered:
                raise self._no_start()
            elif chunk.is_single:
                scores[chunk.indices[0]] = failure("crash: the scoring pool broke")
            else:
                todo += chunk.singles()
        self._pool = self._start()
        return todo


def _split(num_jobs: int, num_workers: int) -> list[_JobChunk]:
    size = min(MAX_CHUNK_JOBS, math.ceil(num_jobs / (num_workers * CHUNKS_PER_WORKER)))
    return [_JobChunk(tuple(range(i, min(i + size, num_jobs)))) for i in range(0, num_jobs, max(size, 1))]


def _reason(error: BaseException) -> str:
    if isinstance(error, ProcessExpired):
        code = error.exitcode
        names = {known.value: known.name for known in signal.Signals}  # real-time signals have none
        how = f"was killed by {names.get(-code, f'signal {-code}')}" if code < 0 else f"exited with status {code}"
        return f"crash: the worker {how}"
    if isinstance(error, TimeoutError):
        return "timeout"
    return crash(error)


# In the workers


def _score_chunk(how: _How, attempts: Sequence[Attempt], budget_s: float) -> list[Score]:
    """Score the first attempts, at least one of them, until ``budget_s`` is used up; those that go together, at once."""
    start = time.monotonic()
    scores: list[Score] = []
    while len(scores) < len(attempts) and (not scores or time.monotonic() - start <= budget_s):
        first = len(scores)
        task = attempts[first].problem.task
        verifier = how.verifier(task)
        end = first + 1
        while verifier.judges_together and end < len(attempts) and attempts[end].problem.task == task:
            end += 1
        try:
            scores += judge(verifier, attempts[first:end], how.timeout_s)
        except BaseException as error:  # SystemExit too: the pool must not lose the rest of the chunk to it
            if end - first > 1:  # one of them is to blame
                raise
            scores.append(failure(crash(error)))
    return scores


def _prepare_worker(preload: Sequence[str], task_names: Sequence[str], how: _How) -> None:
    """Make a new worker ready, before its first deadline starts to count."""
    _die_with_trainer()
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C reaches the whole process group; the trainer decides
    # pebble asks with SIGTERM and installs a Python handler, which waits for C code to look for signals; some never does
    # (``sum(range(10**12))``). The kill would take 3 s, with the locks of all workers held.
    signal.signal(signal.SIGTERM, signal.SIG_DFL)
    with contextlib.suppress(OSError):  # when memory runs out, the kernel takes a worker, not the trainer
        Path("/proc/self/oom_score_adj").write_text("1000")
    sys.stdout = _Muffled(sys.stderr)
    for name in preload:  # already there, unless somebody else had started the process's only fork server
        importlib.import_module(name)
    for name in task_names:  # the user's modules may be slow to import
        how.verifier(name)


class _Muffled(io.TextIOBase):
    """Standard output of a worker: the first lines go to standard error, with a word of where they come from.

    A reward that prints would otherwise bury what the run says.
    """

    def __init__(self, target: TextIO) -> None:
        self._target, self._left, self._line = target, MAX_PRINTED_LINES, ""

    def write(self, text: str) -> int:
        *lines, self._line = (self._line + text).split("\n")
        self._line = self._line[-1000:]
        for line in lines[: self._left]:
            self._target.write(f"[a scoring worker prints] {line[:1000]}\n")
        if lines and self._left and len(lines) >= self._left:
            self._target.write("[a scoring worker prints] ... and more, which is left out\n")
        self._left = max(0, self._left - len(lines))
        return len(text)


def _die_with_trainer() -> None:
    """Ask the kernel for SIGKILL when the trainer's end of the parent sentinel closes.

    PR_SET_PDEATHSIG is no help here: the parent is the fork server, which waits for its children to end. A thread that
    watches the pipe is none either: it does not run while a power of big integers holds the GIL.
    """
    trainer = multiprocessing.parent_process()
    assert trainer is not None
    pipe = trainer.sentinel
    fcntl.fcntl(pipe, fcntl.F_SETOWN, os.getpid())
    fcntl.fcntl(pipe, fcntl.F_SETSIG, signal.SIGKILL)
    fcntl.fcntl(pipe, fcntl.F_SETFL, fcntl.fcntl(pipe, fcntl.F_GETFL) | os.O_ASYNC)
    if select.select([pipe], [], [], 0)[0]:  # it closed before the request: no signal will come
        os._exit(1)


# Workers that do not run the trainer's script

_is_scoring_worker = threading.local()


class _WorkerProcess(ForkServerProcess):
    @staticmethod
    def _Popen(process: Any) -> Any:
        _is_scoring_worker.value = True
        try:
            return ForkServerProcess._Popen(process)
        finally:
            _is_scoring_worker.value = False


class _WorkerContext(ForkServerContext):
    Process = _WorkerProcess


def _hide_main() -> None:
    """Keep multiprocessing from importing the caller's ``__main__`` in scoring workers (and in no other process).

    Without this, each worker runs the top level of the training script: at best it imports torch (2 s and 200 MB a
    worker), at worst, without an ``if __name__ == "__main__"``, it starts another training run. Workers need nothing
    from there. Upstream: ``multiprocessing.spawn.get_preparation_data``, which has no argument for it (Python 3.11 to
    3.14). Remove when it gets one.
    """
    original = multiprocessing.spawn.get_preparation_data
    if original.__module__ == __name__:
        return

    def get_preparation_data(name: str) -> dict[str, Any]:
        data = original(name)
        if getattr(_is_scoring_worker, "value", False):
            data.pop("init_main_from_name", None)
            data.pop("init_main_from_path", None)
        return data

    multiprocessing.spawn.get_preparation_data = get_preparation_data

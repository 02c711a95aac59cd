"""Scores in worker processes that can be killed: a response that never finishes costs its deadline, not the run.

    score(jobs) -> chunks -> pebble -> worker: task.score for each job, at most a fraction of the deadline in one go
                      ^                   |
                      |                   +-- scores of the first jobs of the chunk; the rest is sent again
                      +-- killed or dead: its jobs are sent again one by one, each with the whole deadline to itself

Sending one job takes as long as hundreds of cheap scores, hence chunks. A job that fails on its own is the culprit and
becomes a failed Score with a reason. Ties of life: the trainer holds a pipe to each worker (multiprocessing's parent
sentinel). When the trainer dies, however it dies, the kernel closes the pipe and kills the worker; when the last worker
is gone, the fork server ends by itself.
"""

from __future__ import annotations

import fcntl
import multiprocessing
import multiprocessing.spawn
import os
import select
import signal
import threading
import time
from collections.abc import Callable, Sequence
from concurrent.futures import FIRST_COMPLETED, CancelledError, TimeoutError, wait
from concurrent.futures.process import BrokenProcessPool
from dataclasses import dataclass
from multiprocessing.context import ForkServerContext, ForkServerProcess
from types import TracebackType
from typing import Any

from pebble import ProcessExpired, ProcessPool

from megatron_rl.errors import UserError
from megatron_rl.types import Score

CHUNKS_PER_WORKER = 4
"""More even out unequal jobs, fewer cost less traffic."""
MAX_CHUNK_JOBS = 256
MAX_ATTEMPTS = 3
"""Tries of a job whose pool broke without telling which job did it."""
STALL_S = 60.0
"""Beyond its deadlines, so long may a pool give no sign (workers start in this time as well) before it is replaced."""


@dataclass(frozen=True)
class _Chunk:
    """Jobs that travel together."""

    indices: tuple[int, ...]
    """Positions in the caller's list."""
    attempt: int = 1
    is_single: bool = False
    """One job with the whole deadline: if it fails, this job is to blame."""


class ScoringPool:
    """Scores (answer, response) pairs with a task's ``score``. Not for use from two threads at once."""

    def __init__(self, task_name: str, *, num_workers: int, timeout_s: float) -> None:
        """Start the workers in the background.

        Args:
            task_name: a name that ``megatron_rl.tasks.get_task`` knows.
            num_workers: processes.
            timeout_s: deadline of one score, in seconds, enforced to about 0.2 s by killing the worker.

        Raises:
            UserError: no such task, or a number is not positive.
        """
        # Inside the function: tasks import rewards, and only this class looks the other way.
        from megatron_rl.tasks import get_task

        for name, value in (("data.num_scoring_workers", num_workers), ("data.scoring_timeout_s", timeout_s)):
            if not value > 0:
                raise UserError(name, value, "must be above 0", "give a positive number")
        self._task_name, self._num_workers, self._timeout_s = task_name, num_workers, timeout_s
        self._context = _context(["pebble", "megatron_rl.tasks", __name__, *get_task(task_name).preload])
        self._has_answered = False
        self._pool: ProcessPool | None = self._start()

    def score(self, jobs: Sequence[tuple[str, str]]) -> list[Score]:
        """Judge each (answer, response) pair.

        Returns:
            One score per job, in order. A job that outlives the deadline has reason ``timeout``, one that kills its worker
            or raises has ``crash: ...``; both have ``is_failure`` and touch no other job.

        Raises:
            RuntimeError: workers cannot be started at all, or the pool is closed.
        """
        if self._pool is None:
            raise RuntimeError("the scoring pool is closed")
        scores: list[Score | None] = [None] * len(jobs)
        todo = [_Chunk(indices) for indices in _split(range(len(jobs)), self._num_workers)]
        running: dict[Any, _Chunk] = {}
        while todo or running:
            try:
                for chunk in todo:
                    running[self._send(chunk, jobs)] = chunk
                todo = []
                finished, _ = wait(running, timeout=self._timeout_s + STALL_S, return_when=FIRST_COMPLETED)
                is_broken = not finished
            except RuntimeError:  # pebble found the pool broken, for example by a worker that died idle
                finished, is_broken = set(), True
            for future in finished:
                chunk, error = running.pop(future), _exception(future)
                if error is None:
                    self._has_answered = True
                    done = future.result()
                    for index, score in zip(chunk.indices, done):
                        scores[index] = score
                    rest = chunk.indices[len(done) :]
                    todo += [_Chunk(rest)] if rest else []
                elif isinstance(error, BrokenProcessPool):
                    running[future], is_broken = chunk, True  # back, to be treated below with all the others
                elif chunk.is_single:
                    scores[chunk.indices[0]] = _failure(_reason(error))
                else:
                    todo += [_Chunk((index,), chunk.attempt, is_single=True) for index in chunk.indices]
            if is_broken:
                todo = self._replace(scores, {*todo, *running.values()})
                running = {}
        return [score if score is not None else _failure("crash: lost") for score in scores]

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
        pool = ProcessPool(max_workers=self._num_workers, initializer=_prepare_worker, context=self._context)
        pool.schedule(_score_chunk, args=(self._task_name, [], 0.0))  # workers start now, while the trainer loads its model
        return pool

    def _send(self, chunk: _Chunk, jobs: Sequence[tuple[str, str]]) -> Any:
        # A chunk gets a part of the deadline, of which it should use half: losing it costs little, and a job that needs
        # longer gets the whole deadline on its own afterwards.
        limit_s = self._timeout_s if chunk.is_single else max(0.2, self._timeout_s / 4)
        budget_s = limit_s / 2
        return self._pool.schedule(
            _score_chunk, args=(self._task_name, [jobs[i] for i in chunk.indices], budget_s), timeout=limit_s
        )

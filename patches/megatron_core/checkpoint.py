"""Write checkpoints in the process that asks for it.

Why: even a synchronous save forks one writer process per file from a process with threads and open sockets, and
    starts a queue server by spawn, which imports the main module again and outlives a rank that dies. A writer that is
    killed leaves its rank waiting for ever. On a host there is nothing to gain from all this.
Upstream: ``FileSystemWriterAsync.write_preloaded_data_multiproc`` and ``_get_write_results_queue`` in
    megatron/core/dist_checkpointing/strategies/filesystem_async.py (from 0.17 on writers are threads, and the queue is
    called ``get_write_results_queue``)
Versions: 0.16.1 - 0.19.2 (tested on 0.16.1 and 0.19.2)
Remove when: a synchronous save needs neither a process nor a queue server.
Tested by: tests/unit/patches/test_patch_checkpoint.py

Saves with ``async_sharded_save=True`` are not for this: their writer is another process, and its results would not
arrive ("results_queue should not be empty", raised on all ranks).
"""

from __future__ import annotations

import functools
import queue
from collections.abc import Callable
from typing import Any

from .upstream import replace

_results: queue.Queue[Any] = queue.Queue()


def apply() -> None:
    """Replace the writer and its queue."""
    from megatron.core.dist_checkpointing.strategies import filesystem_async

    writer = filesystem_async.FileSystemWriterAsync
    if "write_preloaded_data_multithread" in vars(writer):  # from 0.17 on: no processes, but still a queue server
        replace(filesystem_async, "get_write_results_queue", _plain_queue_of)
        return
    replace(filesystem_async, "_get_write_results_queue", _plain_queue_of)
    replace(writer, "write_preloaded_data_multiproc", _in_process_of)


def _plain_queue_of(original: Callable[..., Any]) -> Callable[..., Any]:
    @functools.wraps(original)
    def get_queue(*_args: object) -> queue.Queue[Any]:
        while not _results.empty():  # of a save that failed before anybody read them
            _results.get_nowait()
        return _results

    return get_queue


def _in_process_of(original: Callable[..., None]) -> Callable[..., None]:
    from megatron.core.dist_checkpointing.strategies.filesystem_async import FileSystemWriterAsync

    @functools.wraps(original)
    def write(
        transform_list: list[Any], use_msc: bool, rank: int, write_buckets: list[Any], results_queue: queue.Queue[Any]
    ) -> None:
        """Write one file after the other; an exception becomes the result, and the caller tells the other ranks."""
        results: dict[int, Any] = {}
        error: Exception | None = None
        for index, bucket in enumerate(write_buckets):
            done: queue.Queue[Any] = queue.Queue()
            pending: queue.Queue[int] = queue.Queue()
            pending.put(index)  # the writer takes it out again when it has finished
            FileSystemWriterAsync.write_preloaded_data(
                transform_list,
                local_proc_idx=index,
                write_bucket=bucket,
                results_queue=done,
                count_queue=pending,
                use_fsync=True,
                use_msc=use_msc,
            )
            _, outcome = done.get_nowait()
            if isinstance(outcome, Exception):
                error = outcome
                break
            results[index] = outcome
        results_queue.put(error or results)

    return write

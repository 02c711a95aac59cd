"""Write checkpoints in the process that asks for it.

Why: even a synchronous save forks one writer process per file from a process with threads and open sockets, and
    starts a queue server by spawn, which imports the main module again and outlives a rank that dies. A writer that is
    killed leaves its rank waiting for ever. From 0.17 on writers are threads, but the queue server is still there, and
    the garbage collector of the whole process stands still for as long as they write. Nor does either report progress.
Upstream: ``FileSystemWriterAsync.write_preloaded_data_multiproc`` and ``_get_write_results_queue`` in
    megatron/core/dist_checkpointing/strategies/filesystem_async.py (from 0.17 on
    ``write_preloaded_data_multithread`` and ``get_write_results_queue``)
Versions: 0.16.1 - 0.19.2 (tested on 0.16.1 and 0.19.2)
Remove when: a save needs neither a process nor a queue server.
Tested by: tests/unit/patches/test_patch_checkpoint.py

The writer may be called by a thread: model/saving.py does. One save at a time: all share the queue.
"""

from __future__ import annotations

import functools
import os
import queue
from collections.abc import Callable
from typing import Any

from torch.distributed.checkpoint.filesystem import SerializationFormat, _write_item

from .upstream import replace

_results: queue.Queue[Any] = queue.Queue()
_num_written = 0


def apply() -> None:
    """Replace the writer and its queue."""
    from megatron.core.dist_checkpointing.strategies import filesystem_async

    writer = filesystem_async.FileSystemWriterAsync
    has_threads = "write_preloaded_data_multithread" in vars(writer)  # from 0.17 on
    replace(filesystem_async, "get_write_results_queue" if has_threads else "_get_write_results_queue", _plain_queue_of)
    replace(writer, f"write_preloaded_data_{'multithread' if has_threads else 'multiproc'}", _in_process_of)


def num_written() -> int:
    """Return how many tensors and objects this process has written, ever: it grows while a writer makes progress."""
    return _num_written


def _plain_queue_of(original: Callable[..., Any]) -> Callable[..., Any]:
    @functools.wraps(original)
    def get_queue(*_args: object) -> queue.Queue[Any]:
        while not _results.empty():  # of a save that failed before anybody read them
            _results.get_nowait()
        return _results

    return get_queue


def _in_process_of(original: Callable[..., None]) -> Callable[..., None]:
    @functools.wraps(original)
    def write(
        transforms: list[Any], use_msc: bool, rank: int, write_buckets: list[Any], results_queue: queue.Queue[Any]
    ) -> None:
        """Write one file after the other; an exception becomes the result, and the caller tells the other ranks."""
        try:
            results_queue.put({index: _write_file(transforms, *bucket) for index, bucket in enumerate(write_buckets)})
        except Exception as error:
            # torch's writer of archives says only where it stood, in an error of its own.
            results_queue.put(error.__context__ if isinstance(error.__context__, OSError) else error)

    return write


def _write_file(transforms: list[Any], path: str, storage_key: str, data: tuple[list[Any], list[Any]]) -> list[Any]:
    """Write serialised objects, then tensors, in the format that torch reads; return where each one stands."""
    global _num_written
    results = []
    (transform,) = transforms
    with open(path, "wb") as stream:
        for item, content in (*data[0], *data[1]):
            written = _write_item(transform, stream, content, item, storage_key, SerializationFormat.TORCH_SAVE)
            results.append(written)
            _num_written += 1
        os.fsync(stream.fileno())
    return results

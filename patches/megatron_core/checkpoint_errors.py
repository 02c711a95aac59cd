"""All ranks raise when rank 0 cannot write its own files of a checkpoint.

Why: every rank writes its shards, and a failure there is told to all. But rank 0 alone writes ``common.pt``,
    ``.metadata`` and ``metadata.json``; when the disk is full just then, it raises alone, and the others wait in the
    next collective until the process group times out, half an hour by default.
Upstream: what ``dist_checkpointing.save`` calls: ``TorchCommonSaveStrategy.save_common`` (``save_common`` in 0.17 and
    0.18, none from 0.19 on), ``FileSystemWriterAsync.finish``, ``save_config``
Versions: 0.16.1 - 0.19.2 (tested on 0.16.1 and 0.19.2)
Remove when: ``dist_checkpointing.save`` raises on all ranks when one of these fails on rank 0.
Tested by: tests/unit/patches/test_patch_checkpoint_errors.py

While ``save`` or the last part of an asynchronous save runs, the first failure of these three is kept instead of raised,
what would follow on rank 0 is not written (so that the directory never looks complete), and at its end all ranks raise
``OSError``.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch.distributed as dist

from megatron_rl.parallel.agree import broadcast_json

from .upstream import replace


class _Save:
    """The save in progress, if there is one."""

    is_running = False
    error: Exception | None = None


def apply() -> None:
    """Wrap the three writers of rank 0, and ``save`` in both places where it is looked up."""
    from megatron.core import dist_checkpointing
    from megatron.core.dist_checkpointing import serialization
    from megatron.core.dist_checkpointing.strategies import common
    from megatron.core.dist_checkpointing.strategies.filesystem_async import FileSystemWriterAsync

    if hasattr(common, "TorchCommonSaveStrategy"):  # 0.16
        replace(common.TorchCommonSaveStrategy, "save_common", _keep_error)
    elif hasattr(serialization, "save_common"):  # 0.17 and 0.18; from 0.19 on plain data goes the way of the shards
        replace(serialization, "save_common", _keep_error)
    replace(FileSystemWriterAsync, "finish", _keep_error)
    replace(serialization, "save_config", _keep_error)
    replace(serialization, "save", _raise_on_all_ranks)
    replace(dist_checkpointing, "save", lambda _original: serialization.save)


def _keep_error(write: Callable[..., None]) -> Callable[..., None]:
    @functools.wraps(write)
    def wrapper(*args: Any, **kwargs: Any) -> None:
        if not _Save.is_running:
            write(*args, **kwargs)
        elif _Save.error is None:
            try:
                write(*args, **kwargs)
            except Exception as error:  # whatever it is, the other ranks would wait for us
                _Save.error = error

    return wrapper


def _raise_on_all_ranks(save: Callable[..., Any]) -> Callable[..., Any]:
    @functools.wraps(save)
    def wrapper(*args: Any, **kwargs: Any) -> Any:
        with _told_to_all_ranks():
            request = save(*args, **kwargs)
        if request is not None:  # asynchronous: rank 0 writes the rest at its end
            steps = list(request.finalize_fns)
            request.finalize_fns[:] = [lambda: _finalize(steps)]
        return request

    return wrapper


def _finalize(steps: list[Callable[[], None]]) -> None:
    with _told_to_all_ranks():
        for step in steps:
            step()


@contextmanager
def _told_to_all_ranks() -> Iterator[None]:
    _Save.is_running, _Save.error = True, None
    try:
        yield
        mine = _Save.error
    finally:
        _Save.is_running, _Save.error = False, None
    assert dist.group.WORLD is not None
    told = broadcast_json(None if mine is None else f"{type(mine).__name__}: {mine}", dist.group.WORLD)
    if told is not None:
        raise OSError(f"rank 0 could not write its part of the checkpoint: {told}") from mine

"""Loads of Megatron checkpoints that execute nothing: a checkpoint is data, whoever wrote it.

Megatron and torch keep descriptions and small objects as pickles, and read some of them without restriction:

    .metadata        a pickle                      read here by the unpickler that knows the format's own classes alone
    common.pt        torch.save                    read here with weights_only, as are objects inside .distcp files
    _extra_state     bytes of Transformer Engine   never handed on: its layers would unpickle them
"""

from __future__ import annotations

import pickle
from collections.abc import Iterator, MutableMapping
from contextlib import contextmanager
from io import BytesIO
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import torch
from megatron.core import dist_checkpointing
from megatron.core.dist_checkpointing.core import CheckpointingException
from torch import Tensor
from torch.distributed.checkpoint import filesystem
from torch.distributed.checkpoint.api import CheckpointException

from megatron_rl.convert.offline.distcp import METADATA_FILE, read_metadata
from megatron_rl.errors import UserError, described


def load_plain(sharded: dict[str, Any], directory: Path, **options: Any) -> dict[str, Any]:
    """Call Megatron's ``dist_checkpointing.load`` so that it builds tensors and plain data, and nothing else. A collective.

    Args:
        sharded: what to load, as ``dist_checkpointing.load`` takes it.
        directory: with ``.metadata`` in it.
        options: passed on.

    Raises:
        UserError: on all ranks: the checkpoint holds something else, or does not fit. Nothing of it was executed.
    """
    try:
        with _plain_readers():
            loaded = dist_checkpointing.load(sharded, str(directory), **options)
    except (CheckpointException, CheckpointingException, pickle.UnpicklingError) as error:
        cause: BaseException = error
        if isinstance(error, CheckpointException) and error.failures:  # what went wrong on the rank where it did
            cause = next(iter(error.failures.values()))[0]
        fix = "take a checkpoint that this version wrote for this model, from a place that you trust"
        raise UserError(str(directory), None, f"cannot be loaded as plain data ({described(cause)})", fix) from error
    _drop_pickles(loaded)
    return loaded


@contextmanager
def _plain_readers() -> Iterator[None]:
    """Replace the two readers by which torch and Megatron get objects out of files."""
    load, unpickling = torch.load, filesystem.pickle

    def load_weights(*args: Any, **options: Any) -> Any:
        return load(*args, **{**options, "weights_only": True})

    torch.load = load_weights
    filesystem.pickle = SimpleNamespace(load=_read_metadata, dump=pickle.dump)  # type: ignore[assignment]
    try:
        yield
    finally:
        torch.load, filesystem.pickle = load, unpickling


def _read_metadata(file: Any) -> Any:
    metadata = read_metadata(file, is_strict=True)
    for place in (metadata.storage_data or {}).values():
        if Path(place.relative_path).name != place.relative_path:
            raise pickle.UnpicklingError(f"{METADATA_FILE} names {place.relative_path}, which is not a file beside it")
    return metadata


def _drop_pickles(state: MutableMapping[Any, Any]) -> None:
    """Set states of layers that are bytes to None, at any depth: a layer then begins a new one, as for a checkpoint without."""
    for key, value in state.items():
        if str(key).endswith("_extra_state") and isinstance(value, Tensor | BytesIO | bytes):
            state[key] = None
        elif isinstance(value, MutableMapping):
            _drop_pickles(value)
        elif isinstance(value, list):
            for each in value:
                if isinstance(each, MutableMapping):
                    _drop_pickles(each)

"""One checkpoint on its way to the disk.

    start            all ranks plan who writes what; with ``is_background``, each copies what it writes to memory of its own
    in a thread      each rank writes its files, and reads them back for their digests
    complete         once all ranks have written: the index, the manifest, and last the rename, which makes it a checkpoint

A thread and not a process: it ends with its rank, and it can wait for no other rank, since every collective is in the
first and the last part, which belong to the main thread.
"""

from __future__ import annotations

import inspect
import json
import math
import shutil
import threading
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from megatron.core import dist_checkpointing
from safetensors import SafetensorError
from safetensors.torch import save_file
from torch.distributed.checkpoint.api import CheckpointException

from megatron_rl.convert.tables.table import hf_tensors
from megatron_rl.errors import UserError
from megatron_rl.files import disk_error, fresh_folder, publish_folder
from megatron_rl.model.generators import generator_states
from megatron_rl.model.manifest import STATE, entry_of, generators_file, write_manifest
from megatron_rl.model.trainable import Trainable
from megatron_rl.parallel.agree import all_ranks_agree, gather_json
from megatron_rl.parallel.groups import Groups
from megatron_rl.patches.megatron_core.checkpoint import num_written
from megatron_rl.process import activity

TENSORS = "algorithm.safetensors"


class PendingSave:
    """A checkpoint that is being written. At most one at a time; its methods are collectives, ``wait`` apart."""

    def __init__(
        self,
        final: Path,
        trainable: Trainable,
        groups: Groups,
        state: Mapping[str, Any],
        tensors: Mapping[str, torch.Tensor],
        *,
        is_background: bool,
    ) -> None:
        """Start to write.

        Args:
            final: the checkpoint's folder.
            trainable: weights, optimizer and schedule.
            groups: process groups.
            state: plain data, as JSON.
            tensors: the same in every rank.
            is_background: copy all that this rank writes, so that ``trainable`` may change at once.

        Raises:
            UserError: on all ranks, when there is no room, or a file cannot be written.
        """
        self._final, self._groups = final, groups
        self._temporary = final.with_suffix(".tmp")
        self._started = time.monotonic()
        self.age_s = 0.0
        """Seconds from the start until it was complete."""
        self._entries: dict[str, dict[str, Any]] = {}
        self._error: Exception | None = None
        self._written = threading.Event()
        with self._cleaning_up():
            with all_ranks_agree(groups.cpu_group), as_user_error(final):
                if groups.rank == 0:
                    fresh_folder(self._temporary)
                    (self._temporary / "model").mkdir()
                    check_space(final.parent, bytes_to_write(trainable) + sum(t.nbytes for t in tensors.values()))
            with all_ranks_agree(groups.cpu_group), as_user_error(final):
                self._request = dist_checkpointing.save(
                    sharded_state(trainable), str(self._temporary / "model"), async_sharded_save=True, **_strategy()
                )
                files = _on_host(self._request, is_copied=is_background)
                (self._temporary / generators_file(groups.rank)).write_text(json.dumps(generator_states()))
                if groups.rank == 0:
                    if tensors:
                        save_file(
                            {name: tensor.contiguous() for name, tensor in tensors.items()}, self._temporary / TENSORS
                        )
                    (self._temporary / STATE).write_text(json.dumps(state, indent=1))
        threading.Thread(target=self._write, args=(files,), name="checkpoint", daemon=True).start()

    @property
    def is_written(self) -> bool:
        """Return True once this rank has written its part."""
        return self._written.is_set()

    def is_written_by_all(self) -> bool:
        """Return whether every rank has written its part."""
        done = torch.tensor([int(self.is_written)])
        dist.all_reduce(done, dist.ReduceOp.MIN, group=self._groups.cpu_group)
        return bool(done)

    def wait(self) -> None:
        """Wait until this rank has written its part."""
        progress = -1
        while not self._written.wait(0.2):
            if num_written() != progress:
                progress = num_written()
                activity.beat()

    def complete(self) -> Path:
        """Wait until all is written, and make it a checkpoint.

        Raises:
            UserError: on all ranks, when it cannot be written; what was there before is untouched.
        """
        self.wait()
        with self._cleaning_up():
            group = self._groups.cpu_group
            with all_ranks_agree(group), as_user_error(self._final):
                for finalize in self._request.finalize_fns:
                    finalize()
                if self._error is not None:
                    raise self._error
            entries = {name: entry for part in gather_json(self._entries, group) for name, entry in part.items()}
            with all_ranks_agree(group), as_user_error(self._final):
                if self._groups.rank == 0:
                    for path in self._temporary.rglob("*"):
                        name = str(path.relative_to(self._temporary))
                        if path.is_file() and name not in entries:
                            entries[name] = entry_of(path)
                    write_manifest(self._temporary, dict(sorted(entries.items())))
                    publish_folder(
                        self._temporary, self._final, replaces=True
                    )  # only ever an older save of the same step
        self.age_s = time.monotonic() - self._started
        return self._final

    def _write(self, files: list[Any]) -> None:
        """Write this rank's files, then digest them; the thread's work."""
        try:
            if self._request.async_fn is not None:
                rank, _, results = self._request.async_fn_args
                self._request.async_fn(rank, files, results)  # hands an error to ``finalize_fns``
            paths = [Path(path) for path, *_ in files]
            files.clear()  # whoever else holds the list, the copies are needed no more
            for path in paths:
                self._entries[str(path.relative_to(self._temporary))] = entry_of(path)
        except Exception as error:
            self._error = error
        finally:
            self._written.set()

    @contextmanager
    def _cleaning_up(self) -> Iterator[None]:
        try:
            yield
        except UserError:
            if self._groups.rank == 0:
                shutil.rmtree(self._temporary, ignore_errors=True)
            raise


def _strategy() -> dict[str, str]:
    """Name Megatron's own writer, where it has a choice (0.18 on)."""
    has_choice = "async_strategy" in inspect.signature(dist_checkpointing.save).parameters
    return {"async_strategy": "mcore"} if has_choice else {}


def _on_host(request: Any, *, is_copied: bool) -> list[Any]:
    """Return the files that this rank writes, with their contents in main memory.

    Args:
        request: of Megatron.
        is_copied: whether contents that are in main memory already are copied, because they will change.
    """
    if request.preload_fn is None:  # nothing to write
        return []
    _, planned, _ = request.async_fn_args
    files = []
    for (path, key, (objects, tensors)), (*_, (_, loaded)) in zip(planned, request.preload_fn(), strict=True):
        mine = []
        while tensors:  # one after the other, so that the first copies need no place beside all of the originals
            (item, before), (_, tensor) = tensors.pop(), loaded.pop()
            mine.append((item, tensor.clone() if is_copied and tensor is before else tensor))
            del before, tensor
        files.append((path, key, (objects, mine[::-1])))
    return files


def sharded_state(trainable: Trainable, *, is_loading: bool = False) -> dict[str, Any]:
    """Return what a checkpoint holds of a model; without an optimizer only its weights are loaded."""
    trainable.update_memory.resume(with_gradients=False)
    metadata = {
        "distrib_optim_sharding_type": "fully_reshardable",
        # Rank 0 of the data-parallel ranks writes, so the others need no copy. From GPUs it would go over gloo too.
        "distrib_optim_fully_reshardable_mem_efficient": trainable.groups.device.type == "cpu",
        "dp_cp_group": trainable.groups.dp_cp_group,
        "singleton_local_shards": False,
        "chained_optim_avoid_prefix": True,
    }
    model = [chunk.sharded_state_dict(metadata=metadata) for chunk in trainable.chunks]
    if not trainable.has_optimizer:
        return {"model": model, "num_updates": trainable.num_updates}
    optimizer = trainable.optimizer.sharded_state_dict({"model": model}, is_loading=is_loading, metadata=metadata)
    return {
        "model": model,
        "optimizer": optimizer,
        "scheduler": trainable.scheduler.state_dict(),
        "num_updates": trainable.num_updates,
    }


def bytes_to_write(trainable: Trainable) -> int:
    """Return the bytes of all weights and of 12 bytes a parameter of optimizer state; a little more is written."""
    parameters = sum(math.prod(extent) for extent in hf_tensors(trainable.shape).values())
    return parameters * (trainable.megatron_config.params_dtype.itemsize + 12)


def check_space(directory: Path, needed: int) -> None:
    """Check that the disk has room.

    Raises:
        OSError: it has not.
    """
    free = shutil.disk_usage(directory).free
    if free < needed:
        raise OSError(28, f"{needed / 1e9:.2f} GB are needed, {free / 1e9:.2f} GB are free")


@contextmanager
def as_user_error(path: Path) -> Iterator[None]:
    """Turn a failure to write a checkpoint into a ``UserError``: ``files.disk_errors``, for errors that hide their cause."""
    try:
        yield
    except (OSError, RuntimeError, SafetensorError, CheckpointException) as error:
        cause: BaseException = error
        if isinstance(error, CheckpointException) and error.failures:  # what went wrong on the rank where it did
            cause = next(iter(error.failures.values()))[0]
        why = str(cause)
        if "allocate memory" in why:  # said by torch's allocator, in a RuntimeError
            rule = f"needs main memory for what a checkpoint holds of this rank ({why.splitlines()[0]})"
            fix = "leave exp_manager.checkpoint_callback_params.async_save out, or start fewer ranks on a machine"
            raise UserError("exp_manager.checkpoint_callback_params", None, rule, fix) from error
        if "No space left" not in why and _is_full(path):  # torch's own writer says only where in the file it stood
            why = f"No space left on device: {why}"
        fix = "free some disk space or choose another exp_dir; earlier checkpoints are intact, and the same command resumes"
        raise disk_error(path, why, field="exp_manager.exp_dir", fix=fix) from error


def _is_full(path: Path) -> bool:
    """Return whether less than a MB is free in the place of a checkpoint."""
    there = next((folder for folder in path.parents if folder.is_dir()), None)
    return there is not None and shutil.disk_usage(there).free < 2**20

"""A failure of rank 0 alone reaches every rank, and leaves nothing that looks like a checkpoint."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
import torch.distributed as dist
from megatron.core import dist_checkpointing
from megatron.core.dist_checkpointing import ShardedTensor, serialization
from megatron.core.dist_checkpointing.core import CheckpointingConfig
from megatron.core.dist_checkpointing.strategies import common as strategies_common

from tests.forked import run_ranks

HAS_COMMON_FILE = hasattr(strategies_common, "TorchCommonSaveStrategy") or hasattr(serialization, "save_common")
"""Not from Megatron-Core 0.19 on: plain data is pickled in memory, and written with the shards."""


class Unwritable:
    """Fails while it is pickled into ``common.pt``."""

    def __reduce__(self) -> tuple:
        raise OSError(28, "No space left on device")


def save(directory: Path, common: object) -> str:
    rows = ShardedTensor.from_rank_offsets("rows", torch.ones(1, 4), (0, dist.get_rank(), dist.get_world_size()))
    try:
        dist_checkpointing.save({"rows": rows, "common": common}, str(directory), validate_access_integrity=False)
        error = "none"
    except OSError as caught:
        error = str(caught)
    everyone = [None] * dist.get_world_size()
    dist.all_gather_object(everyone, error)  # hangs if the ranks are not at the same place
    assert len(set(everyone)) == 1, everyone
    return error


def break_then_save(directory: Path, name: str) -> str:
    """A directory stands where rank 0 wants to write the file ``name``."""
    if dist.get_rank() == 0:
        (directory / name).mkdir()
    dist.barrier()
    return save(directory, 1)


@pytest.mark.parametrize("name", [*["common.pt"] * HAS_COMMON_FILE, "metadata.json"])
def test_file_that_rank_0_cannot_write(tmp_path: Path, name: str) -> None:
    for error in run_ranks(break_then_save, 2, tmp_path, name, timeout_s=15):
        assert "rank 0 could not write its part of the checkpoint" in error
        assert "Is a directory" in error
    assert not (tmp_path / "metadata.json").is_file()  # by which a reader tells a whole checkpoint


def fail_to_finish(directory: Path) -> str:
    """The storage metadata is written to another name and then renamed: fail where rank 0 would do that."""
    if dist.get_rank() == 0:
        (directory / ".metadata").mkdir()
        (directory / ".metadata" / "file").touch()
    dist.barrier()
    return save(directory, 1)


def test_storage_metadata_that_rank_0_cannot_write(tmp_path: Path) -> None:
    for error in run_ranks(fail_to_finish, 2, tmp_path, timeout_s=15):
        assert "rank 0 could not write its part of the checkpoint" in error
    assert not dist_checkpointing.check_is_distributed_checkpoint(str(tmp_path))


@pytest.mark.skipif(not HAS_COMMON_FILE, reason="this Megatron-Core has no common.pt")
def test_object_that_cannot_be_pickled(tmp_path: Path) -> None:
    for error in run_ranks(save, 2, tmp_path, Unwritable(), timeout_s=15):
        assert "No space left on device" in error


def save_twice(directory: Path) -> tuple[str, str]:
    for name in ("bad", "good"):
        (directory / name).mkdir(exist_ok=True)
    return break_then_save(directory / "bad", "metadata.json"), save(directory / "good", 1)


def test_next_save_is_not_affected(tmp_path: Path) -> None:
    for bad, good in run_ranks(save_twice, 2, tmp_path, timeout_s=15):
        assert (bad != "none", good) == (True, "none")
    assert dist_checkpointing.check_is_distributed_checkpoint(str(tmp_path / "good"))


def test_outside_a_save_errors_are_raised_where_they_happen(tmp_path: Path) -> None:
    with pytest.raises(OSError, match=r"metadata\.json"):
        serialization.save_config(CheckpointingConfig("torch_dist", 1), str(tmp_path / "missing"))

"""Weights of a running model from a Megatron ``torch_dist`` directory, read by Megatron's own ``dist_checkpointing``."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from megatron.core import dist_checkpointing

from megatron_rl.model.forward import PolicyModel
from megatron_rl.parallel.groups import Groups


def load_torch_dist(
    chunks: Sequence[PolicyModel], groups: Groups, directory: str | Path, *, strict: str = "raise_unexpected"
) -> None:
    """Fill this rank's part of the model. A collective.

    Args:
        chunks: this rank's part of the model.
        groups: process groups.
        directory: with ``.metadata`` in it.
        strict: Megatron's ``StrictHandling``: ``raise_unexpected`` refuses a checkpoint that lacks something, ``raise_all``
            also one that has more than the model.

    Raises:
        CheckpointingException: Megatron's; the checkpoint is not of this model.
    """
    metadata = {"dp_cp_group": groups.dp_cp_group, "singleton_local_shards": False}
    states: dict[str, Any] = {f"model{i}": chunk.sharded_state_dict(metadata=metadata) for i, chunk in enumerate(chunks)}
    loaded = dist_checkpointing.load(states, str(directory), strict=strict)
    for index, chunk in enumerate(chunks):
        chunk.load_state_dict(loaded[f"model{index}"], strict=True)

"""Weights of a running model from a Megatron ``torch_dist`` directory, read by Megatron's own ``dist_checkpointing``."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from megatron_rl.config import Config
from megatron_rl.convert.architecture.shape import read_shape
from megatron_rl.data.pack import pack, response_slice
from megatron_rl.model.build import build_chunks, build_groups_of
from megatron_rl.model.forward import PolicyModel, run_model
from megatron_rl.model.plain_load import load_plain
from megatron_rl.parallel.groups import Groups
from megatron_rl.types import RowKind, TrainingSample


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
        UserError: the checkpoint is not of this model, or holds more than data.
    """
    metadata = {"dp_cp_group": groups.dp_cp_group, "singleton_local_shards": False}
    states: dict[str, Any] = {
        f"model{i}": chunk.sharded_state_dict(metadata=metadata) for i, chunk in enumerate(chunks)
    }
    loaded = load_plain(states, Path(directory), strict=strict)
    for index, chunk in enumerate(chunks):
        chunk.load_state_dict(loaded[f"model{index}"], strict=True)


def log_probs_of_one_rank(config: Config, directory: str | Path, tokens: Tensor) -> Tensor:
    """Return the log-probs of one sequence under a checkpoint's model. Needs a process group of one rank.

    Args:
        config: of one rank; its ``policy.model_path`` gives the shape of the model.
        directory: with ``.metadata`` in it.
        tokens: [T] int64.

    Returns:
        [T - 1] float32: log-prob of each token but the first.
    """
    shape, groups = read_shape(config.policy.model_dir), build_groups_of(config, torch.device("cpu"))
    chunks = build_chunks(config, shape, groups)
    load_torch_dist(chunks, groups, directory)
    sample = TrainingSample(tokens[:1], tokens[1:], RowKind.SFT)
    with torch.no_grad():
        log_probs, _ = run_model(chunks[0].eval(), pack([sample], [0]))
    return log_probs[response_slice(0, sample)]

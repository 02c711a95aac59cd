"""What both forms of Segment Policy Optimization (SPO, arXiv 2505.23564) share: whose probabilities count, and whitening."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch

from megatron_rl.algorithms.clipped import ClippedAlgorithm
from megatron_rl.config import Config, SegmentConfig, SPOTreeConfig
from megatron_rl.report.tree_record import write_record
from megatron_rl.types import RolloutGroup, TrainingSample

STD_EPSILON = 1e-6


class SegmentAlgorithm(ClippedAlgorithm):
    """Rows come with an advantage for each token; here they are whitened."""

    def __init__(self, config: Config) -> None:
        super().__init__(config)
        assert isinstance(config.algorithm, SegmentConfig)
        self.segment_settings = config.algorithm

    def assign_advantages(self, samples: Sequence[TrainingSample]) -> None:
        """Whiten those that rows have, over the tokens of each update that enter the loss."""
        self.mask_by_policy(samples)
        how = self.segment_settings.whitening
        if how == "none":
            return
        for rows in self.updates(samples):
            whiten([samples[row] for row in rows], subtract_mean=how == "mean_std")

    def keep(self, directory: Path, groups: Sequence[RolloutGroup], tokenizer: Any, *, step: int) -> None:
        """Every so many steps, the trees or chains, for ``megatron-rl tree``."""
        settings = self.segment_settings
        if settings.save_every_n_steps and step % settings.save_every_n_steps == 0:
            path = directory / "trees" / f"step_{step:08d}.json"
            advantage = settings.advantage if isinstance(settings, SPOTreeConfig) else "raw"
            write_record(
                path,
                groups,
                tokenizer,
                step=step,
                threshold=settings.sure_from,
                shaped=self.shaped,
                advantage=advantage,
            )


def whiten(rows: Sequence[TrainingSample], *, subtract_mean: bool) -> None:
    """Give the rows' advantages unit standard deviation over their loss tokens, in place; equal ones keep their scale."""
    chosen = torch.cat([_advantages(row) if row.loss_mask is None else _advantages(row)[row.loss_mask] for row in rows])
    mean = float(chosen.double().mean()) if subtract_mean else 0.0
    std = float(chosen.double().std()) if len(chosen) > 1 else 0.0
    scale = 1 / (std + STD_EPSILON) if std > STD_EPSILON else 1.0
    for row in rows:
        row.advantages = (_advantages(row) - mean) * scale


def _advantages(row: TrainingSample) -> torch.Tensor:
    assert row.advantages is not None
    return row.advantages

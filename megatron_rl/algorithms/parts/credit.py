"""Credit: the advantage of each token, against the other rollouts of a group, or by segment and whitened; and what KL costs."""

from __future__ import annotations

from collections.abc import Iterable, Sequence

import torch
from torch import Tensor

from megatron_rl.advantages.group import against_baseline, group_advantages
from megatron_rl.algorithms.parts.base import Credit
from megatron_rl.config import GroupConfig
from megatron_rl.config.methods.spo import SegmentConfig
from megatron_rl.losses.kl import kl_estimate
from megatron_rl.losses.selection import moments
from megatron_rl.types import POLICY_GRADIENT_KINDS, TrainingSample

STD_EPSILON = 1e-6


class GroupCredit(Credit):
    """One advantage per rollout, the same for all its tokens: its reward against those of its group."""

    def __init__(self, settings: GroupConfig) -> None:
        super().__init__()
        self.settings = settings

    def assign(self, samples: Sequence[TrainingSample], updates: Sequence[Sequence[int]]) -> None:
        """Set ``advantages``: 0 where the scorer failed, or where a rollout has nobody to be compared with."""
        for group in groups_of(sample for sample in samples if sample.kind in POLICY_GRADIENT_KINDS):
            judged = [sample for sample in group if sample.has_reward]
            for sample in group:
                sample.advantages = torch.zeros(sample.num_response_tokens)
            if len(judged) < 2:
                continue
            advantages = group_advantages(
                torch.tensor([sample.reward for sample in judged]),
                normalize=self.settings.normalize_rewards,
                leave_one_out=self.settings.use_leave_one_out_baseline,
            )
            for sample, advantage in zip(judged, advantages):
                sample.advantages = advantage.expand(sample.num_response_tokens).clone()


def groups_of(samples: Iterable[TrainingSample]) -> list[list[TrainingSample]]:
    """Return the rows of each group, wherever they stand; groups in the order of their first rows."""
    groups: dict[int, list[TrainingSample]] = {}
    for sample in samples:
        groups.setdefault(sample.group_index, []).append(sample)
    return list(groups.values())


def charge_kl(samples: Sequence[TrainingSample], coef: float, *, leave_one_out: bool) -> None:
    """Subtract ``coef * (KL_i - baseline_i)`` from the advantage of each token of rollout i, KL_i being its summed k1.

    The baseline is the mean KL of the group's judged rollouts, or of the others among them. The advantages are there already,
    so no division by a standard deviation touches the KL, and its policy gradient is that of ``coef * KL(policy || reference)``
    of whole responses (times (G - 1) / G without ``leave_one_out``: as for the reward, a rollout is part of its own baseline).
    As a part of the reward the KL would be divided by the group's standard deviation: where task rewards are equal it would
    have size 1, whatever ``coef`` is.

    Args:
        samples: all rows of the step, with ``advantages``, ``old_log_probs`` and ``ref_log_probs``.
        coef: nats of a response to units of advantage.
        leave_one_out: the baseline of rollout i leaves i out.
    """
    chargeable = (sample for sample in samples if sample.kind in POLICY_GRADIENT_KINDS and sample.has_reward)
    for group in groups_of(chargeable):
        if len(group) < 2:
            continue
        costs = torch.stack([_summed_k1(sample) for sample in group])
        for sample, cost in zip(group, against_baseline(costs, leave_one_out=leave_one_out)):
            sample.advantages = _advantages(sample) - coef * cost


def _summed_k1(sample: TrainingSample) -> Tensor:
    assert sample.old_log_probs is not None and sample.ref_log_probs is not None
    return kl_estimate(sample.old_log_probs, sample.ref_log_probs, "k1").sum()


class SegmentCredit(Credit):
    """Rows come with an advantage for each token (of its segment, or edge); here they are whitened."""

    takes_replays = False

    def __init__(self, settings: SegmentConfig) -> None:
        super().__init__()
        self.whitening = settings.whitening

    def assign(self, samples: Sequence[TrainingSample], updates: Sequence[Sequence[int]]) -> None:
        """Whiten the advantages over the tokens of each update that enter the loss."""
        if self.whitening == "none":
            return
        for rows in updates:
            chosen = [samples[row] for row in rows if samples[row].kind in POLICY_GRADIENT_KINDS]
            whiten(chosen, subtract_mean=self.whitening == "mean_std")


def whiten(rows: Sequence[TrainingSample], *, subtract_mean: bool) -> None:
    """Give the rows' advantages unit standard deviation over their loss tokens, in place; equal ones keep their scale."""
    if not any(row.num_loss_tokens for row in rows):  # a mean over no token is no number
        return
    chosen = torch.cat([_advantages(row) if row.loss_mask is None else _advantages(row)[row.loss_mask] for row in rows])
    mean, std = moments(chosen)
    scale = 1 / (std + STD_EPSILON) if std > STD_EPSILON else 1.0
    for row in rows:
        row.advantages = (_advantages(row) - (mean if subtract_mean else 0.0)) * scale


def _advantages(row: TrainingSample) -> Tensor:
    assert row.advantages is not None
    return row.advantages

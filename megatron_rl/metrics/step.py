"""Metrics of one step, computed from its rollouts, rows and updates. Fractions are in [0, 1]."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence

import torch
from torch import Tensor

from megatron_rl.rewards.correct import is_correct
from megatron_rl.types import Kind, RolloutGroup, TrainingSample

MAXIMA = frozenset({"ratio/max", "ratio/max_abs_log_ratio"})
"""Of what an update reports, the maxima over its tokens: what algorithms put into ``TokenTerms.maxima``."""


def rollout_metrics(groups: Sequence[RolloutGroup], *, version: int) -> dict[str, float]:
    """Rewards, accuracy, lengths and losses of data of the rollouts of one step.

    Args:
        groups: the step's groups.
        version: publish counter of the current weights; older completions are stale by the difference.
    """
    rollouts = [rollout for group in groups for rollout in group.rollouts]
    lengths = [len(r.completion.response_ids) for r in rollouts]
    correct = [[is_correct(r.score) for r in group.rollouts] for group in groups]
    size = len(groups[0].rollouts)
    parts = sorted({name for r in rollouts for name in r.score.parts})
    metrics = {
        "reward/mean": _mean([_shared(group, [r.score.reward for r in group.rollouts]) for group in groups]),
        "pass@1": _mean([_shared(group, c) for group, c in zip(groups, correct)]),
        "groups/all_right_frac": _mean([all(c) for c in correct]),
        "groups/all_wrong_frac": _mean([not any(c) for c in correct]),
        "response_length/mean": _mean(lengths),
        "response_length/max": float(max(lengths)),
        "response_length/cut_frac": _mean([r.completion.finish_reason == "length" for r in rollouts]),
        "num_rollouts": float(len(rollouts)),
        "rollout/staleness": _mean([version - r.completion.weight_version for r in rollouts]),
    }
    if all(group.tree is None for group in groups):  # leaves are no independent samples, and not always as many
        metrics[f"pass@{size}"] = _mean([any(c) for c in correct])
    for part in parts:
        of_groups = [_shared(group, [r.score.parts.get(part, 0.0) for r in group.rollouts]) for group in groups]
        metrics[f"reward/{part}"] = _mean(of_groups)
    failures = Counter(r.score.reason.split(":")[0] for r in rollouts if r.score.is_failure)
    metrics |= {f"dropped/score_{reason}": float(count) for reason, count in failures.items()}
    return metrics


def sample_metrics(samples: Sequence[TrainingSample]) -> dict[str, float]:
    """How much was trained on; of online rows also train/rollout mismatch, and the covariance that drives entropy
    (arXiv 2505.22617)."""
    sizes = {
        "num_tokens": float(sum(sample.num_tokens for sample in samples)),
        "num_response_tokens": float(sum(sample.num_response_tokens for sample in samples)),
    }
    rollouts = [sample for sample in samples if sample.kind in (Kind.RL, Kind.EDGE)]
    if not any(sample.num_response_tokens for sample in rollouts):  # a mean over no token is no number
        return sizes
    difference = (_joined(rollouts, "old_log_probs") - _joined(rollouts, "rollout_log_probs")).abs()
    found = sizes | {
        "mismatch/log_prob_abs_diff": float(difference.mean()),
        "mismatch/log_prob_abs_diff_max": float(difference.max()),
    }
    masks = [torch.ones(row.num_response_tokens).bool() if row.loss_mask is None else row.loss_mask for row in rollouts]
    in_loss = torch.cat(masks)
    if not bool(in_loss.any()):
        return found
    old, advantages = _joined(rollouts, "old_log_probs")[in_loss], _joined(rollouts, "advantages")[in_loss]
    covariance = (old - old.mean()) * (advantages - advantages.mean())
    return found | {"cov/mean": float(covariance.mean()), "advantages/abs_mean": float(advantages.abs().mean())}


def update_metrics(updates: Sequence[Mapping[str, float]]) -> dict[str, float]:
    """Means (of ``MAXIMA``: maxima) over the optimizer updates of a step.

    ``ratio/first_update_max_abs_log_ratio`` is that of the first update alone, where the policy is still the one that
    ``old_log_probs`` came from: anything but 0.0 there means that two passes over the same rows differ. (From a run's second
    step on, those are the update's own.)
    """
    if not updates:  # a step may find nothing to learn from
        return {}
    metrics = {
        key: max(u[key] for u in updates) if key in MAXIMA else _mean([u[key] for u in updates]) for key in updates[0]
    }
    if "ratio/max_abs_log_ratio" in updates[0]:
        metrics["ratio/first_update_max_abs_log_ratio"] = updates[0]["ratio/max_abs_log_ratio"]
    return metrics


def _shared(group: RolloutGroup, values: Sequence[float]) -> float:
    """The mean over a group: each rollout by its share."""
    shares = [r.share for r in group.rollouts]
    if any(share is None for share in shares):
        return _mean(values)
    return sum(share * value for share, value in zip(shares, values) if share is not None)


def _joined(samples: Sequence[TrainingSample], name: str) -> Tensor:
    return torch.cat([getattr(sample, name) for sample in samples]).double()


def _mean(values: Sequence[float]) -> float:
    return float(sum(values) / len(values)) if values else 0.0

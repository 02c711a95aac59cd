"""Metrics of one step, computed from its rollouts, rows and updates. Fractions are in [0, 1]."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from functools import partial
from typing import NamedTuple

import torch
import torch.distributed as dist
from torch import Tensor

from megatron_rl.rewards.correct import is_correct
from megatron_rl.types import RolloutGroup, RowKind, Score, TrainingSample, TreeNode

MAXIMA = frozenset({"ratio/max", "ratio/max_abs_log_ratio"})
"""Names in an update's report that are maxima over its tokens: what algorithms put into ``TokenTerms.maxima``."""

BLOCK_TOKENS = 1 << 14
"""Response tokens that are summed at once: a float64 vector of them is 128 KiB, stays in the cache and needs no new pages."""


def rollout_metrics(groups: Sequence[RolloutGroup], *, version: int) -> dict[str, float]:
    """Return rewards, accuracy, response lengths and failed scores of one step's rollouts.

    Args:
        groups: the step's groups.
        version: publish counter of the current weights; a completion's staleness is its difference to this.
    """
    rollouts = [rollout for group in groups for rollout in group.rollouts]
    lengths = [len(r.completion.response_ids) for r in rollouts]
    return accuracy_metrics(groups) | {
        "response_length/mean": _mean(lengths),
        "response_length/max": float(max(lengths)),
        "response_length/cut_frac": _mean([r.completion.finish_reason == "length" for r in rollouts]),
        "num_rollouts": float(len(rollouts)),
        "rollout/staleness": _mean([version - r.completion.weight_version for r in rollouts]),
    }


def accuracy_metrics(groups: Sequence[RolloutGroup]) -> dict[str, float]:
    """Return rewards and accuracy of groups, over the rollouts that could be judged, and the failed scores.

    ``reward/mean``, ``pass@1`` and ``reward/<part>`` are means over groups of their rollouts' means; of a tree, of its root's
    values. ``groups/*`` are shares of groups. ``pass@G`` is over groups all of whose G rollouts could be judged, and
    ``dropped/pass@G`` the number of the others. A mean over nothing is absent, as is a count of 0.
    """
    judged = [scores for group in groups if (scores := [r.score for r in group.rollouts if not r.score.is_failure])]
    parts = sorted({name for scores in judged for score in scores for name in score.parts})
    figures: dict[str, Callable[[Score], float]] = {"reward/mean": lambda score: score.reward, "pass@1": is_correct}
    figures |= {f"reward/{name}": partial(_part_of, name) for name in parts}
    metrics = {}
    for name, figure in figures.items():
        means = [mean for group in groups if (mean := _group_mean(group, figure)) is not None]
        if means:
            metrics[name] = _mean(means)
    if judged:
        metrics["groups/all_right_frac"] = _mean([all(map(is_correct, scores)) for scores in judged])
        metrics["groups/all_wrong_frac"] = _mean([not any(map(is_correct, scores)) for scores in judged])
    if all(group.tree is None for group in groups):  # leaves are no independent samples, and not always as many
        size = len(groups[0].rollouts)
        whole = [any(map(is_correct, scores)) for scores in judged if len(scores) == size]
        if whole:
            metrics[f"pass@{size}"] = _mean(whole)
        if len(whole) < len(groups):
            metrics[f"dropped/pass@{size}"] = float(len(groups) - len(whole))
    return metrics | dropped_scores(groups)


def dropped_scores(groups: Sequence[RolloutGroup]) -> dict[str, float]:
    """Count the rollouts that could not be judged: ``dropped/score_<reason>``."""
    scores = [rollout.score for group in groups for rollout in group.rollouts]
    failures = Counter(score.reason.split(":")[0] for score in scores if score.is_failure)
    return {f"dropped/score_{reason}": float(count) for reason, count in failures.items()}


def sample_metrics(samples: Sequence[TrainingSample], cpu_group: dist.ProcessGroup | None = None) -> dict[str, float]:
    """Return the size of what was trained on, train/rollout mismatch, and the covariance that drives entropy.

    Mismatch and covariance (arXiv 2505.22617) are over the rows that the policy sampled; mismatch leaves out rows without the
    engine's log-probs. Every rank holds all rows, so each one sums over its share of them and the sums are gathered. A
    collective.

    Args:
        samples: all rows of the step, the same on every rank.
        cpu_group: all ranks, over gloo; None for one process.
    """
    rank, world_size = (0, 1) if cpu_group is None else (dist.get_rank(cpu_group), dist.get_world_size(cpu_group))
    mine = _merged(torch.tensor([_NO_ROWS, *map(_sums, _blocks(samples[rank::world_size]))], dtype=torch.float64))
    by_rank = [mine]
    if cpu_group is not None:
        by_rank = [torch.empty_like(mine) for _ in range(world_size)]
        dist.all_gather(by_rank, mine, group=cpu_group)
    total = _Sums(*_merged(torch.stack(by_rank)).tolist())
    found = {"num_tokens": total.tokens, "num_response_tokens": total.response_tokens}
    if total.compared:  # a mean over no token is no number
        found["mismatch/log_prob_abs_diff"] = total.difference / total.compared
        found["mismatch/log_prob_abs_diff_max"] = total.largest_difference
    if total.in_loss:
        found["cov/mean"] = total.co_moment / total.in_loss
        found["advantages/abs_mean"] = total.abs_advantages / total.in_loss
    return found


class _Sums(NamedTuple):
    """Sums over the tokens of some rows."""

    tokens: float = 0.0
    response_tokens: float = 0.0
    compared: float = 0.0
    """Number of response tokens that the policy sampled, of rows that have the engine's log-probs."""
    difference: float = 0.0
    """Sum of ``|old_log_probs - rollout_log_probs|`` over those tokens."""
    largest_difference: float = 0.0
    """The maximum, where all other fields are sums."""
    in_loss: float = 0.0
    """Number of tokens in the loss, of rows that the policy sampled; the fields below are about these."""
    old: float = 0.0
    advantages: float = 0.0
    abs_advantages: float = 0.0
    co_moment: float = 0.0
    """Sum of ``(old - mean) * (advantage - mean)``, with the means over these rows."""


_NO_ROWS = _Sums()
_FIELD = {name: place for place, name in enumerate(_Sums._fields)}


def _blocks(samples: Sequence[TrainingSample]) -> Iterator[list[TrainingSample]]:
    """Yield consecutive rows with about ``BLOCK_TOKENS`` response tokens, so that float64 copies stay small."""
    block: list[TrainingSample] = []
    size = 0
    for sample in samples:
        block.append(sample)
        size += sample.num_response_tokens
        if size >= BLOCK_TOKENS:
            yield block
            block, size = [], 0
    if block:
        yield block


def _sums(samples: Sequence[TrainingSample]) -> _Sums:
    """Sum over the tokens of a few rows, in float64."""
    sizes = _Sums(
        tokens=float(sum(sample.num_tokens for sample in samples)),
        response_tokens=float(sum(sample.num_response_tokens for sample in samples)),
    )
    rows = [sample for sample in samples if sample.kind in (RowKind.RL, RowKind.EDGE)]
    old, advantages = _joined(rows, "old_log_probs").double(), _joined(rows, "advantages")
    if not len(old):
        return sizes
    told = [row for row in rows if row.rollout_log_probs is not None]  # rollouts from outside may come without them
    compared = old if len(told) == len(rows) else _joined(told, "old_log_probs").double()
    difference = (compared - _joined(told, "rollout_log_probs")).abs_()  # torch widens the float32 operand exactly
    if len(difference):
        sizes = sizes._replace(
            compared=float(len(difference)),
            difference=float(difference.sum()),
            largest_difference=float(difference.max()),
        )
    if any(row.loss_mask is not None for row in rows):
        masks = [torch.ones(len(row.response_ids)).bool() if row.loss_mask is None else row.loss_mask for row in rows]
        in_loss = torch.cat(masks)
        old, advantages = old[in_loss], advantages[in_loss]
    if not len(old):
        return sizes
    advantages = advantages.double()
    return sizes._replace(
        in_loss=float(len(old)),
        old=float(old.sum()),
        advantages=float(advantages.sum()),
        abs_advantages=float(advantages.abs().sum()),
        co_moment=float(((old - old.mean()) * (advantages - advantages.mean())).sum()),
    )


def _merged(parts: Tensor) -> Tensor:
    """Merge the sums [n, fields] of n disjoint sets of rows into those [fields] of all.

    A co-moment is about its part's own means, so it is moved to the means of all (Chan, Golub and LeVeque 1983). Unlike a
    difference of raw sums this loses no digits. The order is that of the parts: the same on every rank.
    """
    total = parts.sum(0)
    total[_FIELD["largest_difference"]] = parts[:, _FIELD["largest_difference"]].max()
    counts = parts[:, _FIELD["in_loss"]]
    if counts.sum() > 0:
        shifts = [
            parts[:, _FIELD[name]] / counts.clamp(min=1) - total[_FIELD[name]] / counts.sum()
            for name in ("old", "advantages")
        ]
        total[_FIELD["co_moment"]] += (counts * shifts[0] * shifts[1]).sum()
    return total


def update_metrics(updates: Sequence[Mapping[str, float]]) -> dict[str, float]:
    """Average over the optimizer updates of a step; names in ``MAXIMA`` are maxima instead.

    ``ratio/first_update_max_abs_log_ratio`` is of the first update alone, where the policy still is the one that gave
    ``old_log_probs``. Anything but 0.0 there means that two passes over the same rows differ. (From a run's second step on,
    the update itself supplies these ``old_log_probs``.)
    """
    if not updates:  # a step may find nothing to learn from
        return {}
    metrics: dict[str, float] = {}
    for key in dict.fromkeys(key for update in updates for key in update):  # one without rollouts in its loss has fewer
        found = [update[key] for update in updates if key in update]
        metrics[key] = max(found) if key in MAXIMA else _mean(found)
    if "ratio/max_abs_log_ratio" in updates[0]:
        metrics["ratio/first_update_max_abs_log_ratio"] = updates[0]["ratio/max_abs_log_ratio"]
    return metrics


def _part_of(name: str, score: Score) -> float:
    return score.parts.get(name, 0.0)


def _group_mean(group: RolloutGroup, figure: Callable[[Score], float]) -> float | None:
    """Return the mean of a figure over a group's judged rollouts; of a tree the root's; None without any."""
    if group.tree is not None:
        return _node_mean(group.tree, figure)
    values = [figure(r.score) for r in group.rollouts if not r.score.is_failure]
    return _mean(values) if values else None


def _node_mean(node: TreeNode, figure: Callable[[Score], float]) -> float | None:
    """Return a leaf's figure, or the mean of those of the children that have one: a tree's values are made like this."""
    if not node.children:
        return None if node.score is None or node.score.is_failure else figure(node.score)
    means = [mean for child in node.children if (mean := _node_mean(child, figure)) is not None]
    return _mean(means) if means else None


def _joined(samples: Sequence[TrainingSample], name: str) -> Tensor:
    return torch.cat([torch.empty(0), *(getattr(sample, name) for sample in samples)])


def _mean(values: Sequence[float]) -> float:
    return float(sum(values) / len(values)) if values else 0.0

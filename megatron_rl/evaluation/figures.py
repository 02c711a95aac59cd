"""Figures of an evaluation from its samples, each with a bootstrap interval over problems. Pure functions of arrays.

Every figure is a mean over problems of a value that a problem's own samples give; NaN is a problem that gives none.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

NUM_RESAMPLES = 1000
NUM_SUBSETS = 64
"""Subsets of k samples over which maj@k is averaged for k < n."""
Floats = NDArray[np.float64]


@dataclass(frozen=True)
class Outcomes:
    """What became of n samples of each of P problems."""

    correct: Floats
    """[P, n] 1.0 right, 0.0 wrong, NaN where it could not be judged."""
    votes: NDArray[np.int64]
    """[P, n] number of the final answer among the problem's answers; -1 where a sample has none."""
    lengths: Floats
    """[P, n] response tokens."""
    is_cut: Floats
    """[P, n] 1.0 where the response ended at the limit."""
    greedy: Floats
    """[P] 1.0 or 0.0 of the greedy response; NaN without one, or where it could not be judged."""

    def of(self, rows: NDArray[np.int64]) -> Outcomes:
        """Return those of some problems."""
        return Outcomes(self.correct[rows], self.votes[rows], self.lengths[rows], self.is_cut[rows], self.greedy[rows])


def pass_at(correct: Floats, k: int) -> Floats:
    """Return [P] ``1 - C(n - c, k) / C(n, k)`` with n judged and c right samples of a problem; NaN where n < k."""
    n = np.isfinite(correct).sum(1).astype(float)
    wrong = n - np.nansum(correct, 1)
    chance = np.ones(len(correct))
    for j in range(k):
        chance *= np.maximum(wrong - j, 0.0) / np.maximum(n - j, 1.0)
    return np.where(n >= k, 1.0 - chance, np.nan)


def majority_at(correct: Floats, votes: NDArray[np.int64], k: int, seed: int) -> Floats:
    """Return [P] the chance that the most frequent final answer of k samples is right; NaN where fewer were judged.

    The mean over subsets of k samples: over all there are for k = n, over ``NUM_SUBSETS`` seeded ones otherwise. Among answers
    that are equally frequent each counts alike. A sample without an answer does not vote; where nobody votes, it is 0.
    """
    judged = np.isfinite(correct)
    rng = np.random.default_rng(seed)
    is_whole = k >= correct.shape[1]
    totals = np.zeros(len(correct))
    for _ in range(1 if is_whole else NUM_SUBSETS):
        order = np.where(judged, rng.random(correct.shape), 2.0)  # what was not judged comes last
        chosen = np.argsort(order, axis=1)[:, :k]
        of_votes, of_right = np.take_along_axis(votes, chosen, 1), np.take_along_axis(correct, chosen, 1)
        has_vote = of_votes >= 0
        counts = ((of_votes[:, :, None] == of_votes[:, None, :]) & has_vote[:, None, :]).sum(2) * has_vote
        most = counts.max(1, keepdims=True)
        # Answers with the same count have as many samples each, so a mean over samples is one over answers.
        is_winner = (counts == most) & (most > 0)
        right = np.where(is_winner, np.nan_to_num(of_right), 0.0).sum(1)
        totals += right / np.maximum(is_winner.sum(1), 1)
    return np.where(judged.sum(1) >= k, totals / (1 if is_whole else NUM_SUBSETS), np.nan)


def values_by_problem(outcomes: Outcomes, k_values: Sequence[int], seed: int) -> dict[str, Floats]:
    """Return [P] the value of each problem for each figure, by the figure's name."""
    n = outcomes.correct.shape[1]
    judged = np.isfinite(outcomes.correct).sum(1)
    values = {"greedy": outcomes.greedy} | {f"pass@{k}": pass_at(outcomes.correct, k) for k in k_values}
    right = np.nansum(outcomes.correct, 1)
    values[f"avg@{n}"] = np.where(judged > 0, right / np.maximum(judged, 1), np.nan)
    if (outcomes.votes >= 0).any():
        for k in sorted({*(k for k in k_values if k > 1), n} - {1}):
            values[f"maj@{k}"] = majority_at(outcomes.correct, outcomes.votes, k, seed)
    values["cut_frac"], values["response_length"] = outcomes.is_cut.mean(1), outcomes.lengths.mean(1)
    return {name: of_name for name, of_name in values.items() if np.isfinite(of_name).any()}


def intervals(values: Floats, seed: int) -> tuple[Floats, Floats]:
    """Return bounds of the central 95 % of the means of problems drawn with replacement, ``NUM_RESAMPLES`` times.

    Args:
        values: [P, M] values of P problems; NaN is left out of a mean.
        seed: of the draw.

    Returns:
        Two of shape [M].
    """
    num_problems = len(values)
    draws = np.random.default_rng(seed).integers(num_problems, size=(NUM_RESAMPLES, num_problems))
    offsets = num_problems * np.arange(NUM_RESAMPLES)[:, None]
    counts = np.bincount((draws + offsets).ravel(), minlength=NUM_RESAMPLES * num_problems)
    weights = counts.reshape(NUM_RESAMPLES, num_problems).astype(float)
    is_there = np.isfinite(values).astype(float)
    with np.errstate(invalid="ignore"):  # a draw may hold none of the problems that count
        means = (weights @ np.nan_to_num(values)) / (weights @ is_there)
    low, high = np.nanpercentile(means, [2.5, 97.5], axis=0)
    return low, high


def figures(outcomes: Outcomes, k_values: Sequence[int], *, seed: int) -> dict[str, dict[str, Any]]:
    """Return each figure with its interval and the number of problems behind it.

    Args:
        outcomes: of P >= 1 problems.
        k_values: of pass@k and maj@k, up to n.
        seed: of the bootstrap and of the subsets of maj@k.

    Returns:
        ``{"pass@1": {"value": ..., "low": ..., "high": ..., "num_problems": ...}, ...}``. A figure of no problem is absent.
    """
    values = values_by_problem(outcomes, k_values, seed)
    low, high = intervals(np.stack(list(values.values()), axis=1), seed)
    return {
        name: {
            "value": float(np.nanmean(of_name)),
            "low": float(low[i]),
            "high": float(high[i]),
            "num_problems": int(np.isfinite(of_name).sum()),
        }
        for i, (name, of_name) in enumerate(values.items())
    }

"""Diversity of the samples of a problem, and kept and new solutions against another model. Pure functions."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Callable, Iterable, Mapping, Sequence

MANY_STYLES = 3
"""Number of styles of one problem that the five-style experiment of DPH-RL (arXiv 2509.07430) calls preserved diversity."""


def distinct(values: Iterable[str]) -> int:
    """Count the different values; ``""`` stands for no value and is not counted."""
    return len(set(values) - {""})


def entropy(labels: Iterable[str]) -> float:
    """Return the plug-in entropy of the labels in nats: ``sum_i p_i ln(1 / p_i)``, with ``p_i`` the share of label i.

    It is below the entropy of the distribution that labels were drawn from, by about ``(K - 1) / 2n`` for K possible labels
    and n draws: compare figures of equal n only. ``""`` stands for no label and is left out; 0.0 without any label.

    Example:
        ``entropy(["a", "a", "b"])`` is 0.636514.
    """
    counts = Counter(label for label in labels if label).values()
    total = sum(counts)
    return math.fsum(count / total * math.log(total / count) for count in counts)


def keep_and_explore(before: Mapping[str, bool], after: Mapping[str, bool]) -> dict[str, float]:
    """Return the shares of solved problems (S) that stay solved, and of failed ones (F) that get solved.

    ``keep_rate = |S and solved after| / |S|``, ``explore_rate = |F and solved after| / |F|``, after DPH-RL (arXiv
    2509.07430), which does not define "solved": the caller decides.

    Args:
        before: problem id -> True if it was solved.
        after: the same problems.

    Returns:
        Shares in [0, 1]. A rate over no problem at all is absent.
    """
    assert before.keys() == after.keys(), "keep and explore rates need the same problems before and after"
    rates = {}
    for name, was_solved in (("keep_rate", True), ("explore_rate", False)):
        outcomes = [after[problem_id] for problem_id, solved in before.items() if solved == was_solved]
        if outcomes:
            rates[name] = sum(outcomes) / len(outcomes)
    return rates


def answer_metrics(answers: Sequence[Sequence[str]]) -> dict[str, float]:
    """Measure how many different answers the samples of a problem give.

    Args:
        answers: [P][G] normalised final answers; ``""`` where a sample has none.

    Returns:
        ``distinct_answers`` and ``answer_entropy`` (nats), means over the problems with two samples or more: of one nothing
        can differ. A problem without any answer counts 0. Empty where no sample has an answer (a task that extracts none).
    """
    several = [of_problem for of_problem in answers if len(of_problem) >= 2]
    if not any(map(any, several)):
        return {}
    return {"distinct_answers": _mean_of(distinct, several), "answer_entropy": _mean_of(entropy, several)}


def style_metrics(styles: Sequence[Sequence[str]]) -> dict[str, float]:
    """Measure how many styles the samples of a problem use, and how often each occurs.

    Args:
        styles: [P][G] names of surface styles; ``""`` where a sample has none that the task knows.

    Returns:
        ``style/<name>``, shares of all samples; a style that no sample has is absent. ``style_entropy_pooled``, nats, over
        all samples together. Means over problems of their own samples: ``distinct_styles``, ``style_entropy`` (nats), over
        problems with two samples or more, and ``styles_ge_3``, the share of problems with at least three styles, over those
        with three or more. Empty where no sample has a style.
    """
    pooled = [style for of_problem in styles for style in of_problem]
    if not any(pooled):
        return {}
    counts = Counter(style for style in pooled if style)
    metrics = {f"style/{name}": counts[name] / len(pooled) for name in sorted(counts)}
    metrics["style_entropy_pooled"] = entropy(pooled)
    if several := [of_problem for of_problem in styles if len(of_problem) >= 2]:
        metrics |= {"distinct_styles": _mean_of(distinct, several), "style_entropy": _mean_of(entropy, several)}
    if many := [of_problem for of_problem in styles if len(of_problem) >= MANY_STYLES]:
        metrics[f"styles_ge_{MANY_STYLES}"] = _mean_of(lambda names: distinct(names) >= MANY_STYLES, many)
    return metrics


def _mean_of(measure: Callable[[Sequence[str]], float], problems: Sequence[Sequence[str]]) -> float:
    """Average a measure over problems."""
    return sum(map(measure, problems)) / len(problems)

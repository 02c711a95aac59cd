"""How different the samples of a problem are, and what became of the problems that another model solved. Pure functions."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Callable, Iterable, Mapping, Sequence

MANY_STYLES = 3
"""So many styles of one problem count as preserved diversity in the five-style experiment of DPH-RL (arXiv 2509.07430)."""


def distinct(values: Iterable[str]) -> int:
    """How many different values there are; ``""`` stands for none and is not counted."""
    return len(set(values) - {""})


def entropy(labels: Iterable[str]) -> float:
    """Entropy of the labels in nats, by the plug-in estimator: ``sum_i p_i ln(1 / p_i)``, with ``p_i`` the share of label i.

    It falls below the entropy of what the labels were drawn from, by about ``(K - 1) / 2n`` for K possible labels and n
    draws: compare figures of equal n only. ``""`` stands for no label and is left out; 0.0 without any label.

    Example:
        ``entropy(["a", "a", "b"])`` is 0.636514.
    """
    counts = Counter(label for label in labels if label).values()
    total = sum(counts)
    return math.fsum(count / total * math.log(total / count) for count in counts)


def keep_and_explore(before: Mapping[str, bool], after: Mapping[str, bool]) -> dict[str, float]:
    """What became of the problems solved before (S) and of those failed before (F).

    ``keep_rate = |S and solved after| / |S|``, ``explore_rate = |F and solved after| / |F|``, after DPH-RL (arXiv
    2509.07430), which leaves open what "solved" is: the caller decides.

    Args:
        before: by problem id, whether it was solved.
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
    """How many different answers the samples of a problem give.

    Args:
        answers: [P][G] normalised final answers; ``""`` where a sample has none.

    Returns:
        ``distinct_answers`` and ``answer_entropy`` (nats), means over problems; one without any answer counts 0. Empty where
        no sample has an answer (a task that extracts none), or where there is one sample a problem: nothing can differ.
    """
    if not any(map(any, answers)) or max(map(len, answers)) < 2:
        return {}
    return {"distinct_answers": _mean_of(distinct, answers), "answer_entropy": _mean_of(entropy, answers)}


def style_metrics(styles: Sequence[Sequence[str]]) -> dict[str, float]:
    """In how many ways the samples of a problem are solved, and how often each way is taken.

    Args:
        styles: [P][G] names of surface styles; ``""`` where a sample has none that the task knows.

    Returns:
        ``style/<name>``, shares of all samples; a style that no sample has is absent. ``style_entropy_pooled``, nats, over
        all samples together. Means over problems of their own samples: ``distinct_styles``, ``style_entropy`` (nats), from
        two samples a problem on, and ``styles_ge_3``, the share of problems with at least three styles, from three on.
        Empty where no sample has a style.
    """
    pooled = [style for of_problem in styles for style in of_problem]
    if not any(pooled):
        return {}
    counts = Counter(style for style in pooled if style)
    metrics = {f"style/{name}": counts[name] / len(pooled) for name in sorted(counts)}
    metrics["style_entropy_pooled"] = entropy(pooled)
    num_samples = max(map(len, styles))
    if num_samples >= 2:
        metrics |= {"distinct_styles": _mean_of(distinct, styles), "style_entropy": _mean_of(entropy, styles)}
    if num_samples >= MANY_STYLES:
        metrics[f"styles_ge_{MANY_STYLES}"] = _mean_of(lambda names: distinct(names) >= MANY_STYLES, styles)
    return metrics


def _mean_of(measure: Callable[[Sequence[str]], float], problems: Sequence[Sequence[str]]) -> float:
    """Mean of a measure over problems."""
    return sum(map(measure, problems)) / len(problems)

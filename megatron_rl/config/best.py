"""Names of the metrics of evaluations, by which a run can tell better weights from worse."""

from __future__ import annotations

from collections.abc import Iterable
from difflib import get_close_matches

from megatron_rl.config.data import EvalConfig
from megatron_rl.errors import UserError

FIELD = "exp_manager.checkpoint_callback_params.metric_name"
_OTHERS = (
    "response_length", "distinct_answers", "answer_entropy", "distinct_styles", "style_entropy", "styles_ge_3",
    *(f"{rate}_rate_{meaning}" for rate in ("keep", "explore") for meaning in ("greedy", "any")),
)  # fmt: skip
"""Metrics of a set that some evaluations have."""


def accuracies(config: EvalConfig, num_samples: int) -> list[str]:
    """Return the accuracies that an evaluation with so many samples of a problem has."""
    greedy = ["greedy"] if config.greedy else []
    return [*greedy, *(f"pass@{k}" for k in config.k_values if k <= num_samples), f"avg@{num_samples}"]


def check_metric(name: str, config: EvalConfig, sets: Iterable[str]) -> None:
    """Check that evaluations will have a metric; one that is not below ``eval/`` shows itself in training.

    Args:
        name: of the metric.
        config: of the evaluations.
        sets: names of the held-out sets; ``""`` is that of a set without one.

    Raises:
        UserError: they will not.
    """
    if not name.startswith("eval/"):
        return
    if not config.is_used:
        fix = "set eval.every_n_steps and data.validation"
        raise UserError(FIELD, name, "is of evaluations, and this run makes none", fix)
    num_samples = config.num_samples_during if config.every_n_steps else config.num_samples
    prefixes = [f"eval/{each}/" if each else "eval/" for each in sets]
    known = [prefix + each for prefix in prefixes for each in accuracies(config, num_samples)]
    if name in known or name in [prefix + each for prefix in prefixes for each in _OTHERS]:
        return
    if name in [prefix + each for prefix in prefixes for each in accuracies(config, config.num_samples)]:
        rule = f"needs more samples than eval.num_samples_during = {num_samples}: it is measured before and after training only"
        raise UserError(FIELD, name, rule, "raise eval.num_samples_during, or choose another metric")
    near = get_close_matches(name, known, n=3, cutoff=0.5) or known
    raise UserError(FIELD, name, "is no metric of this run's evaluations", f"choose one, as {', '.join(near)}")

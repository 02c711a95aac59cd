"""Accuracy on held-out problems: unbiased pass@k and avg@k from samples, and greedy."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from megatron_rl.config.schema import EvalConfig
from megatron_rl.rewards.correct import is_correct
from megatron_rl.rewards.pass_at_k import pass_at_k
from megatron_rl.rollout.collect import Collector, Sampling
from megatron_rl.types import Prompt, RolloutGroup


@dataclass(frozen=True)
class Evaluator:
    """The held-out prompts and how to sample on them."""

    prompts: Sequence[Prompt]
    config: EvalConfig
    max_new_tokens: int

    def evaluate(self, collector: Collector, *, step: int, num_samples: int) -> dict[str, float]:
        """Sample, score, count. A collective.

        Args:
            collector: engine and scorer.
            step: steps trained so far; names the draw.
            num_samples: per problem; values of k above it are left out.

        Returns:
            ``eval/greedy``, ``eval/pass@k`` for each k, ``eval/avg@n``, ``eval/response_length``, shares in [0, 1].
        """
        config = self.config
        sampled = collector.collect(
            self.prompts,
            num_generations=num_samples,
            sampling=Sampling(config.temperature, config.top_p, 0, self.max_new_tokens),
            purpose=f"eval/{step}",
        )
        correct = [sum(is_correct(r.score) for r in group.rollouts) for group in sampled]
        metrics = {
            f"eval/pass@{k}": _mean([pass_at_k(num_samples, c, k) for c in correct])
            for k in config.k_values
            if k <= num_samples
        }
        metrics[f"eval/avg@{num_samples}"] = _mean([c / num_samples for c in correct])
        metrics["eval/response_length"] = _mean([float(n) for n in _response_lengths(sampled)])
        if config.greedy:
            greedy = collector.collect(
                self.prompts,
                num_generations=1,
                sampling=Sampling(0.0, 1.0, 0, self.max_new_tokens),
                purpose=f"eval/{step}/greedy",
            )
            metrics["eval/greedy"] = _mean([is_correct(g.rollouts[0].score) for g in greedy])
        return metrics


def _response_lengths(groups: Sequence[RolloutGroup]) -> list[int]:
    """Tokens of every rollout."""
    return [len(rollout.completion.response_ids) for group in groups for rollout in group.rollouts]


def _mean(values: Sequence[float]) -> float:
    """Arithmetic mean; 0.0 of nothing."""
    return sum(values) / len(values) if values else 0.0

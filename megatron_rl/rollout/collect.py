"""Prompts -> scored groups."""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from megatron_rl.rollout.engine import RolloutEngine
from megatron_rl.rollout.score import Scorer
from megatron_rl.types import Prompt, Request, Rollout, RolloutGroup


@dataclass(frozen=True)
class Sampling:
    """How responses are drawn."""

    temperature: float
    top_p: float
    top_k: int
    max_new_tokens: int
    record_experts: bool = False


@dataclass
class Collector:
    """Everything that turns prompts into scored groups. A collective: all ranks call it with equal arguments."""

    engine: RolloutEngine
    scorer: Scorer
    seed: int
    timer: Any
    """``PhaseTimer``: ``generation`` and ``scoring``."""

    def collect(
        self, prompts: Sequence[Prompt], *, num_generations: int, sampling: Sampling, purpose: str
    ) -> list[RolloutGroup]:
        """Sample and score ``num_generations`` rollouts of each prompt.

        Args:
            prompts: P prompts.
            num_generations: G.
            sampling: temperature and limits.
            purpose: names the draw (``train/step/round``, ``eval/step``): another purpose, other random numbers.

        Returns:
            P groups of G rollouts.
        """
        groups = self.collect_first(
            len(prompts), prompts, num_generations=num_generations, sampling=sampling, purpose=purpose
        )
        return [group for group in groups if group is not None]

    def collect_first(
        self, num_groups: int, prompts: Sequence[Prompt], *, num_generations: int, sampling: Sampling, purpose: str
    ) -> list[RolloutGroup | None]:
        """``collect`` until ``num_groups`` are whole; the others are None.

        What is whole first is short, so this leans towards short responses.
        """
        repeated = [prompt for prompt in prompts for _ in range(num_generations)]
        requests = [
            Request(
                prompt_ids=prompt.prompt_ids,
                max_new_tokens=sampling.max_new_tokens,
                temperature=sampling.temperature,
                top_p=sampling.top_p,
                top_k=sampling.top_k,
                record_experts=sampling.record_experts,
                seed=_request_seed(self.seed, purpose, index),
            )
            for index, prompt in enumerate(repeated)
        ]
        with self.timer("generation"):
            results = self.engine.generate(requests, group_size=num_generations, num_groups=num_groups)
        whole = [i for i in range(len(prompts)) if results[i * num_generations] is not None]
        completions = [result for result in results if result is not None]
        with self.timer("scoring"):
            scores = self.scorer.score([prompts[i] for i in whole for _ in range(num_generations)], completions)
        rollouts = [Rollout(completion, score) for completion, score in zip(completions, scores)]
        groups: list[RolloutGroup | None] = [None] * len(prompts)
        for n, i in enumerate(whole):
            groups[i] = RolloutGroup(prompts[i], rollouts[n * num_generations : (n + 1) * num_generations])
        return groups


def _request_seed(seed: int, purpose: str, index: int) -> int:
    digest = hashlib.blake2b(f"{seed}/{purpose}/{index}".encode(), digest_size=8).digest()
    return int.from_bytes(digest, "little") >> 1  # torch takes 63 bits

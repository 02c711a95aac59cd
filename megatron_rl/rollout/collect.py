"""Collection: prompts -> scored groups."""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

from torch import Tensor

from megatron_rl.rollout.engine import RolloutEngine
from megatron_rl.rollout.growth import Branch, Expand, Key
from megatron_rl.scoring.scorer import Scorer
from megatron_rl.types import Completion, Prompt, Request, Rollout, RolloutGroup, Score


@dataclass(frozen=True)
class Sampling:
    """Sampling settings of responses."""

    temperature: float
    top_p: float
    top_k: int
    max_new_tokens: int
    record_experts: bool = False


@dataclass
class Collector:
    """Turns prompts into scored groups. A collective: all ranks call it with equal arguments."""

    engine: RolloutEngine
    scorer: Scorer
    seed: int
    timer: Any
    """A ``PhaseTimer`` for the phases ``generation`` and ``scoring``."""
    policy_log_probs: Callable[[Sequence[Prompt], Sequence[Tensor]], list[Tensor]] | None = None
    """Returns the trainer's log-probs [R] of responses (ids) to prompts, for methods that need them during collection."""
    num_generated_tokens: int = 0
    """Tokens sampled since this program started, for training, evaluation or anything else."""

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
        """Do as ``collect`` until ``num_groups`` are whole; the others are None.

        Short groups are whole first, so this favours short responses.
        """
        repeated = [prompt for prompt in prompts for _ in range(num_generations)]
        requests = [
            self.request(prompt.prompt_ids, sampling, sampling.max_new_tokens, f"{purpose}/{index}")
            for index, prompt in enumerate(repeated)
        ]
        with self.timer("generation"):
            results = self.engine.generate(requests, group_size=num_generations, num_groups=num_groups)
        whole = [i for i in range(len(prompts)) if results[i * num_generations] is not None]
        completions = [result for result in results if result is not None]
        self.num_generated_tokens += sum(len(completion.response_ids) for completion in completions)
        scores = self.score([prompts[i] for i in whole for _ in range(num_generations)], completions)
        rollouts = [Rollout(completion, score) for completion, score in zip(completions, scores)]
        groups: list[RolloutGroup | None] = [None] * len(prompts)
        for n, i in enumerate(whole):
            groups[i] = RolloutGroup(prompts[i], rollouts[n * num_generations : (n + 1) * num_generations])
        return groups

    def request(self, prompt_ids: Tensor, sampling: Sampling, max_new_tokens: int, draw: str) -> Request:
        """Return one request; ``draw`` names its random numbers."""
        digest = hashlib.blake2b(f"{self.seed}/{draw}".encode(), digest_size=8).digest()
        return Request(
            prompt_ids=prompt_ids,
            max_new_tokens=max_new_tokens,
            temperature=sampling.temperature,
            top_p=sampling.top_p,
            top_k=sampling.top_k,
            record_experts=sampling.record_experts,
            seed=int.from_bytes(digest, "little") >> 1,  # torch takes 63 bits
        )

    def grow(self, seeds: Sequence[Branch], expand: Expand) -> dict[Key, Completion]:
        """Sample branches and all their descendants; nothing is scored."""
        with self.timer("generation"):
            grown = self.engine.grow(seeds, expand)
        self.num_generated_tokens += sum(len(completion.response_ids) for completion in grown.values())
        return grown

    def score(self, prompts: Sequence[Prompt], completions: Sequence[Completion]) -> list[Score]:
        """Score whole responses."""
        with self.timer("scoring"):
            return self.scorer.score(prompts, completions)

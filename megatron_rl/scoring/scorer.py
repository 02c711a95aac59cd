"""Rewards for completions: rank 0 decodes and scores in killable workers, every rank gets the scores."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch.distributed as dist

from megatron_rl.parallel.agree import all_ranks_agree, broadcast_json
from megatron_rl.scoring.workers import ScoringPool
from megatron_rl.types import Completion, Prompt, Score


class Scorer:
    """The scoring pool of rank 0, for all ranks: they call ``score`` together, with equal arguments."""

    def __init__(
        self,
        task_names: Sequence[str],
        tokenizer: Any,
        *,
        num_workers: int,
        timeout_s: float,
        cpu_group: dist.ProcessGroup,
        reward: str | None = None,
    ) -> None:
        """Start the workers (on rank 0). A collective.

        Args:
            task_names: tasks of the problems to come; each problem is judged by the ``score`` of its own.
            tokenizer: decodes responses, special tokens left out.
            num_workers: processes.
            timeout_s: deadline of one score.
            cpu_group: all ranks, over gloo.
            reward: ``package.module:FUNCTION`` that judges in place of the tasks' ``score``.

        Raises:
            UserError: no such task or reward; on all ranks.
        """
        self._tokenizer, self._group = tokenizer, cpu_group
        self._pool: ScoringPool | None = None
        with all_ranks_agree(cpu_group):
            if dist.get_rank(cpu_group) == 0:
                self._pool = ScoringPool(task_names, num_workers=num_workers, timeout_s=timeout_s, reward=reward)

    def score(self, prompts: Sequence[Prompt], completions: Sequence[Completion]) -> list[Score]:
        """Judge each completion as a response to its prompt's problem.

        Returns:
            One score per completion, the same on every rank.
        """
        scores: list[Score] = []
        if self._pool is not None:
            texts = self._tokenizer.batch_decode(
                [c.response_ids.tolist() for c in completions], skip_special_tokens=True
            )
            scores = self._pool.score([(p.problem, text) for p, text in zip(prompts, texts)])
        return [Score(**fields) for fields in broadcast_json([vars(score) for score in scores], self._group)]

    def close(self) -> None:
        """Stop the workers."""
        if self._pool is not None:
            self._pool.close()

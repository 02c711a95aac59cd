"""Rewards for completions: rank 0 decodes and scores in killable workers, every rank gets the scores."""

from __future__ import annotations

import logging
from collections.abc import Mapping, Sequence
from typing import Any

import torch.distributed as dist

from megatron_rl.parallel.agree import all_ranks_agree, broadcast_json
from megatron_rl.scoring.workers import ScoringPool
from megatron_rl.tasks.reward import Attempt
from megatron_rl.types import Completion, Prompt, Score

logger = logging.getLogger(__name__)


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
        reward_kwargs: Mapping[str, Any] | None = None,
    ) -> None:
        """Start the workers (on rank 0). A collective.

        Args:
            task_names: tasks of the problems to come; each problem is judged by the ``score`` of its own.
            tokenizer: decodes responses, special tokens left out.
            num_workers: processes.
            timeout_s: deadline of one score.
            cpu_group: all ranks, over gloo.
            reward: ``package.module:FUNCTION`` that judges in place of the tasks' ``score``.
            reward_kwargs: further arguments of either.

        Raises:
            UserError: no such task or reward; on all ranks.
        """
        self._tokenizer, self._group = tokenizer, cpu_group
        self._pool: ScoringPool | None = None
        self._reported: set[str] = set()
        with all_ranks_agree(cpu_group):
            if dist.get_rank(cpu_group) == 0:
                self._pool = ScoringPool(
                    task_names, num_workers=num_workers, timeout_s=timeout_s, reward=reward, reward_kwargs=reward_kwargs
                )

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
            attempts = [Attempt(p.problem, text, c.finish_reason) for p, text, c in zip(prompts, texts, completions)]
            scores = self._pool.score(attempts)
            self._report(attempts, scores)
        return [Score(**fields) for fields in broadcast_json([vars(score) for score in scores], self._group)]

    def _report(self, attempts: Sequence[Attempt], scores: Sequence[Score]) -> None:
        """Say which row could not be judged, and why: of each kind of failure the first."""
        for attempt, score in zip(attempts, scores):
            kind = ":".join(score.reason.split(":")[:2])
            if score.is_failure and kind not in self._reported:
                self._reported.add(kind)
                logger.warning(
                    "a response to %s could not be judged: %s. Such rollouts get no advantage (dropped/score_*)",
                    attempt.problem.source or "a problem", score.reason,
                )  # fmt: skip

    def close(self) -> None:
        """Stop the workers."""
        if self._pool is not None:
            self._pool.close()

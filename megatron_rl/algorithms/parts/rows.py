"""RowMaker: from completions to training rows, the same for every method; and how rollouts are drawn."""

from __future__ import annotations

from typing import Any

from torch import Tensor

from megatron_rl.advantages.shaping import overlong_penalty
from megatron_rl.config import ClippedConfig, Config
from megatron_rl.errors import UserError
from megatron_rl.rollout.collect import Sampling
from megatron_rl.types import Completion, Rollout, RowKind, TrainingSample


class RowMaker:
    """Makes rows under one config."""

    def __init__(self, config: Config) -> None:
        assert isinstance(config.algorithm, ClippedConfig)
        self.config, self.overlong = config, config.algorithm.overlong

    def sampling(self) -> Sampling:
        """Return how training rollouts are drawn: as ``rollout`` says."""
        rollout, replay = self.config.rollout, self.config.policy.router_replay
        return Sampling(
            rollout.temperature, rollout.top_p, rollout.top_k, rollout.max_new_tokens, record_experts=replay
        )

    def shaped(self, reward: float, num_tokens: int) -> float:
        """Return a response's reward, less what it pays for its length in tokens."""
        return reward + overlong_penalty(
            num_tokens,
            max_tokens=self.config.rollout.max_new_tokens,
            buffer=self.overlong.buffer,
            penalty=self.overlong.penalty,
        )

    def shaped_reward(self, rollout: Rollout) -> float | None:
        """Return the shaped reward of a rollout; None where it could not be judged."""
        failed = rollout.score.is_failure
        return None if failed else self.shaped(rollout.score.reward, len(rollout.completion.response_ids))

    def of_rollout(self, rollout: Rollout, prompt_ids: Tensor, group_index: int, **fields: Any) -> TrainingSample:
        """Return the row of one rollout of a group.

        Args:
            rollout: scored.
            prompt_ids: [*] int64.
            group_index: place of its group in the step.
            fields: further fields of the row.
        """
        return self.of_completion(
            rollout.completion,
            prompt_ids,
            RowKind.RL,
            has_reward=not rollout.score.is_failure,
            group_index=group_index,
            **fields,
        )

    def of_completion(self, completion: Completion, prompt_ids: Tensor, kind: RowKind, **fields: Any) -> TrainingSample:
        """Return the row of a completion, with what the engine said of it.

        Raises:
            UserError: experts are to be replayed, and the engine has not told them.
        """
        return TrainingSample(
            prompt_ids,
            completion.response_ids,
            kind,
            finish_reason=completion.finish_reason,
            weight_version=completion.weight_version,
            rollout_log_probs=completion.log_probs,
            experts=self._experts(completion),
            **fields,
        )

    def _experts(self, completion: Completion) -> Tensor | None:
        """Return a row's ``experts`` under ``policy.router_replay``."""
        if not self.config.policy.router_replay:
            return None
        if completion.experts is None:
            raise UserError(
                "policy.router_replay",
                True,
                "needs completions that say which experts were chosen; these do not",
                "record rollouts with router_replay on, or leave it out",
            )
        return completion.experts

"""REINFORCE with a running mean: a rollout is worth its reward less the mean reward of the steps before (Williams, 1992).

    A_i = r_i - m        m <- decay * m + (1 - decay) * mean of this step's rewards

Only the credit is new. Rollouts, the choice of tokens and the clipped ratio are GRPO's.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import torch
from torch import Tensor

from megatron_rl.algorithms.grpo import GRPO
from megatron_rl.algorithms.parts.base import Credit
from megatron_rl.config import Config
from megatron_rl.types import POLICY_GRADIENT_KINDS, TrainingSample
from settings import RunningMeanConfig


class RunningMeanCredit(Credit):
    """One advantage per rollout, the same for all its tokens."""

    def __init__(self, decay: float) -> None:
        super().__init__()
        self.decay, self.mean = decay, torch.zeros((), dtype=torch.float64)

    def assign(self, samples: Sequence[TrainingSample], updates: Sequence[Sequence[int]]) -> None:
        """Set advantages against the mean so far, then move the mean. Rows with a loss of their own need none."""
        rows = [sample for sample in samples if sample.kind in POLICY_GRADIENT_KINDS]
        for row in rows:
            advantage = row.reward - float(self.mean) if row.has_reward else 0.0
            row.advantages = torch.full((row.num_response_tokens,), advantage)
        rewards = torch.tensor([row.reward for row in rows if row.has_reward], dtype=torch.float64)
        if len(rewards):
            self.mean = self.decay * self.mean + (1 - self.decay) * rewards.mean()
        self.metrics = {"running_mean": float(self.mean)}

    def state(self) -> dict[str, Tensor]:
        """Return what a resumed run must know: the mean."""
        return {"mean": self.mean}

    def load_state(self, state: Mapping[str, Tensor]) -> None:
        """Go on with the mean of a checkpoint."""
        self.mean = state["mean"]


class RunningMean(GRPO):
    """GRPO with one part replaced."""

    def __init__(self, config: Config) -> None:
        assert isinstance(config.algorithm, RunningMeanConfig)
        super().__init__(config, credit=RunningMeanCredit(config.algorithm.decay))

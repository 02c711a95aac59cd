"""What every algorithm says: which weights its tokens get and what their loss is. Online ones also collect and give credit."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from megatron_rl.config import Config
from megatron_rl.data.pool import PoolNeed
from megatron_rl.data.stream import Stream
from megatron_rl.errors import UserError
from megatron_rl.losses.aggregate import token_weights
from megatron_rl.losses.terms import TokenTerms
from megatron_rl.rollout.collect import Collector, Sampling
from megatron_rl.types import Completion, MicroBatch, Prompt, RolloutGroup, TrainingSample


class Algorithm(ABC):
    """Every rank calls the methods in the same order with equal arguments, and gets equal results."""

    needs_reference: bool = False
    """Fill ``ref_log_probs`` from the weights that the run started with."""

    def __init__(self, config: Config) -> None:
        self.config = config

    @property
    def needs(self) -> frozenset[str]:
        """Names of the per-token vectors to fill by forward passes before credit is given: some of ``NEEDS`` (run.py)."""
        return frozenset({"ref_log_probs"} if self.needs_reference else ())

    def assign_weights(self, mini_batch: Sequence[TrainingSample]) -> None:
        """Set ``weights`` of every row of one optimizer mini-batch. The aggregation is over the whole of it."""
        weights = token_weights(
            [sample.num_loss_tokens for sample in mini_batch],
            self.config.algorithm.loss_aggregation,
            max_tokens=self.config.rollout.max_new_tokens,
        )
        for sample, weight in zip(mini_batch, weights):
            sample.weights = torch.full((sample.num_response_tokens,), weight)
            if sample.loss_mask is not None:
                sample.weights *= sample.loss_mask

    @abstractmethod
    def loss(self, log_probs: Tensor, entropy: Tensor, batch: MicroBatch) -> TokenTerms:
        """Per-token loss terms of one micro-batch.

        Args:
            log_probs: [T] float32, with gradient; 0.0 outside ``response_mask``.
            entropy: [T] float32, with gradient; 0.0 outside ``response_mask``.
            batch: ids, masks and the samples' vectors.
        """


class OnlineAlgorithm(Algorithm):
    """An algorithm that learns from its own rollouts."""

    needs_old_log_probs: bool = False
    """``assign_advantages`` reads ``old_log_probs``."""
    num_epochs: int = 1
    """Passes over each rollout batch."""

    @property
    def needs(self) -> frozenset[str]:
        """Names of the per-token vectors to fill before credit is given; the ratio always needs ``old_log_probs``."""
        return super().needs | {"old_log_probs"}

    @abstractmethod
    def collect(self, prompts: Stream[Prompt], collector: Collector, step: int) -> list[RolloutGroup]:
        """The groups of one step."""

    @property
    def pool_need(self) -> PoolNeed | None:
        """The pool to open before the first step; None where nothing is stored."""
        return None

    @abstractmethod
    def samples(self, groups: Sequence[RolloutGroup], step: int) -> list[TrainingSample]:
        """The rows to train on."""

    def use_tokenizer(self, tokenizer: Any) -> None:
        """Called once, before the first step; for methods that look at what tokens say."""

    def mini_batches(self, samples: Sequence[TrainingSample]) -> list[list[int]]:
        """Row indices of each optimizer mini-batch: consecutive, so that groups stay together where sizes allow."""
        size = self.config.policy.train_global_batch_size
        return [list(range(start, min(start + size, len(samples)))) for start in range(0, len(samples), size)]

    def updates(self, samples: Sequence[TrainingSample]) -> list[list[int]]:
        """The mini-batches that are trained on: one whose every token is masked has nothing to teach."""
        return [
            rows
            for rows in self.mini_batches(samples)
            if any(samples[row].loss_mask is None or samples[row].num_loss_tokens for row in rows)
        ]

    def passes_ahead(self, samples: Sequence[TrainingSample]) -> list[list[int]]:
        """Row indices of each forward pass that fills ``old_log_probs`` before credit is given.

        The first update brings those of its rows from its own pass, unless credit needs them, or entropies, sooner.
        """
        mini_batches = self.mini_batches(samples)
        return mini_batches if self.needs_old_log_probs or "entropy" in self.needs else mini_batches[1:]

    @abstractmethod
    def assign_advantages(self, samples: Sequence[TrainingSample]) -> None:
        """Set ``advantages`` of every row; the log-probs that the algorithm says it needs are filled by now."""

    def replayed_experts(self, completion: Completion) -> Tensor | None:
        """What a row's ``experts`` are, under ``policy.router_replay``.

        Raises:
            UserError: the engine has not told them.
        """
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

    def keep(self, directory: Path, groups: Sequence[RolloutGroup], tokenizer: Any, *, step: int) -> None:
        """Write what a viewer shows of a step into the run's folder; called on one rank. Most methods write nothing.

        Raises:
            UserError: it cannot be written.
        """

    def state(self) -> dict[str, Tensor]:
        """What a checkpoint must keep of the algorithm; most keep nothing."""
        return {}

    def load_state(self, state: Mapping[str, Tensor]) -> None:
        """Go on where ``state`` was taken."""

    def step_metrics(self) -> dict[str, float]:
        """Metrics of the last step that only the algorithm knows."""
        return {}

    def sampling(self) -> Sampling:
        """Training rollouts are drawn as ``rollout`` says."""
        rollout, replay = self.config.rollout, self.config.policy.router_replay
        return Sampling(
            rollout.temperature, rollout.top_p, rollout.top_k, rollout.max_new_tokens, record_experts=replay
        )

"""Algorithm: weights and loss of rows. OnlineAlgorithm: rollouts, selection, credit, objective and stored rows, composed.

A method names its parts (``parts/``); each part has one concern and knows nothing of the others:

    rollouts     prompts -> groups of scored rollouts -> rows          GroupRollouts, ChainRollouts, TreeRollouts
    selection    which tokens of a row enter the loss                  ProbabilityMask
    credit       rows -> advantage of each token                       GroupCredit, SegmentCredit
    objective    log-probs and advantages -> loss of each token        ClippedObjective
    correction   weight of tokens that another policy sampled          TruncatedRatio, or none
    stored       rows from a pool beside the rollouts                  RehearsedRows, ReplayedRows, or none

So a method that differs in one concern replaces one part, and a setting of one part (a mask, KL, dual clip) works with all
methods. Each part says which vectors it needs, and has its own metrics and state.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from megatron_rl.algorithms.parts.base import Correction, Credit, Objective, Part, Rollouts, StoredRows, TokenSelection
from megatron_rl.algorithms.parts.correction import TruncatedRatio
from megatron_rl.algorithms.parts.credit import charge_kl
from megatron_rl.algorithms.parts.objective import ClippedObjective
from megatron_rl.config import ClippedConfig, Config, GroupConfig
from megatron_rl.data.pool import PoolNeed
from megatron_rl.data.stream import Stream
from megatron_rl.errors import UserError
from megatron_rl.losses.aggregate import token_weights
from megatron_rl.losses.terms import TokenTerms
from megatron_rl.rollout.collect import Collector
from megatron_rl.types import MicroBatch, Prompt, RolloutGroup, RowKind, TrainingSample


class Algorithm(ABC):
    """Every rank calls the methods in the same order with equal arguments, and gets equal results."""

    needs: frozenset[str] = frozenset()
    """Vectors of ``parts.base.NEEDS`` to fill by forward passes before the first update of a step."""
    stored_kind: RowKind | None = None
    """The kind of rows from a pool; None where there are none."""
    num_epochs: int = 1
    """Passes over the rows of a step."""

    def __init__(self, config: Config) -> None:
        self.config = config

    def mini_batches(self, samples: Sequence[TrainingSample]) -> list[list[int]]:
        """Return the row indices of each optimizer mini-batch: here all rows are one."""
        return [list(range(len(samples)))]

    def updates(self, samples: Sequence[TrainingSample]) -> list[list[int]]:
        """Return the mini-batches that are trained on."""
        return self.mini_batches(samples)

    def passes_ahead(self, samples: Sequence[TrainingSample]) -> list[list[int]]:
        """Return the row indices of each forward pass that fills ``old_log_probs`` before the first update."""
        return self.mini_batches(samples)

    def mask_rows(self, samples: Sequence[TrainingSample]) -> None:
        """Set the ``loss_mask`` of rows whose tokens are chosen by the vectors filled; here all tokens count."""

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
        """Return per-token loss terms of one micro-batch.

        Args:
            log_probs: [T] float32, with gradient; 0.0 outside ``response_mask``.
            entropy: [T] float32, with gradient; 0.0 outside ``response_mask``.
            batch: ids, masks and the samples' vectors.
        """

    def state(self) -> dict[str, Tensor]:
        """Return what a checkpoint must keep of the algorithm; most methods keep nothing."""
        return {}

    def load_state(self, state: Mapping[str, Tensor]) -> None:
        """Go on where ``state`` was taken."""


class OnlineAlgorithm(Algorithm):
    """An algorithm that learns from its own rollouts, made of parts."""

    def __init__(
        self,
        config: Config,
        *,
        rollouts: Rollouts,
        selection: TokenSelection,
        credit: Credit,
        objective: Objective | None = None,
        correction: Correction | None = None,
        stored: StoredRows | None = None,
    ) -> None:
        """Put the parts together.

        Args:
            config: of the run; its section ``algorithm`` is a ``ClippedConfig``.
            rollouts: collects groups and makes rows of them.
            selection: chooses the tokens that enter the loss.
            credit: gives each token its advantage.
            objective: None takes the clipped ratio (PPO), with KL where it is asked for.
            correction: None takes that of ``algorithm.correction``.
            stored: rows from a pool, beside the rollouts.

        Raises:
            UserError: two of the parts do not go together.
        """
        super().__init__(config)
        settings = config.algorithm
        assert isinstance(settings, ClippedConfig)
        self.num_epochs = settings.num_epochs
        self.rollouts, self.selection, self.credit, self.stored = rollouts, selection, credit, stored
        self.objective = objective or ClippedObjective(settings)
        self.correction = correction or TruncatedRatio.of(settings.correction)
        self.stored_kind = None if stored is None else stored.kind
        self.kl_in_reward = settings.kl.coef if settings.kl.placement == "reward" else 0.0
        self._check_parts()
        self.needed_ahead = type(self).needs.union(*(part.needs for _, part in self._parts()))
        """Vectors that a part reads before the first update, so that this update's own pass comes too late for them."""
        if self.kl_in_reward > 0 or (stored is not None and stored.takes_selection and selection.is_on):
            self.needed_ahead |= {"old_log_probs"}  # also where the engine's are known: rows of a pool have none
        self.needs = self.needed_ahead | {"old_log_probs"}
        self.objective.has_reference = "ref_log_probs" in self.needs

    def _check_parts(self) -> None:
        stored = self.stored
        if stored is None:
            return
        assert stored.kind not in (RowKind.RL, RowKind.EDGE), "stored rows have a kind of their own"
        clash: Part | None = None if self.rollouts.takes_stored else self.rollouts
        if stored.shares_loss and not self.credit.takes_replays:
            clash = self.credit
        if clash is not None:
            raise UserError(
                "algorithm.name",
                self.config.algorithm.name,
                f"puts {type(stored).__name__} beside {type(clash).__name__}, which has no use for rows from a pool",
                "leave one of the two parts out of the method",
            )

    # ---- rollouts and rows

    def collect(self, prompts: Stream[Prompt], collector: Collector, step: int) -> list[RolloutGroup]:
        """Collect the groups of one step."""
        return self.rollouts.collect(prompts, collector, step)

    @property
    def pool_need(self) -> PoolNeed | None:
        """The pool to open before the first step; None where nothing is stored."""
        return None if self.stored is None else self.stored.pool_need

    def samples(self, groups: Sequence[RolloutGroup], step: int) -> list[TrainingSample]:
        """Return the rows to train on: each update's rollouts, followed by its stored rows."""
        rows = self.rollouts.rows(groups, step)
        return rows if self.stored is None else self.stored.add(rows, groups, step)

    def use_tokenizer(self, tokenizer: Any) -> None:
        """Hand over the tokenizer, once, before the first step; for methods that look at what tokens say."""
        self.rollouts.use_tokenizer(tokenizer)

    # ---- updates

    def mini_batches(self, samples: Sequence[TrainingSample]) -> list[list[int]]:
        """Return the row indices of each optimizer mini-batch.

        Each has ``policy.train_global_batch_size`` consecutive rollouts, so that groups stay together where sizes allow, and
        the stored rows that follow them.

        Raises:
            UserError: rows of one ``unit`` would be in two of them.
        """
        size, num_rollouts = self.config.policy.train_global_batch_size, 0
        batches: list[list[int]] = []
        batch_of: dict[int, int] = {}
        for row, sample in enumerate(samples):
            if sample.kind is not self.stored_kind:
                if num_rollouts % size == 0:
                    batches.append([])
                num_rollouts += 1
            batches[-1].append(row)
            if sample.unit is not None and batch_of.setdefault(sample.unit, len(batches)) != len(batches):
                raise UserError(
                    "policy.train_global_batch_size",
                    size,
                    "would split rows that are one unit, such as a pair, over two updates",
                    "use a multiple of the rows of a unit",
                )
        return batches

    def updates(self, samples: Sequence[TrainingSample]) -> list[list[int]]:
        """Return the mini-batches that are trained on: one whose every token is masked has nothing to teach."""
        return [
            rows
            for rows in self.mini_batches(samples)
            if any(samples[row].loss_mask is None or samples[row].num_loss_tokens for row in rows)
        ]

    def passes_ahead(self, samples: Sequence[TrainingSample]) -> list[list[int]]:
        """Return the row indices of each forward pass that fills ``old_log_probs`` before credit is given.

        The first update brings those of its rows from its own pass, unless a part needs them, or entropies, sooner.
        """
        mini_batches = self.mini_batches(samples)
        return mini_batches if self.needed_ahead & {"old_log_probs", "entropy"} else mini_batches[1:]

    def mask_rows(self, samples: Sequence[TrainingSample]) -> None:
        """Set the ``loss_mask`` of rows whose tokens are chosen by the vectors filled."""
        left_out = None if self.stored is None or self.stored.takes_selection else self.stored.kind
        self.selection.mask_rows([sample for sample in samples if sample.kind is not left_out])

    def assign_advantages(self, samples: Sequence[TrainingSample]) -> None:
        """Set ``advantages`` of every row; the vectors in ``needs`` are filled by now."""
        self.mask_rows(samples)
        self.credit.assign(samples, self.updates(samples))
        if self.kl_in_reward > 0:
            settings = self.config.algorithm
            leave_one_out = isinstance(settings, GroupConfig) and settings.use_leave_one_out_baseline
            charge_kl(samples, self.kl_in_reward, leave_one_out=leave_one_out)

    def assign_weights(self, mini_batch: Sequence[TrainingSample]) -> None:
        """Set ``weights``; stored rows with a loss of their own have an aggregation of their own."""
        apart = self.stored.kind if self.stored is not None and not self.stored.shares_loss else None
        super().assign_weights([sample for sample in mini_batch if sample.kind is not apart])
        if self.stored is not None and apart is not None:
            self.stored.assign_weights([sample for sample in mini_batch if sample.kind is apart])
        if self.correction is not None:
            self.correction.weigh(mini_batch)

    def loss(self, log_probs: Tensor, entropy: Tensor, batch: MicroBatch) -> TokenTerms:
        """Return the objective's terms, and those of stored rows where there are some."""
        terms = self.objective(log_probs, entropy, batch)
        return terms if self.stored is None else self.stored.loss(terms, log_probs, batch)

    # ---- what surrounds a step

    def keep(self, directory: Path, groups: Sequence[RolloutGroup], tokenizer: Any, *, step: int) -> None:
        """Write what ``megatron-rl view`` shows of a step into the run's folder; called on one rank.

        Raises:
            UserError: it cannot be written.
        """
        self.rollouts.keep(directory, groups, tokenizer, step=step)

    def state(self) -> dict[str, Tensor]:
        """Return what a checkpoint must keep of the parts."""
        return {f"{name}/{key}": value for name, part in self._parts() for key, value in part.state().items()}

    def load_state(self, state: Mapping[str, Tensor]) -> None:
        """Go on where ``state`` was taken."""
        for name, part in self._parts():
            prefix = f"{name}/"
            part.load_state({k.removeprefix(prefix): value for k, value in state.items() if k.startswith(prefix)})

    def step_metrics(self) -> dict[str, float]:
        """Return metrics of the last step that only the algorithm knows."""
        return {key: value for _, part in self._parts() for key, value in part.metrics.items()}

    def _parts(self) -> list[tuple[str, Part]]:
        """Return the parts by the name under which a checkpoint keeps their state."""
        parts = {
            "rollouts": self.rollouts,
            "selection": self.selection,
            "credit": self.credit,
            "objective": self.objective,
            "correction": self.correction,
            "stored": self.stored,
        }
        return [(name, part) for name, part in parts.items() if part is not None]

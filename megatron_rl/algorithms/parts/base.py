"""Parts of a method, as the others see them. Every rank calls them in the same order, with equal arguments."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from torch import Tensor

from megatron_rl.data.pool import PoolNeed
from megatron_rl.data.stream import Stream
from megatron_rl.losses.terms import TokenTerms
from megatron_rl.rollout.collect import Collector
from megatron_rl.types import MicroBatch, Prompt, RolloutGroup, RowKind, TrainingSample

NEEDS = frozenset({"old_log_probs", "ref_log_probs", "entropy"})
"""The per-token vectors that forward passes fill (``Run.fill``)."""


class Part:
    """Part of a method: what it needs, what it logs, what a checkpoint keeps of it."""

    needs: frozenset[str] = frozenset()
    """Vectors of ``NEEDS`` that this part reads before the step's first update, or in a loss. One part asks, all may read."""

    def __init__(self) -> None:
        self.metrics: dict[str, float] = {}
        """Metrics of the last step that only this part knows."""

    def state(self) -> dict[str, Tensor]:
        """Return what a checkpoint must keep."""
        return {}

    def load_state(self, state: Mapping[str, Tensor]) -> None:
        """Go on where ``state`` was taken."""


class Rollouts(Part, ABC):
    """Collects the groups of a step, and makes rows of them."""

    takes_stored: bool = True
    """False: its rows must not be mixed with rows from a pool."""

    @abstractmethod
    def collect(self, prompts: Stream[Prompt], collector: Collector, step: int) -> list[RolloutGroup]:
        """Collect the groups of one step."""

    @abstractmethod
    def rows(self, groups: Sequence[RolloutGroup], step: int) -> list[TrainingSample]:
        """Make the rows of one step, in the order in which they are trained on."""

    def use_tokenizer(self, tokenizer: Any) -> None:
        """Take the tokenizer, once, before the first step."""

    def keep(self, directory: Path, groups: Sequence[RolloutGroup], tokenizer: Any, *, step: int) -> None:
        """Write what ``megatron-rl view`` shows of a step into the run's folder."""


class TokenSelection(Part):
    """Chooses the tokens that enter the loss, by ``loss_mask``."""

    is_on: bool = True
    """False: all tokens count."""

    def mask_of(self, rollout_log_probs: Tensor) -> Tensor | None:
        """Return the mask of a row that is made now, [R] bool; None where all tokens count, or ``mask_rows`` will tell.

        Args:
            rollout_log_probs: [R] float32, the engine's.
        """
        return None

    def mask_rows(self, samples: Sequence[TrainingSample]) -> None:
        """Set the masks that wait for the vectors in ``needs``, over all rows of a step; those are filled by now."""


class Credit(Part, ABC):
    """Gives the tokens of rows their advantages."""

    takes_replays: bool = True
    """False: rows must come with advantages, which rows from a pool do not have."""

    @abstractmethod
    def assign(self, samples: Sequence[TrainingSample], updates: Sequence[Sequence[int]]) -> None:
        """Set ``advantages`` of every row that is trained by a policy gradient.

        Args:
            samples: all rows of the step.
            updates: row indices of each optimizer mini-batch, for credit that depends on the others of an update.
        """


class Objective(Part, ABC):
    """Turns log-probs and advantages into a loss for each token."""

    has_reference: bool = False
    """True if any part asked for ``ref_log_probs``: then the objective may read them. Set by the algorithm."""

    @abstractmethod
    def __call__(self, log_probs: Tensor, entropy: Tensor, batch: MicroBatch) -> TokenTerms:
        """Return per-token terms of one micro-batch; arguments as ``Algorithm.loss``."""


class Correction(Part, ABC):
    """Weighs the tokens of rows that another policy than the trainer's sampled, be it by its numerics alone."""

    @abstractmethod
    def weigh(self, mini_batch: Sequence[TrainingSample]) -> None:
        """Multiply the ``weights`` of the rows of one update, which their aggregation has set."""


class StoredRows(Part, ABC):
    """Rows that were not sampled in this step, and join its updates."""

    kind: RowKind
    """The kind of these rows."""
    shares_loss: bool
    """True: the rollouts' objective trains these rows, under the same aggregation."""
    takes_selection: bool
    """True: ``algorithm.selection`` also masks these rows, by the policy's own probabilities."""

    @property
    def pool_need(self) -> PoolNeed | None:
        """The pool to open before the first step; None where they come from elsewhere."""
        return None

    @abstractmethod
    def add(self, rows: Sequence[TrainingSample], groups: Sequence[RolloutGroup], step: int) -> list[TrainingSample]:
        """Return the rows of a step with the stored ones among them: after the rollouts of their update."""

    def assign_weights(self, rows: Sequence[TrainingSample]) -> None:
        """Set ``weights`` of the stored rows of one mini-batch, where they have a loss of their own."""

    def loss(self, terms: TokenTerms, log_probs: Tensor, batch: MicroBatch) -> TokenTerms:
        """Return the objective's terms, with those of stored rows put in their place."""
        return terms

"""MethodConfig: what the settings of every method say of it, before torch is imported."""

from __future__ import annotations

from dataclasses import replace
from typing import ClassVar, Literal, NamedTuple, Self

from megatron_rl.config.data import DataConfig, EvalConfig
from megatron_rl.config.policy import PolicyConfig
from megatron_rl.config.rollout import RolloutConfig
from megatron_rl.config.section import section
from megatron_rl.config.trainer import TrainerConfig

Stage = Literal["rl", "sft"]
Aggregation = Literal["token-mean", "seq-mean-token-mean", "seq-mean-token-sum-norm"]


class OtherSections(NamedTuple):
    """The sections of a config that a method may have to agree with."""

    trainer: TrainerConfig
    policy: PolicyConfig
    rollout: RolloutConfig
    data: DataConfig
    eval: EvalConfig


@section
class MethodConfig:
    """Settings of a method: the section ``algorithm``. Other modules ask this class, never the method's name.

    A method from outside is a subclass of this (stage ``sft``) or of one of ours, and ``algorithm.name`` names it as
    ``package.module:ConfigClass``. It is read before torch is loaded, so its implementation is named by a path and lies in a
    module of its own.
    """

    implementation: ClassVar[str]
    """``package.module:Class`` of the ``Algorithm`` that these settings are for."""
    stage: ClassVar[Stage] = "rl"
    """The loop that runs it: ``rl`` samples rollouts, ``sft`` learns from rows that exist."""

    name: str
    """A name of ``METHODS``, or ``package.module:ConfigClass``."""
    loss_aggregation: Aggregation = "token-mean"
    """Sum over the tokens of an optimizer mini-batch: see ``losses.aggregate.token_weights``."""

    @property
    def num_rows(self) -> int | None:
        """Rows that one step samples; None where a step is one update on ``policy.train_global_batch_size`` rows."""
        return None

    num_rows_formula: ClassVar[str] = "num_prompts_per_step * num_generations_per_prompt"
    """The formula of ``num_rows``, for error messages."""

    def num_updates(self, batch_size: int) -> int:
        """Return the optimizer updates of one step.

        Args:
            batch_size: ``policy.train_global_batch_size``.
        """
        return 1

    @property
    def num_stored_rows_per_update(self) -> int:
        """Rows of an update that come from a pool, beside ``policy.train_global_batch_size`` rollouts."""
        return 0

    stored_rows_formula: ClassVar[str] = "the stored rows of an update"
    """The config key that ``num_stored_rows_per_update`` is made of, for error messages."""

    @property
    def has_uneven_groups(self) -> bool:
        """Groups may have rows more than others, so that ranks get unequal numbers of rows."""
        return False

    def stored_pools(self) -> dict[str, str]:
        """Return the pools that the method trains on: config key -> directory."""
        return {}

    def asks_policy(self, rollout: RolloutConfig) -> bool:
        """Tell whether the method asks the trainer for log-probs while rollouts are collected."""
        return False

    def check(self, others: OtherSections) -> None:
        """Check these settings against the other sections.

        Raises:
            UserError: two settings do not go together.
        """

    def scaled_down(self, num_rows: int, *, num_stored: int) -> Self:
        """Return the same method at the size that ``megatron-rl doctor layout`` runs.

        Args:
            num_rows: rows of one step, a multiple of 2.
            num_stored: rows of an update that come from a pool, where the method has some.
        """
        return replace(self)

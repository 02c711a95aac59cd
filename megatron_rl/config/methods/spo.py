"""Settings of Segment Policy Optimization (SPO, arXiv 2505.23564): chains and trees."""

from __future__ import annotations

from dataclasses import replace
from typing import ClassVar, Literal, Self

from pydantic import Field, NonNegativeInt, PositiveInt

from megatron_rl.config.methods.base import OtherSections
from megatron_rl.config.methods.shared import ClippedConfig, SelectionConfig
from megatron_rl.config.rollout import RolloutConfig
from megatron_rl.config.section import section
from megatron_rl.errors import UserError

Partition = Literal["cut_points", "tokens", "equal", "newlines"]
EdgeAdvantage = Literal["raw", "std", "leave_one_out"]
SURE_FROM = 0.9
"""SPO's threshold: the policy counts as sure of a token that it sampled with this probability or more."""


@section
class SPOSelectionConfig(SelectionConfig):
    """Tokens that enter the loss: those that the policy was not sure of."""

    max_probability: float | None = Field(default=SURE_FROM, gt=0, le=1)


@section
class PartitionConfig:
    """Rule that cuts a response into segments."""

    kind: Partition = "cut_points"
    """``cut_points``: at tokens that the policy was not sure of. ``tokens``: after every ``size`` tokens. ``equal``: into
    ``size`` segments. ``newlines``: after each line (VinePPO)."""
    size: PositiveInt | None = None
    """Size: for ``cut_points`` their number in a segment (null: 5), for ``tokens`` its length (100), for ``equal`` the number
    of segments (4)."""
    threshold: float | None = Field(default=None, gt=0, le=1)
    """Threshold of ``cut_points``: a token sampled with a probability below this is one; null: 0.9."""

    @property
    def cut_threshold(self) -> float:
        """Probability below which a token is a cut point."""
        return self.threshold or SURE_FROM

    @property
    def segment_size(self) -> int:
        """Resolve ``size``: the default of the kind where it is null."""
        return self.size or {"cut_points": 5, "tokens": 100, "equal": 4, "newlines": 1}[self.kind]

    def __post_init__(self) -> None:
        if self.size is not None and self.kind == "newlines":
            raise UserError(
                "algorithm.partition.size", self.size, "says nothing where each line is a segment", "leave it out"
            )
        if self.threshold is not None and self.kind != "cut_points":
            raise UserError(
                "algorithm.partition.threshold",
                self.threshold,
                f"is for cut_points; algorithm.partition.kind is {self.kind}",
                "leave it out, or set algorithm.partition.kind=cut_points",
            )


@section
class SegmentConfig(ClippedConfig):
    """Settings of both forms of SPO.

    KL is off. The released code has it on, but its 1e-4 multiplies k3 summed over the loss tokens of a response, where
    ``kl.coef`` multiplies their mean: the same strength is 1e-4 times the loss tokens of a response, 0.003 for thirty.
    """

    selection: SPOSelectionConfig = Field(default_factory=SPOSelectionConfig)
    whitening: Literal["none", "std", "mean_std"] = "mean_std"
    """Whitening of advantages over the loss tokens of an optimizer mini-batch: divide by their standard deviation, after
    subtracting their mean (``mean_std``). The released code does both, over each micro-batch."""
    save_every_n_steps: NonNegativeInt = 0
    """Keep the trees or chains of every n-th step in <run>/trees/, for ``megatron-rl view``; 0 never does."""

    @property
    def sure_from(self) -> float:
        """Probability from which on the policy counts as sure of a token."""
        return self.selection.max_probability or SURE_FROM

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.kl.coef > 0 and self.kl.placement == "reward":
            raise UserError(
                "algorithm.kl.placement",
                "reward",
                "would have to be part of the value of every segment",
                "use algorithm.kl.placement=loss with estimator k2 or k3",
            )

    def check(self, others: OtherSections) -> None:
        """Check that every branch is awaited."""
        super().check(others)
        if others.rollout.over_sampling > 1:
            raise UserError(
                "rollout.over_sampling",
                others.rollout.over_sampling,
                f"is for methods with independent rollouts; {self.name} needs every branch",
                "set it to 1",
            )


@section
class SPOChainConfig(SegmentConfig):
    """SPO-chain (arXiv 2505.23564): the value of each segment border by further rollouts from there."""

    implementation: ClassVar[str] = "megatron_rl.algorithms.spo_chain:SPOChain"
    name: str = "spo_chain"
    num_epochs: PositiveInt = 2
    num_generations_per_prompt: PositiveInt = 8
    partition: PartitionConfig = Field(default_factory=PartitionConfig)
    num_continuations: PositiveInt = 9
    """N: rollouts from each border. Equal borders of one prompt share them."""

    @property
    def sure_from(self) -> float:
        """Probability from which on the policy counts as sure of a token."""
        return self.selection.max_probability or self.partition.cut_threshold

    @property
    def num_rows(self) -> int:
        """Rollouts of one step."""
        return self.num_prompts_per_step * self.num_generations_per_prompt

    def asks_policy(self, rollout: RolloutConfig) -> bool:
        """Tell whether cut points or mask need the trainer's probabilities while rollouts are collected."""
        uses = self.selection.max_probability is not None or self.partition.kind == "cut_points"
        return uses and self.selection.probabilities_from(rollout) == "policy"

    def check(self, others: OtherSections) -> None:
        """Check that the trainer can be asked in the middle of the rollouts, where it must be."""
        if self.asks_policy(others.rollout) and others.rollout.is_colocated:
            raise UserError(
                "algorithm.selection.probabilities",
                self.selection.probabilities,
                "asks the trainer in the middle of the rollouts, while colocated servers have the memory",
                "set it to rollout (our servers tell whole-distribution log-probs under top_p and top_k, too), or use "
                "rollout.servers.placement=separate",
            )
        if self.asks_policy(others.rollout) and others.policy.router_replay:
            raise UserError(
                "algorithm.selection.probabilities",
                self.selection.probabilities,
                "asks the trainer before the experts chosen at rollout are known to it (policy.router_replay)",
                "set it to rollout, or leave router_replay out",
            )
        super().check(others)

    def scaled_down(self, num_rows: int, *, num_stored: int) -> Self:
        """Return the same method with two rollouts of each prompt."""
        return replace(self, num_prompts_per_step=num_rows // 2, num_generations_per_prompt=2)


@section
class SPOTreeConfig(SegmentConfig):
    """SPO-tree (arXiv 2505.23564): a tree of rollouts for each prompt, whose edges are what is trained on."""

    implementation: ClassVar[str] = "megatron_rl.algorithms.spo_tree:SPOTree"
    name: str = "spo_tree"
    num_prompts_per_step: PositiveInt = 16
    branch_factors: list[PositiveInt] = Field(default_factory=lambda: [6, 6, 6])
    """Children of each node, level by level."""
    tokens_per_level: PositiveInt = 100
    """Length of a segment; those of the last level go on to the end."""
    advantage: EdgeAdvantage = "raw"
    """``raw``: value less the parent's. ``std``: over the siblings' standard deviation (that of all of them, N not N - 1).
    ``leave_one_out``: less the other siblings' mean."""
    num_edges_per_step: PositiveInt = 512
    """Rows of a step at most: edges of this step's trees and of those before."""
    max_edges_per_tree: PositiveInt = 32
    """The limit for edges of one prompt's tree among them."""
    edge_lifetime_steps: PositiveInt = 8
    """An edge that was not trained on within so many steps, that of its tree included, is forgotten."""
    max_waiting_edges_per_step: PositiveInt | None = None
    """Limit on the edges of one step's trees that wait for later steps, chosen at random; null keeps all that have an
    advantage. Each costs a forward pass in its own step."""

    num_rows_formula: ClassVar[str] = "algorithm.num_edges_per_step"

    @property
    def num_rows(self) -> int:
        """Edges of one step, at most."""
        return self.num_edges_per_step

    def __post_init__(self) -> None:
        super().__post_init__()
        if not self.branch_factors or max(self.branch_factors) < 2:
            raise UserError(
                "algorithm.branch_factors",
                self.branch_factors,
                "must branch somewhere: only siblings can be compared",
                "use [6, 6, 6] or [4, 4]",
            )

    def check(self, others: OtherSections) -> None:
        """Check what the edges of earlier steps can carry."""
        super().check(others)
        if others.policy.router_replay and self.edge_lifetime_steps > 1:
            raise UserError(
                "policy.router_replay",
                True,
                "is not kept with the edges of earlier steps",
                "set algorithm.edge_lifetime_steps=1, or leave router_replay out",
            )

    def scaled_down(self, num_rows: int, *, num_stored: int) -> Self:
        """Return the same method with few edges a step."""
        return replace(self, num_edges_per_step=num_rows)

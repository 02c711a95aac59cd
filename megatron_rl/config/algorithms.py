"""One section per algorithm; ``algorithm.name`` picks the class that owns the rest.

These classes stand here and not in ``algorithms/<name>.py`` because a config is checked before torch is imported, and an
algorithm cannot be imported without torch. Defaults are the vetted setting of the method's paper.
"""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import Field, NonNegativeFloat, NonNegativeInt, PositiveFloat, PositiveInt

from megatron_rl.config.section import section
from megatron_rl.errors import UserError

Aggregation = Literal["token-mean", "seq-mean-token-mean", "seq-mean-token-sum-norm"]
Partition = Literal["cut_points", "tokens", "equal", "newlines"]
EdgeAdvantage = Literal["raw", "std", "leave_one_out"]
SURE_FROM = 0.9
"""SPO's threshold: a token sampled with a probability from here on is one that the policy was sure of."""
Divergence = Literal["forward_kl", "js", "js_definition", "alpha", "reverse_kl", "likelihood"]


@section
class KLConfig:
    """KL to the frozen reference, the policy that the run started from. Off at ``coef: 0`` (no reference is kept then)."""

    coef: NonNegativeFloat = 0.0
    placement: Literal["loss", "reward"] = "loss"
    """``reward`` subtracts coef * (k1 summed over the response) from the rollout's reward, before the group baseline; its
    policy gradient is that of KL(policy || reference)."""
    estimator: Literal["k1", "k2", "k3"] = "k3"
    """As a loss, k1 has zero expected gradient, k2 the reverse KL's, k3 the *forward* KL's. In the reward only k1 is right."""

    def __post_init__(self) -> None:
        if self.coef > 0 and self.placement == "reward" and self.estimator != "k1":
            raise UserError(
                "algorithm.kl.estimator",
                self.estimator,
                "KL in the reward is defined for k1 only",
                "set algorithm.kl.estimator=k1, or algorithm.kl.placement=loss",
            )
        if self.coef > 0 and self.placement == "loss" and self.estimator == "k1":
            raise UserError(
                "algorithm.kl.estimator",
                self.estimator,
                "k1 added to the loss has no gradient in expectation",
                "use k2 (reverse KL), k3 (forward KL), or algorithm.kl.placement=reward",
            )


@section
class OverlongConfig:
    """Soft penalty for long responses (DAPO, arXiv 2503.14476, eq. 13): linear from 0 to ``-penalty`` over the last
    ``buffer`` tokens before ``rollout.max_new_tokens``. Off at ``buffer: 0``."""

    buffer: NonNegativeInt = 0
    penalty: NonNegativeFloat = 1.0


@section
class ClippedConfig:
    """What every method with a clipped ratio has."""

    num_prompts_per_step: PositiveInt = 64
    num_epochs: PositiveInt = 1
    """Passes over each rollout batch. Updates per step = epochs * rows / policy.train_global_batch_size."""
    ratio_clip_min: PositiveFloat = 0.2
    """Ratios below 1 - ratio_clip_min are clipped."""
    ratio_clip_max: PositiveFloat = 0.2
    """Ratios above 1 + ratio_clip_max are clipped; 0.28 is DAPO's clip-higher."""
    ratio_clip_c: float | None = None
    """Dual clip: for negative advantages the loss is at most -c * advantage. 3 and 10 are common; null is off."""
    loss_aggregation: Aggregation = "token-mean"
    kl: KLConfig = Field(default_factory=KLConfig)
    overlong: OverlongConfig = Field(default_factory=OverlongConfig)

    @property
    def num_stored_rows_per_update(self) -> int:
        """Rows of an update that come from a pool, beside ``policy.train_global_batch_size`` rollouts."""
        return 0

    def __post_init__(self) -> None:
        if self.ratio_clip_min >= 1:
            raise UserError(
                "algorithm.ratio_clip_min",
                self.ratio_clip_min,
                "1 - ratio_clip_min must stay above 0",
                "0.2 is common",
            )
        if self.ratio_clip_c is not None and self.ratio_clip_c <= 1 + self.ratio_clip_max:
            raise UserError(
                "algorithm.ratio_clip_c",
                self.ratio_clip_c,
                "must exceed 1 + ratio_clip_max, else it cuts the ordinary range",
                "use 3 or 10, or null to switch dual clip off",
            )


@section
class GroupConfig(ClippedConfig):
    """What every method with groups of rollouts has."""

    num_generations_per_prompt: PositiveInt = 8
    normalize_rewards: bool = True
    """Divide the advantage by the group's unbiased standard deviation (+1e-6). Dr. GRPO: false."""
    use_leave_one_out_baseline: bool = False
    """RLOO: the baseline of a rollout is the mean of the others."""
    use_dynamic_sampling: bool = False
    """DAPO: groups whose rewards are all equal are thrown away and replaced by those of further prompts."""
    max_generation_batches: PositiveInt = 10
    """Bound on the generation rounds of one step under dynamic sampling; reaching it with too few groups is an error."""

    @property
    def num_rows(self) -> int:
        """Rollouts of one step."""
        return self.num_prompts_per_step * self.num_generations_per_prompt

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.num_generations_per_prompt < 2:
            raise UserError(
                "algorithm.num_generations_per_prompt",
                self.num_generations_per_prompt,
                "a group needs at least 2 rollouts to have a baseline",
                "use 2 or more; 8 and 16 are common",
            )


@section
class MaskConfig:
    """Which tokens enter the loss, by the probability that they were sampled with."""

    mask_threshold: float | None = Field(default=None, gt=0, le=1)
    """Only tokens with a probability below this do (SPO's mask, 0.9 there); null: all."""
    probabilities: Literal["auto", "rollout", "policy"] = "auto"
    """Whose probabilities decide, on SPO's cut points as well. ``rollout``: what the engine said, at the sampling temperature.
    ``policy``: a pass of the trainer. ``auto``: ``policy`` where top_p or top_k cut the distribution off, else ``rollout``."""

    def probabilities_from(self, *, top_p: float, top_k: int) -> Literal["rollout", "policy"]:
        """``probabilities``, with ``auto`` made out."""
        if self.probabilities != "auto":
            return self.probabilities
        return "policy" if top_p < 1 or top_k > 0 else "rollout"

    @property
    def uses_probabilities(self) -> bool:
        """Whether they decide anything."""
        return self.mask_threshold is not None


@section
class GRPOConfig(MaskConfig, GroupConfig):
    """GRPO (arXiv 2402.03300) and what its users vary: DAPO, Dr. GRPO and RLOO are settings of it."""

    name: Literal["grpo"] = "grpo"


@section
class RehearsalConfig:
    """DPH-RL's divergence to the start, on samples of the start's own (``megatron-rl presample`` makes the pool)."""

    pool: str
    """Directory of the pool: the policy's initial model sampled it, and gave each token's log-prob."""
    divergence: Divergence = "js"
    """f of the term. ``forward_kl`` always pulls a forgotten behaviour back; ``js``, ``alpha`` and ``reverse_kl`` let go of one
    that is nearly forgotten. ``js_definition`` also acts on rollouts, and keeps the initial weights for it."""
    alpha: float = Field(default=0.2, gt=0, lt=1)
    """Of ``alpha``: near 0 reverse, near 1 forward KL."""
    coef: NonNegativeFloat = 0.2
    """The eta of loss = L_rollouts + eta L_rehearsal. For the same local strength js needs twice that of the KLs."""
    num_rows_per_update: PositiveInt = 128
    """Stored rows beside the policy.train_global_batch_size rollouts of each update."""


@section
class DPHRLConfig(GroupConfig):
    """DPH-RL (arXiv 2509.07430): GRPO on what the start does not solve yet, rehearsal of what it solves."""

    name: Literal["dph_rl"] = "dph_rl"
    num_prompts_per_step: PositiveInt = 128
    num_generations_per_prompt: PositiveInt = 16
    ratio_clip_max: PositiveFloat = 0.28
    ratio_clip_c: float | None = 3.0
    rehearsal: RehearsalConfig

    @property
    def num_stored_rows_per_update(self) -> int:
        """See ``GroupConfig``."""
        return self.rehearsal.num_rows_per_update


@section
class ReplayConfig:
    """RLEP's verified successes of each question, put among its fresh rollouts."""

    source: Literal["pool", "online"] = "pool"
    """``pool``: of an earlier, trained policy. ``online``: those that this run itself has found in earlier steps."""
    pool: str | None = None
    """Directory of the pool (``megatron-rl presample`` with presample.purpose replay), where that is the source."""
    num_per_prompt: PositiveInt = 2
    """M; a question with fewer successes gets fewer."""
    max_stored_per_prompt: PositiveInt = 8
    """Of ``online``: the newest so many are kept."""

    def __post_init__(self) -> None:
        if (self.source == "pool") != (self.pool is not None):
            raise UserError(
                "algorithm.replay.pool",
                self.pool,
                "is given exactly when algorithm.replay.source is pool",
                "name the directory of a pool, or set algorithm.replay.source=online",
            )


@section
class RLEPConfig(GroupConfig):
    """RLEP (arXiv 2507.07451): groups of fresh rollouts and replayed successes, judged together."""

    name: Literal["rlep"] = "rlep"
    num_prompts_per_step: PositiveInt = 512
    num_generations_per_prompt: PositiveInt = 16
    ratio_clip_max: PositiveFloat = 0.28
    ratio_clip_c: float | None = 10.0
    replay: ReplayConfig

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.kl.coef > 0:
            raise UserError(
                "algorithm.kl.coef",
                self.kl.coef,
                "estimates KL from the policy's own samples, which replays are not",
                "set it to 0 under rlep",
            )
        if self.use_dynamic_sampling:
            raise UserError(
                "algorithm.use_dynamic_sampling",
                True,
                "would throw groups without a success away before their replays come",
                "leave it off under rlep",
            )


@section
class PartitionConfig:
    """Where the segments of a response begin."""

    kind: Partition = "cut_points"
    """``cut_points``: at tokens that the policy was not sure of. ``tokens``: every so many. ``equal``: so many segments.
    ``newlines``: after each line (VinePPO)."""
    size: PositiveInt | None = None
    """Of ``cut_points``: how many a segment has (null: 5). Of ``tokens``: its length (100). Of ``equal``: segments (4)."""
    threshold: float | None = Field(default=None, gt=0, le=1)
    """Of ``cut_points``: a token sampled with a probability below this is one; null: 0.9."""

    @property
    def cut_threshold(self) -> float:
        """``threshold``, with null made out."""
        return self.threshold or SURE_FROM

    @property
    def segment_size(self) -> int:
        """``size``, with null made out."""
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
class SegmentConfig(MaskConfig, ClippedConfig):
    """What both forms of SPO have."""

    mask_threshold: float | None = Field(default=SURE_FROM, gt=0, le=1)
    kl: KLConfig = Field(default_factory=lambda: KLConfig(coef=1e-4))
    whitening: Literal["none", "std", "mean_std"] = "mean_std"
    """Of the advantages, over the tokens of an optimizer mini-batch that enter the loss: divide by their standard deviation,
    and subtract their mean first. The released code does both, over each micro-batch."""
    save_every_n_steps: NonNegativeInt = 0
    """Keep the trees or chains of every n-th step in <run>/trees/, for ``megatron-rl tree``; 0 never does."""

    @property
    def sure_from(self) -> float:
        """Probability of a token from which on the policy counts as sure of it."""
        return self.mask_threshold or SURE_FROM

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.kl.coef > 0 and self.kl.placement == "reward":
            raise UserError(
                "algorithm.kl.placement",
                "reward",
                "would have to be part of the value of every segment",
                "use algorithm.kl.placement=loss with estimator k2 or k3",
            )


@section
class SPOChainConfig(SegmentConfig):
    """SPO-chain (arXiv 2505.23564): the value of each segment border by further rollouts from there."""

    name: Literal["spo_chain"] = "spo_chain"
    num_epochs: PositiveInt = 2
    num_generations_per_prompt: PositiveInt = 8
    partition: PartitionConfig = Field(default_factory=PartitionConfig)
    num_continuations: PositiveInt = 9
    """N: rollouts from each border. Equal borders of one prompt share them."""

    @property
    def uses_probabilities(self) -> bool:
        """See ``MaskConfig``: cut points are chosen by them as well."""
        return super().uses_probabilities or self.partition.kind == "cut_points"

    @property
    def sure_from(self) -> float:
        """See ``SegmentConfig``."""
        return self.mask_threshold or self.partition.cut_threshold

    @property
    def num_rows(self) -> int:
        """Rollouts of one step."""
        return self.num_prompts_per_step * self.num_generations_per_prompt


@section
class SPOTreeConfig(SegmentConfig):
    """SPO-tree (arXiv 2505.23564): a tree of rollouts for each prompt, whose edges are what is trained on."""

    name: Literal["spo_tree"] = "spo_tree"
    num_prompts_per_step: PositiveInt = 16
    branch_factors: list[PositiveInt] = Field(default_factory=lambda: [6, 6, 6])
    """Children of each node, level by level."""
    tokens_per_level: PositiveInt = 100
    """Length of a segment; those of the last level go on to the end."""
    advantage: EdgeAdvantage = "raw"
    """``raw``: value less the parent's. ``std``: over the siblings' standard deviation. ``leave_one_out``: less the other
    siblings' mean."""
    num_edges_per_step: PositiveInt = 512
    """Rows of a step at most: edges of this step's trees and of those before."""
    max_edges_per_tree: PositiveInt = 32
    """Of these, of one prompt's tree."""
    edge_lifetime_steps: PositiveInt = 8
    """An edge that was not trained on within so many steps, that of its tree included, is forgotten."""
    max_waiting_edges_per_step: PositiveInt | None = None
    """Of one step's trees so many wait for later steps at most, chosen at random; null: all that are worth something. Each
    costs a forward pass in its own step."""

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


@section
class SFTConfig:
    """Supervised next-token training on the worked solutions of the task: warm start, and later mid-training."""

    name: Literal["sft"] = "sft"
    loss_aggregation: Aggregation = "token-mean"

    @property
    def num_rows(self) -> None:
        """One step is one optimizer update on policy.train_global_batch_size rows."""
        return None

    @property
    def num_stored_rows_per_update(self) -> int:
        """There are no others."""
        return 0


AlgorithmConfig = Annotated[
    GRPOConfig | DPHRLConfig | RLEPConfig | SPOChainConfig | SPOTreeConfig | SFTConfig, Field(discriminator="name")
]

STAGE_OF_ALGORITHM: dict[str, Literal["rl", "sft"]] = {
    "grpo": "rl", "dph_rl": "rl", "rlep": "rl", "spo_chain": "rl", "spo_tree": "rl", "sft": "sft",
}  # fmt: skip

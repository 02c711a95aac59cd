"""The data that flows through a run, in the order in which it appears. Fields, shapes and units; no behaviour.

    Problem -> Prompt -> Request -> Completion -> Rollout -> RolloutGroup -> TrainingSample -> MicroBatch
    (task)     (ids)     (engine)   (engine)      (scored)   (G of one prompt) (one row)         (one forward)

Letters: P prompts, G rollouts per prompt, R response tokens, L = prompt + response tokens, T packed tokens, N sequences
in a pack, V vocabulary, H hidden.
"""

from __future__ import annotations

import enum
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, Literal

if TYPE_CHECKING:  # annotations only: scoring workers and the command line read these types without paying for torch
    import torch
    from torch import Tensor

FinishReason = Literal["stop", "length", "abort"]
FINISH_REASONS: tuple[FinishReason, ...] = ("stop", "length", "abort")
"""All finish reasons; flat tensors hold their indices."""


class RowKind(enum.IntEnum):
    """Origin of a training row. An integer, so that a row's kind travels in a flat tensor."""

    RL = 0
    SFT = 1
    REHEARSAL = 2
    REPLAY = 3
    EDGE = 4


POLICY_GRADIENT_KINDS = frozenset({RowKind.RL, RowKind.REPLAY, RowKind.EDGE})
"""Kinds trained with a policy-gradient loss: rows with an advantage and a ratio. Not all were sampled by the current policy:
replays come from an earlier run, edges from an earlier step's tree. The ratio's denominator is the policy at the start of the
step, or, for tree edges, of the step that sampled them."""


@dataclass(frozen=True)
class Problem:
    """One item of a task, as text."""

    problem_id: str
    """Stable over runs and files: equal problems have equal ids."""
    prompt: str
    """Text that the model reads, template applied."""
    answer: str
    """Reference answer, in the form that ``Task.score`` expects."""
    solution: str | None = None
    """Worked demonstration (for the supervised stage); None where the data has none."""
    source: str = ""
    """``file:line``, for error messages."""
    task: str = ""
    """The name in the config under which its task was found: the scoring workers find the task by it."""
    question: str = ""
    """The problem without the template; "" where a task does not set it."""
    metadata: dict[str, Any] = field(default_factory=dict, hash=False)
    """JSON values: what else the data row holds and the task keeps, for its ``score`` or for ``data.reward``."""
    messages: tuple[dict[str, Any], ...] | None = field(default=None, hash=False)
    """Chat messages that are the prompt, in place of ``prompt``."""
    tools: list[Any] | None = field(default=None, hash=False)
    """Descriptions of tools, for the chat template."""


@dataclass(frozen=True)
class Prompt:
    """A problem with its token ids."""

    problem: Problem
    prompt_ids: Tensor
    """[*] int64."""


@dataclass(frozen=True)
class Score:
    """A verifier's verdict on one response."""

    reward: float
    parts: dict[str, float] = field(default_factory=dict)
    """Named parts of the reward (``correct``, ``format``, ...), logged as ``reward/<part>``."""
    reason: str = ""
    """A few words for pages and reports: ``correct``, ``wrong``, ``no answer``, ``cut``, ``timeout``, ``crash: ...``."""
    is_failure: bool = False
    """True where the scorer failed (timeout, crash): counted as ``dropped/score_<reason>``; the row gets no advantage."""
    answer: str = ""
    """The final answer found in the response, normalised: equal answers are equal strings. Of bounded length, say 64
    characters, since a broken model may write 5,000 digits. ``""`` where there is none, or where the task extracts none."""
    style: str = ""
    """Name of the response's surface style, of a few that the task can tell apart; ``""`` where it cannot."""


@dataclass(frozen=True)
class Request:
    """One sequence to generate."""

    prompt_ids: Tensor
    """[*] int64."""
    max_new_tokens: int
    temperature: float
    """0 means greedy: allowed in evaluation, refused in training."""
    top_p: float = 1.0
    top_k: int = 0
    """0 keeps the whole vocabulary."""
    record_experts: bool = False
    """Ask for the experts that were chosen (in a model of experts)."""
    seed: int = 0
    """Sampling is a function of (weights, prompt, seed): no generator state has to survive a restart."""


@dataclass(frozen=True)
class Completion:
    """The engine's answer to one request."""

    response_ids: Tensor
    """[R] int32, the end-of-sequence token included where it was sampled."""
    log_probs: Tensor
    """[R] float32: log p of each sampled token, at the sampling temperature."""
    finish_reason: FinishReason
    weight_version: int
    """Publish counter of the weights that sampled it."""
    experts: Tensor | None = None
    """[P + R - 1, layers, k] int16: experts chosen at each position that was computed; None where it was not asked for."""


@dataclass(frozen=True)
class SegmentStart:
    """The start of a segment within a response, and its value under the policy."""

    num_tokens: int
    """Response tokens before it; 0 is the bare prompt."""
    value: float | None
    """Mean reward of rollouts that continue from it (Monte Carlo); None where none of them could be judged."""


@dataclass(frozen=True)
class Rollout:
    """One scored episode."""

    completion: Completion
    score: Score
    states: tuple[SegmentStart, ...] = ()
    """Starts of its segments, in order; for methods that have segments."""
    policy_log_probs: Tensor | None = None
    """[R] float32: the trainer's own log p of each token at sampling time, where a method asked for them while it collected."""


@dataclass
class TreeNode:
    """A piece of text in a tree of rollouts, with the pieces that follow it."""

    completion: Completion | None
    """The piece; None at the root, which is the prompt."""
    children: list[TreeNode]
    score: Score | None = None
    """Score of a leaf: of the whole path to it."""
    value: float | None = None
    """Reward of a leaf, mean of the children's values of an inner node; None where nothing below could be judged."""


@dataclass(frozen=True)
class RolloutGroup:
    """The rollouts of one prompt: G of them, or one for each leaf of a tree."""

    prompt: Prompt
    rollouts: list[Rollout]
    tree: TreeNode | None = None


@dataclass
class TrainingSample:
    """One row: a prompt, its response, and vectors over the response tokens.

    Vectors over the response are [R] float32; ``Run.fill`` and ``assign_advantages`` fill what is None here.
    """

    prompt_ids: Tensor
    """[*] int64."""
    response_ids: Tensor
    """[R] int32; int64 where they come from a file. A micro-batch has int64."""
    kind: RowKind
    reward: float = 0.0
    has_reward: bool = True
    """False where the scorer failed: such a row gets no advantage and is left out of its group's baseline."""
    group_index: int = -1
    """Index of the row's group in the batch; -1 outside any group."""
    finish_reason: FinishReason = "stop"
    weight_version: int = 0
    rollout_log_probs: Tensor | None = None
    experts: Tensor | None = None
    """[P + R - 1, layers, k] int16: experts that training repeats (routing replay)."""
    old_log_probs: Tensor | None = None
    ref_log_probs: Tensor | None = None
    entropy: Tensor | None = None
    """Exact entropy of the policy at each response token, nats; for methods that choose tokens by it."""
    advantages: Tensor | None = None
    weights: Tensor | None = None
    """[R] float32: the factor of each token's loss term. Every aggregation is such a factor (losses/aggregate.py)."""
    loss_mask: Tensor | None = None
    """[R] bool: the tokens that enter the loss; None: all."""
    unit: int | None = None
    """Rows of a mini-batch with the same number go into one micro-batch, such as both responses of a preference pair."""
    extra: dict[str, Tensor] = field(default_factory=dict)
    """A method's own vectors, [R] float32; in a micro-batch they are in ``vectors`` under the same names."""

    @property
    def num_tokens(self) -> int:
        """Prompt and response."""
        return len(self.prompt_ids) + len(self.response_ids)

    @property
    def num_response_tokens(self) -> int:
        """R."""
        return len(self.response_ids)

    @property
    def num_loss_tokens(self) -> int:
        """Response tokens that enter the loss."""
        return self.num_response_tokens if self.loss_mask is None else int(self.loss_mask.sum())


@dataclass
class MicroBatch:
    """One forward's tokens, packed end to end (THD); made by ``data/pack.py`` only.

    Token vectors are [T]; under context parallelism T counts the tokens that this rank holds, in its own order.
    ``labels[t]`` is the token after ``input_ids[t]``; where there is none (last token of a sequence, padding) it is 0 and
    both masks are False. Vectors over tokens are 0.0 outside ``response_mask``.
    """

    input_ids: Tensor
    """[T] int64."""
    labels: Tensor
    """[T] int64."""
    position_ids: Tensor
    """[T] int64, from 0 in each sequence."""
    cu_seqlens: Tensor
    """[N + 1] int32 sequence borders in the whole pack; tail padding, where there is any, is the last sequence."""
    max_seqlen: int
    response_mask: Tensor
    """[T] bool: the label is a generated or target token."""
    loss_mask: Tensor
    """[T] bool: the label enters the loss."""
    rows: list[int]
    """Indices of the packed samples in the mini-batch, in packing order."""
    token_indices: Tensor
    """[T] int64: place of each token in the whole pack."""
    sequence: Tensor
    """[T] int64: the token's place in ``rows``; -1 on padding."""
    lengths: Tensor
    """[N] int64: tokens of each of ``rows``, over all context-parallel ranks."""
    kind: Tensor
    """[T] int64: ``RowKind`` of the token's row; -1 on padding."""
    vectors: dict[str, Tensor] = field(default_factory=dict)
    """``weights``, ``advantages``, ``old_log_probs``, ... and those of the samples' ``extra``, each [T] float32."""
    experts: Tensor | None = None
    """[T, layers, k] int16: experts to choose; -1 where the router chooses. None: it always chooses."""
    sum_over_cp: Callable[[Tensor], Tensor] | None = None
    """Adds up a tensor over the context-parallel ranks, with gradients. None: this rank holds all tokens of the pack."""

    def sequence_sum(self, x: Tensor) -> Tensor:
        """Return [N] sums over the tokens of each of ``rows``, the same on every context-parallel rank; differentiable.

        For losses that are not sums of token terms, such as a ratio of whole sequences. The loss itself stays one term per
        token (``to_tokens`` leads back): each rank adds up the terms of its own tokens.

        Args:
            x: [T] values of this rank's tokens; padding is left out. Summed in float64, returned in the dtype of ``x``.
        """
        wide = x.double().masked_fill(self.sequence < 0, 0.0)
        sums = wide.new_zeros(len(self.rows)).index_add(0, self.sequence.clamp(min=0), wide)
        return (sums if self.sum_over_cp is None else self.sum_over_cp(sums)).to(x.dtype)

    def to_tokens(self, y: Tensor) -> Tensor:
        """Return [T] the value of each token's sequence, from [N] values; 0 on padding."""
        return y[self.sequence.clamp(min=0)].masked_fill(self.sequence < 0, 0.0)

    def to(self, device: torch.device) -> MicroBatch:
        """A copy on another device."""

        def move(x: Tensor) -> Tensor:
            return x.to(device, non_blocking=True)

        return MicroBatch(
            move(self.input_ids),
            move(self.labels),
            move(self.position_ids),
            move(self.cu_seqlens),
            self.max_seqlen,
            move(self.response_mask),
            move(self.loss_mask),
            self.rows,
            move(self.token_indices),
            move(self.sequence),
            move(self.lengths),
            move(self.kind),
            {k: move(v) for k, v in self.vectors.items()},
            None if self.experts is None else move(self.experts),
            self.sum_over_cp,
        )

"""Mixtures of experts in an RL update: a router whose auxiliary losses do not depend on packing or layout, and which can
repeat the choices that the rollout made.

Megatron balances experts over whatever shares a micro-batch, padding included, so its gradient depends on how rows were
packed. Here balance is a matter of each sequence (the sequence-wise loss of DeepSeek-V3, arXiv 2412.19437, equations 17-20):

    L = coefficient * mean over sequences of  E / (k T^2) * sum_e count_e * sum_t p[t, e]

with T tokens of the sequence (prompt and response), k of E experts chosen, p the router's normalised scores; counts carry no
gradient. The z-loss (arXiv 2202.08906, equation 5) is averaged the same way: over each sequence, then over sequences.

Routing replay (R3, arXiv 2510.11370): where the rollout says which experts it chose, training uses those, with its own scores
of them; where it does not (the last token of a row, padding), the router chooses itself.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from types import SimpleNamespace
from typing import Any

import torch
import torch.distributed as dist
from megatron.core.packed_seq_params import PackedSeqParams
from megatron.core.transformer.moe.moe_utils import MoEAuxLossAutoScaler, compute_routing_scores_for_aux_loss
from megatron.core.transformer.moe.router import TopKRouter
from megatron.core.transformer.transformer_layer import TransformerLayer
from torch import Tensor

from megatron_rl.parallel.groups import Groups


@dataclass
class PackParams(PackedSeqParams):
    """The current pack, as layers see it. Megatron hands it to every layer, and again when it recomputes one."""

    sequence: Tensor | None = None
    """[t] int64: which row each token of this rank belongs to; -1 on padding."""
    lengths: Tensor | None = None
    """[N] int64: tokens of each row, over all ranks."""
    row_weight: float = 0.0
    """Weight of one row's auxiliary loss."""
    experts: Tensor | None = None
    """[t, layers, k] int16: the rollout's choices; -1 where it has none."""


def reduce_over_holders(model: torch.nn.Module, groups: Groups) -> None:
    """Have the gradient of each expert summed over the ranks that hold it, which need not be those with the same other weights.

    Megatron-Core before 0.19 looks at the expert-parallel size alone. With whole experts on each of several tensor-parallel
    ranks and no expert parallelism, each rank would then keep the gradient of its own tokens, and the copies drift apart.

    Args:
        model: bare, on this rank; its routed experts get Megatron's mark for the groups of experts.
        groups: process groups.
    """
    if groups.ep_size == 1 and groups.etp_size == groups.tp_size:
        return
    for name, parameter in model.named_parameters():
        if ".mlp.experts." in name:
            parameter.allreduce = False  # type: ignore[attr-defined]


class ExpertLayer(TransformerLayer):
    """A Megatron layer that shows its router the pack."""

    def forward(self, *args: Any, packed_seq_params: PackParams, **kwargs: Any) -> Any:
        """Run the layer, after its router has got the pack."""
        self.mlp.router.pack = packed_seq_params
        return super().forward(*args, packed_seq_params=packed_seq_params, **kwargs)


class ExpertRouter(TopKRouter):
    """Megatron's choice of experts, with losses and replay of ours."""

    pack: PackParams
    expert_bias: Tensor | None

    def __init__(self, config: Any, pg_collection: Any = None, **options: Any) -> None:
        super().__init__(config, pg_collection, **options)
        self._balance_coeff = self.get_aux_loss_coeff("seq_aux_loss")
        self.routing_type = "none"  # so that Megatron adds no loss of its own
        self.router_replay = SimpleNamespace(get_replay_topk=self._replayed)  # Megatron asks it at each choice

    def routing(self, logits: Tensor, padding_mask: Tensor | None = None) -> tuple[Tensor, Tensor]:
        """Return weights and map of the chosen experts, [t, E] each, from logits [t, 1, E]."""
        probs, routing_map = super().routing(logits)
        if self._balance_coeff and self._is_learning:
            probs = self._balanced(probs, logits.view(-1, logits.shape[-1]), routing_map)
        return probs, routing_map

    def apply_z_loss(self, logits: Tensor, padding_mask: Tensor | None = None) -> Tensor:
        """Add the z-loss, which keeps the logits small, where ``moe_z_loss_coeff`` asks for it."""
        coeff = self.config.moe_z_loss_coeff
        if not coeff or not self._is_learning:
            return logits
        sequence, is_real = self._sequences(len(logits))
        squares = logits.float().logsumexp(-1).square()[is_real]
        loss = (squares / self._lengths[sequence]).sum()
        return MoEAuxLossAutoScaler.apply(logits, loss * coeff * self.pack.row_weight)

    def _replayed(
        self,
        scores: Tensor,
        topk: int,
        num_groups: int | None,
        group_topk: int | None,
        choose: Callable[..., tuple[Tensor, Tensor]],
    ) -> tuple[Tensor, Tensor]:
        """Return scores and numbers of the chosen experts: the rollout's where recorded, else the router's own.

        Megatron calls it in place of its ``RouterReplay``. Scores are those of now.
        """
        if num_groups is None:
            values, indices = choose(scores, topk)
        else:
            values, indices = choose_in_groups(scores, topk, num_groups, group_topk or num_groups)
        if self.pack.experts is None:
            return values, indices
        told = self._mine(self.pack.experts, len(scores))[:, self.layer_number - 1].to(indices)
        indices = torch.where(told >= 0, told, indices)
        return scores.gather(1, indices), indices

    def _apply(self, convert: Callable[[Tensor], Tensor], recurse: bool = True) -> ExpertRouter:
        """Convert the router to another type, all but the bias of the choice: rounded, it would choose other experts."""
        bias = self.expert_bias
        super()._apply(convert, recurse)
        if bias is not None:
            self.expert_bias = bias.to(self.weight.device)
        return self

    def _balanced(self, probs: Tensor, logits: Tensor, routing_map: Tensor) -> Tensor:
        sequence, is_real = self._sequences(len(logits))
        _, scores = compute_routing_scores_for_aux_loss(logits, self.topk, self.score_function)
        counts = scores.new_zeros(len(self._lengths), scores.shape[1])
        counts.index_add_(0, sequence, routing_map[is_real].to(counts))
        if self.tp_cp_group.size() > 1:
            dist.all_reduce(counts, group=self.tp_cp_group)
        share = counts * (scores.shape[1] / self.topk) / self._lengths[:, None].square()
        loss = (scores[is_real] * share[sequence]).sum()
        return MoEAuxLossAutoScaler.apply(probs, loss * self._balance_coeff * self.pack.row_weight)

    @property
    def _is_learning(self) -> bool:
        return self.training and torch.is_grad_enabled()

    @property
    def _lengths(self) -> Tensor:
        assert self.pack.lengths is not None
        return self.pack.lengths.float()

    def _sequences(self, num_tokens: int) -> tuple[Tensor, Tensor]:
        """Return the row of each real token here, and [t] bool, which tokens are real."""
        assert self.pack.sequence is not None
        sequence = self._mine(self.pack.sequence, num_tokens)
        is_real = sequence >= 0
        return sequence[is_real], is_real

    def _mine(self, values: Tensor, num_tokens: int) -> Tensor:
        """Return the values of the tokens that this layer sees: under sequence parallelism, its tensor-parallel part."""
        if len(values) == num_tokens:
            return values
        return values.chunk(self.tp_group.size())[self.tp_group.rank()]


def choose_in_groups(scores: Tensor, num_chosen: int, num_groups: int, num_open: int) -> tuple[Tensor, Tensor]:
    """Choose the best experts of the best groups; a group scores the sum of its two best experts.

    Megatron sums the best ``num_chosen / num_open`` of a group, which is the same for DeepSeek-V3's own sizes only.

    Args:
        scores: [t, E], those that choose.
        num_chosen: experts of each token.
        num_groups: groups of neighbouring experts.
        num_open: groups that a token may choose from.

    Returns:
        Scores and numbers of the chosen experts, [t, num_chosen] each.
    """
    groups = scores.unflatten(1, (num_groups, -1))
    best = groups.topk(2, dim=-1).values.sum(-1).topk(num_open, dim=-1).indices
    is_closed = torch.ones(groups.shape[:2], dtype=torch.bool, device=scores.device).scatter(1, best, False)
    return tuple(groups.masked_fill(is_closed[..., None], float("-inf")).flatten(1).topk(num_chosen, dim=1))

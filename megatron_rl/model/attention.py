"""Core attention in plain torch for packed sequences, for machines without Transformer Engine.

The pack's sequences are laid side by side in a padded batch and attended there with an ordinary causal mask: keys of the
padding come after every real query, so causality alone hides them. Work grows with the longest sequence squared, not with
the pack squared.

Under context parallelism each rank has the queries of its own tokens, and gathers the keys and values of all.

Legend: T packed tokens, t this rank's (T without context parallelism), N sequences, S longest sequence, s its longest part
here, n query heads, g key-value heads, r = n / g, d head size.
"""

from __future__ import annotations

import math
from typing import Any

import torch
import torch.nn.functional as F
from megatron.core import parallel_state
from megatron.core.packed_seq_params import PackedSeqParams
from megatron.core.tensor_parallel.mappings import gather_from_sequence_parallel_region
from megatron.core.transformer.enums import AttnMaskType
from megatron.core.transformer.module import MegatronModule
from megatron.core.transformer.transformer_config import TransformerConfig
from torch import Tensor

from megatron_rl.parallel.context import gather_order, zigzag_indices

MATMUL_MAX_LENGTH = 512
"""Up to here plain batched products, which use a CPU's matrix units in bf16; benchmarks/results/cpu_step.md has the figures."""


class PackedCausalAttention(MegatronModule):
    """Causal grouped-query attention over THD packs; what a Megatron layer spec calls ``core_attention``."""

    def __init__(
        self,
        config: TransformerConfig,
        layer_number: int,
        attn_mask_type: AttnMaskType,
        attention_type: str,
        attention_dropout: float | None = None,
        softmax_scale: float | None = None,
        **_unused: Any,
    ) -> None:
        super().__init__(config=config)
        dropout = config.attention_dropout if attention_dropout is None else attention_dropout
        if dropout:
            raise ValueError(f"attention_dropout = {dropout}: RL needs the same forward twice; set it to 0")
        self.softmax_scale = softmax_scale or 1.0 / math.sqrt(config.kv_channels)
        self.cp_group = parallel_state.get_context_parallel_group(check_initialized=False)

    def forward(
        self,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        attention_mask: Tensor | None,
        attn_mask_type: AttnMaskType | None = None,
        attention_bias: Tensor | None = None,
        packed_seq_params: PackedSeqParams | None = None,
    ) -> Tensor:
        """Attend within each sequence of the pack.

        Args:
            query: [t, n, d].
            key: [t, g, d].
            value: [t, g, d].
            attention_mask: None: the mask follows from ``packed_seq_params``.
            packed_seq_params: with ``cu_seqlens_q``, of the whole pack.

        Returns:
            [t, n * d].
        """
        assert packed_seq_params is not None and packed_seq_params.qkv_format == "thd", "packed sequences only"
        pack = _Pack.of(packed_seq_params.cu_seqlens_q, self.cp_group)
        if pack.is_shared:
            # One gather for both; its backward sums what all ranks' queries say of this rank's keys.
            both = gather_from_sequence_parallel_region(torch.cat([key, value], dim=-1), group=self.cp_group)
            key, value = _Gather.apply(both, pack.order, pack.held).chunk(2, dim=-1)
        num_groups, repeats = key.shape[1], query.shape[1] // key.shape[1]
        mine, whole = pack.queries, pack.keys
        q = mine.pad(query).view(mine.num, mine.longest, num_groups, repeats, -1).permute(0, 2, 3, 1, 4)
        k, v = (whole.pad(x).transpose(1, 2) for x in (key, value))  # [N, g, S, d]
        if whole.longest <= MATMUL_MAX_LENGTH:
            context = self._matmul_attention(q, k, v, pack.causal_bias(query.dtype))
        else:
            mask = pack.causal_bias(query.dtype)[:, 0] if pack.is_shared else None
            context = F.scaled_dot_product_attention(
                q.flatten(1, 2), k, v, mask, is_causal=mask is None, scale=self.softmax_scale, enable_gqa=True
            )
            context = context.unflatten(1, (num_groups, repeats))
        context = context.permute(0, 3, 1, 2, 4).reshape(mine.num, mine.longest, -1)
        return mine.unpad(context)

    def _matmul_attention(self, q: Tensor, k: Tensor, v: Tensor, bias: Tensor) -> Tensor:
        """[N, g, r, s, d]: the r query heads of a key-value head are one tall product, so keys are never repeated."""
        shape, num_keys = q.shape, k.shape[2]
        scores = (q.reshape(*shape[:2], -1, shape[-1]) * self.softmax_scale) @ k.transpose(-1, -2)
        scores = scores.view(*shape[:4], num_keys) + bias
        weights = torch.softmax(scores.float(), dim=-1).to(v.dtype)
        return (weights.view(*shape[:2], -1, num_keys) @ v).view(shape)

    def sharded_state_dict(self, *_args: Any, **_kwargs: Any) -> dict[str, Any]:
        """No parameters, nothing to save."""
        return {}


class _Pack:
    """What the layers of one forward need to know of their pack."""

    _last: tuple[Tensor, _Pack] | None = None

    def __init__(self, cu_seqlens: Tensor, cp_group: Any) -> None:
        size, rank = (1, 0) if cp_group is None else (cp_group.size(), cp_group.rank())
        self.is_shared = size > 1
        self.keys = self.queries = _PaddedLayout(cu_seqlens)
        if self.is_shared:
            self.queries = _PaddedLayout(cu_seqlens // size)
            self.order = gather_order(cu_seqlens, size=size)
            self.held = self.order.argsort()
            mine = zigzag_indices(cu_seqlens, size=size, rank=rank)
            self._positions = (mine - cu_seqlens.long()[self.queries.sequence])[self.queries.slot_to_token]
        self._bias: Tensor | None = None

    @classmethod
    def of(cls, cu_seqlens: Tensor, cp_group: Any) -> _Pack:
        """All layers of one forward pass the same tensor object, so one entry is cache enough."""
        if cls._last is None or cls._last[0] is not cu_seqlens:
            cls._last = (cu_seqlens, cls(cu_seqlens, cp_group))
        return cls._last[1]

    def causal_bias(self, dtype: torch.dtype) -> Tensor:
        """0 where the key is not after the query, -inf elsewhere: [S, S], or [N, 1, 1, s, S] of this rank's queries."""
        if self._bias is None or self._bias.dtype != dtype:
            places = torch.arange(self.keys.longest, device=self.keys.slot_to_token.device)
            if self.is_shared:
                queries = self._positions.view(self.queries.num, 1, 1, self.queries.longest, 1)
            else:
                queries = places[:, None]
            bias = torch.zeros((), dtype=dtype, device=places.device)
            self._bias = bias.masked_fill(places > queries, float("-inf"))
        return self._bias


class _PaddedLayout:
    """Where each packed token goes in a padded [N, S] batch."""

    def __init__(self, cu_seqlens: Tensor) -> None:
        lengths = cu_seqlens.diff().long()
        self.num, self.longest = len(lengths), int(lengths.max())
        total = int(cu_seqlens[-1])
        rows = torch.repeat_interleave(torch.arange(self.num, device=lengths.device), lengths)
        self.sequence = rows
        """[T] which sequence each token belongs to."""
        within = torch.arange(total, device=lengths.device) - cu_seqlens[:-1].long()[rows]
        self.is_dense = self.num * self.longest == total
        self.token_to_slot = rows * self.longest + within
        self.slot_to_token = torch.zeros(self.num * self.longest, dtype=torch.long, device=lengths.device)
        self.slot_to_token[self.token_to_slot] = torch.arange(total, device=lengths.device)

    def pad(self, x: Tensor) -> Tensor:
        """[T, heads, d] -> [N, S, heads, d]. Padding slots repeat token 0: finite, and hidden by causality."""
        if not self.is_dense:
            x = _Gather.apply(x, self.slot_to_token, self.token_to_slot)
        return x.view(self.num, self.longest, *x.shape[1:])

    def unpad(self, x: Tensor) -> Tensor:
        """[N, S, ...] -> [T, ...]."""
        x = x.reshape(self.num * self.longest, *x.shape[2:])
        return x if self.is_dense else _Gather.apply(x, self.token_to_slot, None)


class _Gather(torch.autograd.Function):
    """``x[index]`` whose gradient is a gather too: torch would scatter-add, which is slow on CPU."""

    @staticmethod
    def forward(ctx, x, index, back_index):  # type: ignore[no-untyped-def]
        ctx.save_for_backward(index, back_index)
        ctx.size = x.shape[0]
        return x.index_select(0, index)

    @staticmethod
    def backward(ctx, grad):  # type: ignore[no-untyped-def]
        index, back_index = ctx.saved_tensors
        if back_index is not None:  # padding: its slots got copies of token 0, whose gradient is zero (causality)
            return grad.index_select(0, back_index), None, None
        out = grad.new_zeros(ctx.size, *grad.shape[1:])
        out[index] = grad  # indices are distinct: a copy, not a sum
        return out, None, None

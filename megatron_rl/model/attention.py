"""Core attention in plain torch for packed sequences, for machines without Transformer Engine.

The pack's sequences are laid side by side in a padded batch and attended there with an ordinary causal mask: keys of the
padding come after every real query, so causality alone hides them. Work grows with the longest sequence squared, not with
the pack squared.

Legend: T packed tokens, N sequences, S longest sequence, n query heads, g key-value heads, d head size.
"""

from __future__ import annotations

import math
from typing import Any

import torch
import torch.nn.functional as F
from megatron.core.packed_seq_params import PackedSeqParams
from megatron.core.transformer.enums import AttnMaskType
from megatron.core.transformer.module import MegatronModule
from megatron.core.transformer.transformer_config import TransformerConfig
from torch import Tensor

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
            query: [T, n, d].
            key: [T, g, d].
            value: [T, g, d].
            attention_mask: None: the mask follows from ``packed_seq_params``.
            packed_seq_params: with ``cu_seqlens_q``.

        Returns:
            [T, n * d].
        """
        assert packed_seq_params is not None and packed_seq_params.qkv_format == "thd", "packed sequences only"
        layout = _PaddedLayout.of(packed_seq_params.cu_seqlens_q)
        num_groups, repeats = key.shape[1], query.shape[1] // key.shape[1]
        q = layout.pad(query).view(layout.num, layout.longest, num_groups, repeats, -1).permute(0, 2, 3, 1, 4)
        k, v = (layout.pad(x).transpose(1, 2) for x in (key, value))  # [N, g, S, d]
        if layout.longest <= MATMUL_MAX_LENGTH:
            context = self._matmul_attention(q, k, v, layout.causal_bias(query.dtype))
        else:
            q = q.flatten(1, 2)
            context = F.scaled_dot_product_attention(q, k, v, is_causal=True, scale=self.softmax_scale, enable_gqa=True)
            context = context.unflatten(1, (num_groups, repeats))
        context = context.permute(0, 3, 1, 2, 4).reshape(layout.num, layout.longest, -1)
        return layout.unpad(context)

    def _matmul_attention(self, q: Tensor, k: Tensor, v: Tensor, bias: Tensor) -> Tensor:
        """[N, g, r, S, d]: the r query heads of a key-value head are one tall product, so keys are never repeated."""
        shape = q.shape
        scores = (q.reshape(*shape[:2], -1, shape[-1]) * self.softmax_scale) @ k.transpose(-1, -2)
        scores = scores.view(*shape[:4], shape[3]) + bias
        weights = torch.softmax(scores.float(), dim=-1).to(v.dtype)
        return (weights.view(*shape[:2], -1, shape[3]) @ v).view(shape)

    def sharded_state_dict(self, *_args: Any, **_kwargs: Any) -> dict[str, Any]:
        """No parameters, nothing to save."""
        return {}


class _PaddedLayout:
    """Where each packed token goes in the padded [N, S] batch; one per pack, shared by its layers."""

    _last: tuple[Tensor, _PaddedLayout] | None = None

    def __init__(self, cu_seqlens: Tensor) -> None:
        lengths = cu_seqlens.diff().long()
        self.num, self.longest = len(lengths), int(lengths.max())
        total = int(cu_seqlens[-1])
        rows = torch.repeat_interleave(torch.arange(self.num, device=lengths.device), lengths)
        within = torch.arange(total, device=lengths.device) - cu_seqlens[:-1].long()[rows]
        self.is_dense = self.num * self.longest == total
        self.token_to_slot = rows * self.longest + within
        self.slot_to_token = torch.zeros(self.num * self.longest, dtype=torch.long, device=lengths.device)
        self.slot_to_token[self.token_to_slot] = torch.arange(total, device=lengths.device)
        self._bias: Tensor | None = None

    @classmethod
    def of(cls, cu_seqlens: Tensor) -> _PaddedLayout:
        """All layers of one forward pass the same tensor object, so one entry is cache enough."""
        if cls._last is None or cls._last[0] is not cu_seqlens:
            cls._last = (cu_seqlens, cls(cu_seqlens))
        return cls._last[1]

    def causal_bias(self, dtype: torch.dtype) -> Tensor:
        """[S, S]: 0 where the key is not after the query, -inf elsewhere."""
        if self._bias is None or self._bias.dtype != dtype:
            full = torch.full((self.longest, self.longest), float("-inf"), dtype=dtype)
            self._bias = full.triu(1).to(self.token_to_slot.device)
        return self._bias

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

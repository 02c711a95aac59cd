"""Attention in plain torch for packed sequences, for machines without Transformer Engine.

Sequences of like length are laid side by side in a padded batch and attended there with an ordinary causal mask: keys of
the padding come after every real query, so causality alone hides them. Work grows with each sequence's length squared, not
with the pack's.

Under context parallelism each rank has the queries of its own tokens, and gathers the keys and values of all.

Legend: T packed tokens, t this rank's (T without context parallelism), N sequences of a batch, S the longest of them, s its
longest part here, n query heads, g key-value heads, r = n / g, d size of a query or key head, v of a value head.
"""

from __future__ import annotations

import math
from copy import copy
from typing import Any

import torch
import torch.nn.functional as F
from megatron.core import parallel_state
from megatron.core.packed_seq_params import PackedSeqParams
from megatron.core.tensor_parallel.mappings import gather_from_sequence_parallel_region
from megatron.core.transformer.attention import SelfAttention
from megatron.core.transformer.enums import AttnMaskType
from megatron.core.transformer.identity_op import IdentityOp
from megatron.core.transformer.module import MegatronModule
from megatron.core.transformer.multi_latent_attention import MLASelfAttention
from megatron.core.transformer.transformer_config import TransformerConfig
from torch import Tensor

from megatron_rl.model.fp8.emulation import EMULATED, Fp8Layer
from megatron_rl.parallel.context import gather_order, zigzag_indices

MATMUL_MAX_LENGTH = 512
"""Up to here plain batched products, which use a CPU's matrix units in bf16 (benchmarks/results/cpu_step.md has the figures);
longer sequences go through torch's attention, which holds no [S, S] scores."""


BATCH_MIN_SHARE, BATCH_MIN_LENGTH = 0.75, 32
"""Sequences share a batch with one that is no longer than 4/3 of them; below the length nothing is won by parting them."""


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
            value: [t, g, v].
            attention_mask: None: the mask follows from ``packed_seq_params``.
            packed_seq_params: with ``cu_seqlens_q``, of the whole pack.

        Returns:
            [t, n * v].
        """
        assert packed_seq_params is not None and packed_seq_params.qkv_format == "thd", "packed sequences only"
        pack = _PackIndex.of(packed_seq_params.cu_seqlens_q, self.cp_group)
        if pack.is_shared:
            # One gather for both; its backward sums what all ranks' queries say of this rank's keys.
            both = gather_from_sequence_parallel_region(torch.cat([key, value], dim=-1), group=self.cp_group)
            key, value = _Gather.apply(both, pack.order, pack.held).split([key.shape[-1], value.shape[-1]], dim=-1)
        batches = zip(pack.queries.pad(query), pack.keys.pad(key), pack.keys.pad(value), pack.biases(query.dtype))
        return pack.queries.unpad([self._attend(q, k, v, bias) for q, k, v, bias in batches])

    def _attend(self, query: Tensor, key: Tensor, value: Tensor, bias: Tensor | None) -> Tensor:
        """[N, s, n, d], [N, S, g, d], [N, S, g, v] and a bias of ``_PackIndex.biases`` -> [N, s, n * v]."""
        num_groups = key.shape[2]
        q = query.unflatten(2, (num_groups, -1)).permute(0, 2, 3, 1, 4)  # [N, g, r, s, d]
        k, v = key.transpose(1, 2), value.transpose(1, 2)  # [N, g, S, d or v]
        if bias is not None and key.shape[1] <= MATMUL_MAX_LENGTH:
            context = self._matmul_attention(q, k, v, bias)
        else:
            mask = None if bias is None else bias[:, 0]
            context = F.scaled_dot_product_attention(
                q.flatten(1, 2), k, v, mask, is_causal=mask is None, scale=self.softmax_scale, enable_gqa=True
            )
            context = context.unflatten(1, (num_groups, -1))
        return context.permute(0, 3, 1, 2, 4).flatten(2)

    def _matmul_attention(self, q: Tensor, k: Tensor, v: Tensor, bias: Tensor) -> Tensor:
        """[N, g, r, s, v]: the r query heads of a key-value head are one tall product, so keys are never repeated."""
        shape, num_keys = q.shape, k.shape[2]
        scores = (q.reshape(*shape[:2], -1, shape[-1]) * self.softmax_scale) @ k.transpose(-1, -2)
        scores = scores.view(*shape[:4], num_keys) + bias
        weights = torch.softmax(scores.float(), dim=-1).to(v.dtype)
        return (weights.view(*shape[:2], -1, num_keys) @ v).view(*shape[:4], -1)

    def sharded_state_dict(self, *_args: Any, **_kwargs: Any) -> dict[str, Any]:
        """No parameters, nothing to save."""
        return {}


OF_ATTENTION = "of_attention"
"""Attribute of a TransformerConfig: the fields, by name, that attention layers have otherwise than the rest of the model."""


def config_of_attention(config: Any) -> Any:
    """Return the config that attention layers are built from: a bias of the projection alone, an epsilon of their own norms."""
    own = copy(config)
    for name, value in getattr(config, OF_ATTENTION, {}).items():
        setattr(own, name, value)
    return own


class GroupedAttention(SelfAttention):
    """Megatron's grouped-query attention, with the fields that a model has for attention alone."""

    def __init__(self, config: Any, *args: Any, **kwargs: Any) -> None:
        super().__init__(config_of_attention(config), *args, **kwargs)


class AsSpecified(MLASelfAttention):
    """Megatron's multi-head latent attention, with norms where the layer's spec has them.

    Later versions (0.19) norm the queries' input wherever the latent of keys and values is normed. DeepSeek-V2-Lite, whose
    queries have no latent, has no such norm.
    """

    def __init__(self, config: Any, *args: Any, **kwargs: Any) -> None:
        super().__init__(config_of_attention(config), *args, **kwargs)

    def _resolve_qk_norm_config(self, submodules: Any) -> dict[str, Any]:
        names = ("linear_q_proj", "linear_q_up_proj", "linear_kv_up_proj", "q_layernorm", "kv_layernorm")
        return {name: getattr(submodules, name) or IdentityOp for name in names}


class LatentAttention(AsSpecified):
    """The same, with projections to the latents that every tensor-parallel rank has whole.

    Megatron's own local layers cut them and gather what comes out, which gives the rotated key that all heads share the
    gradient of this rank's heads alone. Whole projections see a rank's own tokens under sequence parallelism, and the gather
    of the rotated key then sums over heads; it is also how Transformer Engine's layers are built.
    """

    def __init__(self, config: Any, *args: Any, **kwargs: Any) -> None:
        super().__init__(config, *args, **kwargs)
        assert self.tp_group.size() == 1 or config.sequence_parallel, "transformer_config refuses this"
        kind = Fp8WholeLinear if getattr(config, EMULATED, None) else WholeLinear
        self.linear_kv_down_proj = kind(config.kv_lora_rank + config.qk_pos_emb_head_dim, config=config)
        if config.q_lora_rank is not None:
            self.linear_q_down_proj = kind(config.q_lora_rank, config=config)


class WholeLinear(MegatronModule):
    """A linear layer of the hidden state without bias, not cut over the tensor-parallel ranks."""

    def __init__(self, output_size: int, *, config: TransformerConfig) -> None:
        super().__init__(config=config)
        weight = torch.empty(output_size, config.hidden_size, dtype=config.params_dtype)
        if config.perform_initialization:
            config.init_method(weight)
        self.weight = torch.nn.Parameter(weight)
        # Each rank has the gradient of its own tokens: Megatron sums those of marked parameters over the ranks.
        self.weight.sequence_parallel = config.sequence_parallel  # type: ignore[attr-defined]

    def forward(self, hidden: Tensor) -> tuple[Tensor, None]:
        """[s, b, H] -> [s, b, output_size], and no bias, as Megatron's linear layers answer."""
        return self._forward_impl(hidden, self.weight), None

    def _forward_impl(
        self, input: Tensor, weight: Tensor, **_unused: Any
    ) -> Tensor:  # as Megatron's linear layers have it
        return F.linear(input, weight)


class Fp8WholeLinear(Fp8Layer, WholeLinear):
    """The same in emulated eight bits."""

    def sharded_state_dict(self, prefix: str = "", *args: Any, **kwargs: Any) -> dict[str, Any]:
        """Return the state of a ``WholeLinear``, and the memory of delayed scaling: without it a checkpoint loads as either."""
        state = super().sharded_state_dict(prefix, *args, **kwargs)
        if self.quantizers.recipe.kind != "delayed":
            state.pop(f"{prefix}_extra_state", None)
        return state


class _PackIndex:
    """Places and masks of one pack, computed once for all layers of a forward."""

    _last: tuple[Tensor, _PackIndex] | None = None

    def __init__(self, cu_seqlens: Tensor, cp_group: Any) -> None:
        size, rank = (1, 0) if cp_group is None else (cp_group.size(), cp_group.rank())
        self.is_shared = size > 1
        batches = _batches(cu_seqlens.diff().tolist())
        self.keys = self.queries = _Batches(cu_seqlens, batches)
        if self.is_shared:
            self.queries = _Batches(cu_seqlens // size, batches)
            self.order = gather_order(cu_seqlens, size=size)
            self.held = self.order.argsort()
            mine = zigzag_indices(cu_seqlens, size=size, rank=rank)
            sequence = torch.repeat_interleave((cu_seqlens // size).diff().long())
            self._positions = (mine - cu_seqlens.long()[sequence])[self.queries.slot_to_token]
        self._biases: dict[torch.dtype, list[Tensor | None]] = {}

    @classmethod
    def of(cls, cu_seqlens: Tensor, cp_group: Any) -> _PackIndex:
        """Return the index of a pack. All layers of a forward pass the same tensor object, so a cache of one is enough."""
        if cls._last is None or cls._last[0] is not cu_seqlens:
            cls._last = (cu_seqlens, cls(cu_seqlens, cp_group))
        return cls._last[1]

    def biases(self, dtype: torch.dtype) -> list[Tensor | None]:
        """Return the bias of each batch: 0 where the key is not after the query, -inf elsewhere.

        Returns:
            [S, S] each, or, of this rank's queries, [N, 1, 1, s, S]; None where a long batch is plainly causal.
        """
        if dtype not in self._biases:
            places = [torch.arange(longest, device=self.keys.slot_to_token.device) for _, longest in self.keys.shapes]
            queries: list[Tensor | None] = [
                place[:, None] if len(place) <= MATMUL_MAX_LENGTH else None for place in places
            ]
            if self.is_shared:
                positions = self._positions.split(self.queries.sizes)
                queries = [q.view(num, 1, 1, longest, 1) for q, (num, longest) in zip(positions, self.queries.shapes)]
            zero = torch.zeros((), dtype=dtype, device=self.keys.slot_to_token.device)
            self._biases[dtype] = [
                None if query is None else zero.masked_fill(key > query, float("-inf"))
                for key, query in zip(places, queries)
            ]
        return self._biases[dtype]


def _batches(lengths: list[int]) -> list[list[int]]:
    """Group the sequences that are padded together, longest first."""
    batches: list[list[int]] = []
    limit = 0.0
    for sequence in sorted(range(len(lengths)), key=lambda i: (-lengths[i], i)):
        if not batches or lengths[sequence] < limit:
            batches.append([])
            limit = BATCH_MIN_SHARE * lengths[sequence] if lengths[sequence] > BATCH_MIN_LENGTH else 0.0
        batches[-1].append(sequence)
    return [sorted(batch) for batch in batches]


class _Batches:
    """The place of each packed token in padded [N, S] batches that lie one after another."""

    def __init__(self, cu_seqlens: Tensor, batches: list[list[int]]) -> None:
        device, total = cu_seqlens.device, int(cu_seqlens[-1])
        starts, lengths = cu_seqlens[:-1].long(), cu_seqlens.diff().long()
        self.shapes: list[tuple[int, int]] = []
        """(N, S) of each."""
        slots, tokens, end = [], [], 0
        for members in (torch.tensor(batch, device=device) for batch in batches):
            longest = int(lengths[members].max())
            row = torch.repeat_interleave(lengths[members])
            within = torch.arange(len(row), device=device) - (lengths[members].cumsum(0) - lengths[members])[row]
            slots.append(end + row * longest + within)
            tokens.append(starts[members][row] + within)
            self.shapes.append((len(members), longest))
            end += len(members) * longest
        self.sizes = [num * longest for num, longest in self.shapes]
        self.token_to_slot = torch.empty(total, dtype=torch.long, device=device)
        self.token_to_slot[torch.cat(tokens)] = torch.cat(slots)
        self.slot_to_token = torch.zeros(end, dtype=torch.long, device=device)
        self.slot_to_token[self.token_to_slot] = torch.arange(total, device=device)
        self.is_dense = len(batches) == 1 and end == total

    def pad(self, x: Tensor) -> list[Tensor]:
        """[T, heads, d] -> [N, S, heads, d] each. Padding slots repeat token 0: finite, and hidden by causality."""
        if not self.is_dense:
            x = _Gather.apply(x, self.slot_to_token, self.token_to_slot)
        return [part.unflatten(0, shape) for part, shape in zip(x.split(self.sizes), self.shapes)]

    def unpad(self, parts: list[Tensor]) -> Tensor:
        """[N, S, ...] each -> [T, ...]."""
        x = torch.cat([part.flatten(0, 1) for part in parts])
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

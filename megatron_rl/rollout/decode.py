"""Token-by-token decoding of a transformers model, for batches whose rows end at very different lengths.

It saves work that ``generate`` of transformers does: a prompt that several rows share is computed once; rows that have ended
leave the batch; keys and values are written in place, and a group of query heads reads its key-value head without a copy.

Legend: U distinct prompts, B rows still in the batch, N all rows, R most new tokens, g key-value heads, d head size, S keys.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from contextlib import ExitStack
from typing import Any, NamedTuple, Protocol

import torch
from torch import Tensor
from transformers import AttentionInterface, AttentionMaskInterface, PreTrainedModel
from transformers.cache_utils import Cache, DynamicLayer
from transformers.integrations.sdpa_attention import sdpa_attention_forward
from transformers.masking_utils import sdpa_mask

ATTENTION = "sdpa_grouped_decode"
"""Value of a model's ``attn_implementation`` that gives the last of the savings above."""
_DROP_SHARE = 1 / 16
"""Share of ended rows at which they are dropped; dropping copies the KV cache, so single rows wait."""
_GROW = 64
"""Least growth of the KV cache, in tokens."""


class Choose(Protocol):
    """Chooses every row's next token."""

    def __call__(self, logits: Tensor, rows: Tensor, step: int) -> tuple[Tensor, Tensor]:
        """Map logits [B, V] of the given rows [B] to chosen tokens [B] int64 and their log-probs [B] float32."""
        ...


class Decoded(NamedTuple):
    """One decoded row, on the CPU."""

    tokens: Tensor
    """[R] int64."""
    log_probs: Tensor
    """[R] float32."""
    experts: Tensor | None
    """[P + R - 1, layers, k] int16: experts that the routers chose at each position that was computed."""


@torch.inference_mode()
def decode(
    model: PreTrainedModel,
    prompts: Sequence[Tensor],
    choose: Choose,
    *,
    max_new_tokens: int | Sequence[int],
    stop_ids: Sequence[int],
    pad_id: int,
    on_progress: Callable[[int], None] = lambda _: None,
    record_experts: bool = False,
) -> list[Decoded]:
    """Continue every prompt until a stop token or its limit.

    Args:
        model: a causal language model in evaluation mode.
        prompts: [*] int64 each, none of them empty; equal ones are computed once.
        choose: next tokens from logits.
        max_new_tokens: R, of all rows or of each.
        stop_ids: tokens that end a row, and belong to it.
        pad_id: fills batches.
        on_progress: is called with the number of rows that are done.
        record_experts: return the chosen experts of an MoE model.
    """
    with ExitStack() as hooks:
        routes = _Routes(model, hooks) if record_experts else None
        device = model.device
        limits = [max_new_tokens] * len(prompts) if isinstance(max_new_tokens, int) else list(max_new_tokens)
        most_new_tokens = max(limits)
        distinct, prompt_of_row = _distinct(prompts)
        input_ids, mask = _left_padded(distinct, pad_id, device)
        positions = (mask.cumsum(1) - 1).clamp(min=0)
        output = model(
            input_ids=input_ids, attention_mask=mask, position_ids=positions, use_cache=True, logits_to_keep=1
        )
        which = torch.tensor(prompt_of_row, device=device)
        if routes is not None:
            routes.of_prompts(mask, which, most_new_tokens)
        cache = _RowCache(output.past_key_values, which, most=input_ids.shape[1] + most_new_tokens)
        logits, mask, position = output.logits[which, -1], mask[which], positions[which, -1]
        del output  # the prompts' own cache

        rows = torch.arange(len(prompts), device=device)
        is_going = torch.ones_like(rows, dtype=torch.bool)
        stops = torch.tensor(list(stop_ids), device=device)
        tokens = torch.full((len(prompts), most_new_tokens), pad_id, device=device)
        log_probs = torch.zeros(tokens.shape, device=device)
        lengths = torch.tensor(limits, device=device)
        limit = lengths.clone()
        for step in range(most_new_tokens):
            chosen, log_prob = choose(logits, rows, step)
            tokens[rows, step], log_probs[rows, step] = chosen, log_prob
            is_last = is_going & (torch.isin(chosen, stops) | (limit[rows] == step + 1))
            lengths[rows[is_last]] = step + 1
            is_going &= ~is_last
            num_going = int(is_going.sum())
            on_progress(len(prompts) - num_going)
            if num_going == 0:
                break
            if len(rows) - num_going >= _DROP_SHARE * len(rows):
                cache.batch_select_indices(is_going.nonzero()[:, 0])
                rows, chosen, mask, position = rows[is_going], chosen[is_going], mask[is_going], position[is_going]
                is_going = is_going[is_going]
            position = position + 1
            mask = torch.cat([mask, mask.new_ones(len(rows), 1)], dim=1)
            logits = model(
                input_ids=chosen[:, None],
                attention_mask=mask,
                position_ids=position[:, None],
                past_key_values=cache,
                use_cache=True,
            ).logits[:, -1]
            if routes is not None:
                routes.of_step(rows, step)
        experts = [None] * len(prompts) if routes is None else routes.per_row(lengths)
        cut = zip(tokens.cpu(), log_probs.cpu(), lengths.tolist(), experts)
        return [Decoded(row[:length].clone(), values[:length].clone(), chosen) for row, values, length, chosen in cut]


def _distinct(prompts: Sequence[Tensor]) -> tuple[list[Tensor], list[int]]:
    """Return the distinct prompts, and the index of each row's prompt among them."""
    places: dict[tuple[int, ...], int] = {}
    prompt_of_row = [places.setdefault(tuple(prompt.tolist()), len(places)) for prompt in prompts]
    return [torch.tensor(prompt) for prompt in places], prompt_of_row


def _left_padded(prompts: Sequence[Tensor], pad_id: int, device: torch.device) -> tuple[Tensor, Tensor]:
    """Return ids [U, longest], padded on the left, and the mask of real tokens."""
    longest = max(map(len, prompts))
    input_ids = torch.full((len(prompts), longest), pad_id)
    mask = torch.zeros_like(input_ids)
    for row, prompt in enumerate(prompts):
        input_ids[row, longest - len(prompt) :] = prompt
        mask[row, longest - len(prompt) :] = 1
    return input_ids.to(device), mask.to(device)


class _Routes:
    """The experts that a model's routers choose while it decodes."""

    def __init__(self, model: PreTrainedModel, hooks: ExitStack) -> None:
        self._last: list[Tensor] = []
        routers = [module for module in model.modules() if type(module).__name__.endswith("TopKRouter")]
        assert routers, f"{type(model).__name__} has no routers that are known here"
        for router in routers:  # each returns (logits, weights, indices [tokens, k])
            hooks.callback(router.register_forward_hook(lambda *args: self._last.append(args[2][2])).remove)

    def of_prompts(self, mask: Tensor, which: Tensor, max_new_tokens: int) -> None:
        """Record the forward of the left-padded prompts [U, S]; ``which`` is the prompt of each row."""
        chosen = self._take(mask.shape)
        self._prompts = [row[keep.bool()] for row, keep in zip(chosen.cpu(), mask.cpu())]
        self._which = which.tolist()
        self._steps = torch.full((len(which), max_new_tokens, *chosen.shape[2:]), -1, dtype=torch.int16)

    def of_step(self, rows: Tensor, step: int) -> None:
        """Record the forward of the tokens that were chosen in a step."""
        self._steps[rows.cpu(), step] = self._take((len(rows), 1))[:, 0].cpu()

    def per_row(self, lengths: Tensor) -> list[Tensor]:
        """Return [P + R - 1, layers, k] for each row; the last token was never computed."""
        ends = zip(self._which, self._steps, lengths.tolist())
        return [torch.cat([self._prompts[prompt], steps[: length - 1]]) for prompt, steps, length in ends]

    def _take(self, shape: Sequence[int]) -> Tensor:
        chosen = torch.stack(self._last, dim=1).to(torch.int16).unflatten(0, tuple(shape))
        self._last.clear()
        return chosen


class _RowLayer(DynamicLayer):
    """Keys and values of one layer, views of the front of larger buffers."""

    keys: Tensor
    values: Tensor

    def __init__(self, keys: Tensor, values: Tensor, most: int) -> None:
        super().__init__()
        self.dtype, self.device, self.is_initialized = keys.dtype, keys.device, True
        self._most = most
        self._hold(keys, values)

    def update(self, key_states: Tensor, value_states: Tensor, *_args: Any, **_kwargs: Any) -> tuple[Tensor, Tensor]:
        """Append keys and values, [B, g, n, d] each, and return all so far."""
        length, end = self.keys.shape[2], self.keys.shape[2] + key_states.shape[2]
        if end > self._buffers[0].shape[2]:
            self._hold(self.keys, self.values)
        for buffer, new in zip(self._buffers, (key_states, value_states)):
            buffer[:, :, length:end] = new
        self.keys, self.values = (buffer[:, :, :end] for buffer in self._buffers)
        return self.keys, self.values

    def batch_select_indices(self, indices: Tensor) -> None:
        """Keep these rows and drop the others."""
        self._hold(self.keys[indices], self.values[indices])

    def _hold(self, keys: Tensor, values: Tensor) -> None:
        """Move keys and values into buffers with room for more."""
        length = keys.shape[2]
        room = min(self._most, length + max(_GROW, length // 2))
        self._buffers = [x.new_empty(*x.shape[:2], room, x.shape[3]) for x in (keys, values)]
        for buffer, x in zip(self._buffers, (keys, values)):
            buffer[:, :, :length] = x
        self.keys, self.values = (buffer[:, :, :length] for buffer in self._buffers)


class _RowCache(Cache):
    """The KV cache of the prompts, repeated for the rows."""

    def __init__(self, prompts: Cache, which: Tensor, most: int) -> None:
        filled: Any = prompts.layers
        super().__init__(layers=[_RowLayer(layer.keys[which], layer.values[which], most) for layer in filled])


def _attention(
    module: torch.nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    scaling: float | None = None,
    **kwargs: Any,
) -> tuple[Tensor, None]:
    """Attend with one query a row, without a copy of the keys for each query head; other shapes use torch's SDPA."""
    if query.shape[2] > 1:
        return sdpa_attention_forward(module, query, key, value, attention_mask, scaling=scaling, **kwargs)
    scale = query.shape[-1] ** -0.5 if scaling is None else scaling
    grouped = query[:, :, 0].unflatten(
        1, (key.shape[1], -1)
    )  # [B, g, n / g, d]: the query heads of a key head are its queries
    attend = _ATTEND.get(query.device.type, _attend_by_kernel)
    return attend(grouped, key, value, attention_mask, scale).flatten(1, 2)[:, None], None  # [B, 1, n, d]


def _attend_by_products(query: Tensor, key: Tensor, value: Tensor, mask: Tensor | None, scale: float) -> Tensor:
    """Attend from [B, g, n / g, d]: on a CPU two products are faster than torch's kernel."""
    scores = (query * scale) @ key.transpose(-1, -2)
    if mask is not None:
        scores.masked_fill_(~mask, float("-inf"))
    return torch.softmax(scores.float(), dim=-1).to(value.dtype) @ value


def _attend_by_kernel(query: Tensor, key: Tensor, value: Tensor, mask: Tensor | None, scale: float) -> Tensor:
    """Attend from [B, g, n / g, d] by torch's fused kernel, which sums in float32."""
    return torch.nn.functional.scaled_dot_product_attention(query, key, value, attn_mask=mask, scale=scale)


_ATTEND = {"cpu": _attend_by_products}
"""By device; elsewhere the kernel."""

AttentionInterface.register(ATTENTION, _attention)
AttentionMaskInterface.register(ATTENTION, sdpa_mask)

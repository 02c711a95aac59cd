"""Hidden states -> log-probs and entropy, over a sharded vocabulary, without ever holding ``[T, V/tp]`` logits.

Logits exist for one chunk of tokens at a time and are computed again in backward. Across the tensor-parallel group only
per-token scalars travel. Forward is the same code with and without gradient, so both give the same bits.

Legend: T tokens, H hidden, V vocabulary, v this rank's part of it (padded columns left out), C tokens of a chunk.
"""

from __future__ import annotations

import torch
import torch.distributed as dist
from torch import Tensor

CHUNK_ELEMENTS = 1 << 24
"""Logits in one chunk: 64 MiB in float32."""


def vocab_parallel_log_probs(
    hidden: Tensor,
    weight: Tensor,
    labels: Tensor,
    *,
    vocab_size: int,
    temperature: float,
    tp_group: dist.ProcessGroup,
) -> tuple[Tensor, Tensor]:
    """``log softmax(hidden @ W^T / temperature)[label]`` and the exact entropy of that softmax.

    Args:
        hidden: [T, H], the same on every rank of ``tp_group``. Its gradient is this rank's *part*: the caller sums it over
            the group (Megatron's ``copy_to`` / ``gather_from`` regions do).
        weight: [V_padded / tp, H], this rank's rows of the output embedding.
        labels: [T] int64, in [0, vocab_size).
        vocab_size: V without padding; padded rows get no probability.
        temperature: divides the logits.
        tp_group: ranks that hold the other rows.

    Returns:
        log_probs [T] float32, entropy [T] float32 (nats); both carry gradient to ``hidden`` and ``weight``.
    """
    start = dist.get_rank(tp_group) * weight.shape[0]
    valid = max(0, min(weight.shape[0], vocab_size - start))
    # From the padded width, which all ranks share: they must cut the tokens into the same chunks.
    chunk_size = max(1, CHUNK_ELEMENTS // weight.shape[0])
    return _LogProbs.apply(hidden, weight[:valid], labels, start, temperature, chunk_size, tp_group)


class _LogProbs(torch.autograd.Function):
    @staticmethod
    def forward(ctx, hidden, weight, labels, start, temperature, chunk_size, tp_group):  # type: ignore[no-untyped-def]
        tokens = hidden.shape[0]
        log_probs = hidden.new_empty(tokens, dtype=torch.float32)
        entropy = torch.empty_like(log_probs)
        log_sum_exp = torch.empty_like(log_probs)
        for chunk in _chunks(tokens, chunk_size):
            logits = _logits(hidden[chunk], weight, temperature)
            largest = _all_reduce(_row_max(logits), dist.ReduceOp.MAX, tp_group)
            logits.sub_(largest[:, None])
            target = _target(logits, labels[chunk], start)
            exp = logits.exp()
            exp_sum = exp.sum(-1)
            exp_dot = exp.mul_(logits).sum(-1)
            target, exp_sum, exp_dot = _all_reduce(torch.stack([target, exp_sum, exp_dot]), dist.ReduceOp.SUM, tp_group)
            log_sum = exp_sum.log()
            log_probs[chunk] = target - log_sum
            entropy[chunk] = log_sum - exp_dot / exp_sum
            log_sum_exp[chunk] = largest + log_sum
        ctx.save_for_backward(hidden, weight, labels, log_sum_exp, entropy)
        ctx.start, ctx.temperature, ctx.chunk_size = start, temperature, chunk_size
        return log_probs, entropy

    @staticmethod
    def backward(ctx, grad_log_probs, grad_entropy):  # type: ignore[no-untyped-def]
        hidden, weight, labels, log_sum_exp, entropy = ctx.saved_tensors
        grad_hidden = torch.empty_like(hidden)
        grad_weight = torch.zeros_like(weight, dtype=torch.float32)
        for chunk in _chunks(hidden.shape[0], ctx.chunk_size):
            # With l = log p: d log p[y] / dz = 1[y] - p and d entropy / dz = -p (l + entropy).
            log_p = _logits(hidden[chunk], weight, ctx.temperature).sub_(log_sum_exp[chunk, None])
            p = log_p.exp()
            grad = log_p.add_(entropy[chunk, None]).mul_(-grad_entropy[chunk, None]).sub_(grad_log_probs[chunk, None])
            grad.mul_(p)
            columns, is_here = _local_columns(labels[chunk], ctx.start, weight.shape[0])
            rows = torch.arange(len(columns), device=grad.device)[is_here]
            grad[rows, columns[is_here]] += grad_log_probs[chunk][is_here]
            grad = grad.div_(ctx.temperature).to(weight.dtype)
            grad_hidden[chunk] = grad @ weight
            grad_weight.add_(grad.t() @ hidden[chunk])
        return grad_hidden, grad_weight.to(weight.dtype), None, None, None, None, None


def _chunks(tokens: int, size: int) -> list[slice]:
    return [slice(i, min(i + size, tokens)) for i in range(0, tokens, size)]


def _logits(hidden: Tensor, weight: Tensor, temperature: float) -> Tensor:
    """[C, v] float32. The one upcast: the product runs in the model's dtype."""
    logits = (hidden @ weight.t()).float()
    return logits if temperature == 1.0 else logits.div_(temperature)


def _row_max(logits: Tensor) -> Tensor:
    """A rank whose rows are all padding has no column; its maximum is -inf."""
    if logits.shape[1] == 0:
        return logits.new_full((logits.shape[0],), float("-inf"))
    return logits.max(-1).values


def _local_columns(labels: Tensor, start: int, columns: int) -> tuple[Tensor, Tensor]:
    local = labels - start
    return local, (local >= 0) & (local < columns)


def _target(logits: Tensor, labels: Tensor, start: int) -> Tensor:
    """[C] logit of the label where this rank holds it, else 0."""
    columns, is_here = _local_columns(labels, start, logits.shape[1])
    if logits.shape[1] == 0:
        return logits.new_zeros(len(labels))
    picked = logits.gather(1, columns.clamp(0, logits.shape[1] - 1)[:, None])[:, 0]
    return torch.where(is_here, picked, torch.zeros_like(picked))


def _all_reduce(values: Tensor, operation: dist.ReduceOp.RedOpType, group: dist.ProcessGroup) -> Tensor:
    if dist.get_world_size(group) > 1:
        dist.all_reduce(values, op=operation, group=group)
    return values

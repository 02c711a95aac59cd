"""Hidden states -> log-probs and entropy, over a sharded vocabulary, without ever holding ``[T, V/tp]`` logits.

Logits exist for one block, some tokens by some words, and are computed again in backward. Forward goes over the words with
a running maximum and sum; backward needs no sum over words, so it writes each row of the weight's gradient once. Across the
tensor-parallel group only per-token scalars travel, twice a chunk. Forward is the same code with and without gradient, so
both give the same bits.

Legend: T tokens, H hidden, V vocabulary, v this rank's part of it (padded columns left out), C tokens of a chunk, B words of
a block.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
import torch.distributed as dist
from torch import Tensor

CHUNK_TOKENS = 4096
"""C. Every further chunk reads the weight once more."""
BLOCK_ELEMENTS = {"cpu": 1 << 20, "cuda": 1 << 26}
"""C * B. A block fits a CPU's cache; a GPU needs large kernels."""


def multiplies_bfloat16_fast(device: torch.device) -> bool:
    """Return whether the device multiplies bfloat16 fast. A CPU without units for it is many times slower than in float32, so
    there blocks of the operands are converted."""
    if device.type != "cpu":
        return True
    return bool(torch.cpu._is_amx_tile_supported() or torch.cpu._is_avx512_bf16_supported())


@dataclass(frozen=True)
class TokenStatistics:
    """Statistics of the distribution at each token, [T] each."""

    log_probs: Tensor
    """float32, with gradient: of the label."""
    entropy: Tensor
    """float32, with gradient: in nats, exact."""
    log_sum_exp: Tensor
    """float32: of the logits, divided by the temperature."""
    top_log_prob: Tensor
    """float32: of the likeliest word."""
    is_top: Tensor
    """bool: the label is the likeliest word, or one of them."""


def vocab_parallel_statistics(
    hidden: Tensor,
    weight: Tensor,
    labels: Tensor,
    *,
    vocab_size: int,
    temperature: float,
    tp_group: dist.ProcessGroup,
    main_grad: Tensor | None = None,
    is_weight_used_elsewhere: bool = False,
) -> TokenStatistics:
    """``log softmax(hidden @ W^T / temperature)`` at the labels, the exact entropy of that softmax, and its top.

    Args:
        hidden: [T, H], the same on every rank of ``tp_group``. Its gradient is this rank's *part*: the caller sums it over
            the group (Megatron's ``copy_to`` / ``gather_from`` regions do).
        weight: [V_padded / tp, H], this rank's rows of the output embedding.
        labels: [T] int64, in [0, vocab_size).
        vocab_size: V without padding; padded rows get no probability.
        temperature: divides the logits.
        tp_group: ranks that hold the other rows.
        main_grad: [V_padded / tp, H] float32 buffer that the weight's gradient is added to, as Megatron's fused layers do;
            None returns the gradient to autograd.
        is_weight_used_elsewhere: tied embeddings on one stage: autograd then brings the other use's gradient, and must not
            be told that all of it is in ``main_grad`` already.
    """
    block = _Block.of(hidden, weight, vocab_size, temperature, tp_group)
    sink = None if main_grad is None else _GradSink(weight, main_grad, is_weight_used_elsewhere)
    return TokenStatistics(*_Statistics.apply(hidden, weight, labels, block, sink))


@dataclass(frozen=True)
class _Block:
    """One cut of the product hidden x weight, and the meaning of its entries."""

    start: int
    """First word of this rank."""
    valid: int
    """v."""
    width: int
    """B."""
    temperature: float
    group: dist.ProcessGroup
    in_float32: bool
    """Products run in float32, whatever the model's dtype."""

    @classmethod
    def of(
        cls, hidden: Tensor, weight: Tensor, vocab_size: int, temperature: float, group: dist.ProcessGroup
    ) -> _Block:
        start = dist.get_rank(group) * weight.shape[0]
        tokens = max(1, min(len(hidden), CHUNK_TOKENS))
        width = max(1, BLOCK_ELEMENTS[hidden.device.type] // tokens)
        valid = max(0, min(weight.shape[0], vocab_size - start))
        return cls(start, valid, width, temperature, group, not multiplies_bfloat16_fast(hidden.device))

    def words(self) -> list[slice]:
        return [slice(i, min(i + self.width, self.valid)) for i in range(0, self.valid, self.width)]

    def operand(self, x: Tensor) -> Tensor:
        """Return an operand in the type of the products."""
        return x.float() if self.in_float32 else x

    def logits(self, hidden: Tensor, weight: Tensor) -> Tensor:
        """Return the logits of two operands, [C, B] float32."""
        logits = (hidden @ weight.t()).float()
        return logits if self.temperature == 1.0 else logits.div_(self.temperature)

    def columns(self, labels: Tensor, words: slice) -> tuple[Tensor, Tensor]:
        """Return [C] the column of each label in the block, and [C] bool, whether it is there."""
        columns = labels - self.start - words.start
        return columns, (columns >= 0) & (columns < words.stop - words.start)

    def sum(self, *values: Tensor) -> tuple[Tensor, ...]:
        """Return the sums over all ranks."""
        if dist.get_world_size(self.group) == 1:
            return values
        stacked = torch.stack(values)
        dist.all_reduce(stacked, group=self.group)
        return stacked.unbind()

    def max(self, values: Tensor) -> Tensor:
        """Return the maxima over all ranks."""
        values = values.clone()
        if dist.get_world_size(self.group) > 1:
            dist.all_reduce(values, op=dist.ReduceOp.MAX, group=self.group)
        return values


@dataclass(frozen=True)
class _GradSink:
    """Megatron's float32 gradient buffer of the output weight."""

    parameter: Tensor
    main_grad: Tensor
    is_used_elsewhere: bool

    def stand_in(self) -> Tensor | None:
        """Return what autograd gets instead of the gradient."""
        if self.is_used_elsewhere:
            return None
        # The hook of Megatron's DistributedDataParallel wants to see a gradient, and ignores its values then.
        self.parameter.grad_added_to_main_grad = True  # type: ignore[attr-defined]
        return torch.empty_like(self.parameter)


class _RunningSoftmax:
    """Maximum, sum of exponentials and their dot product with the logits, word block by word block."""

    def __init__(self, hidden: Tensor) -> None:
        self.largest = torch.full((len(hidden),), float("-inf"), device=hidden.device)
        self.total, self.dot = torch.zeros_like(self.largest), torch.zeros_like(self.largest)

    def add(self, logits: Tensor) -> None:
        """Add a block of logits, which is overwritten."""
        self.move_to(torch.maximum(self.largest, logits.amax(-1)))
        logits.sub_(self.largest[:, None])
        exp = logits.exp()
        self.total += exp.sum(-1)
        self.dot += exp.mul_(logits).sum(-1)

    def move_to(self, largest: Tensor) -> None:
        """Express the sums relative to another maximum."""
        shift = (self.largest - largest).clamp(min=-1e30)  # at first from -inf, where there is nothing to move
        scale = shift.exp()
        self.dot = scale * (self.dot + self.total * shift)
        self.total = scale * self.total
        self.largest = largest


def _chunks(tokens: int) -> list[slice]:
    return [slice(i, min(i + CHUNK_TOKENS, tokens)) for i in range(0, tokens, CHUNK_TOKENS)]


class _Statistics(torch.autograd.Function):
    @staticmethod
    def forward(ctx, hidden, weight, labels, block, sink):  # type: ignore[no-untyped-def]
        log_probs, entropy, log_sum_exp, top = (
            torch.empty(len(hidden), device=hidden.device, dtype=torch.float32) for _ in range(4)
        )
        is_top = torch.empty(len(hidden), device=hidden.device, dtype=torch.bool)
        for chunk in _chunks(len(hidden)):
            running, rows_of_chunk = _RunningSoftmax(hidden[chunk]), block.operand(hidden[chunk])
            target = torch.zeros_like(running.total)
            is_mine = torch.zeros_like(target, dtype=torch.bool)
            for words in block.words():
                logits = block.logits(rows_of_chunk, block.operand(weight[words]))
                columns, is_here = block.columns(labels[chunk], words)
                picked = logits.gather(1, columns.clamp(0, logits.shape[1] - 1)[:, None])[:, 0]
                target = torch.where(is_here, picked, target)
                is_mine |= is_here
                running.add(logits)
            running.move_to(block.max(running.largest))
            target = torch.where(is_mine, target - running.largest, 0.0)
            target, total, dot = block.sum(target, running.total, running.dot)
            log_total = total.log()
            log_probs[chunk] = target - log_total
            entropy[chunk] = log_total - dot / total
            log_sum_exp[chunk] = running.largest + log_total
            top[chunk] = -log_total
            is_top[chunk] = target == 0
        ctx.save_for_backward(hidden, weight, labels, log_sum_exp, entropy)
        ctx.block, ctx.sink = block, sink
        ctx.set_materialize_grads(False)
        ctx.mark_non_differentiable(log_sum_exp, top, is_top)
        return log_probs, entropy, log_sum_exp, top, is_top

    @staticmethod
    def backward(ctx, grad_log_probs, grad_entropy, *_):  # type: ignore[no-untyped-def]
        hidden, weight, labels, log_sum_exp, entropy = ctx.saved_tensors
        block, sink = ctx.block, ctx.sink
        grad_hidden = torch.empty_like(hidden)
        grad_weight = torch.zeros_like(weight, dtype=torch.float32) if sink is None else sink.main_grad
        for chunk in _chunks(len(hidden)):
            # With l = log p: d log p[y] / dz = 1[y] - p and d entropy / dz = -p (l + entropy).
            of_label = None if grad_log_probs is None else grad_log_probs[chunk] / block.temperature
            of_entropy = None if grad_entropy is None else grad_entropy[chunk, None] / block.temperature
            rows_of_chunk = block.operand(hidden[chunk])
            summed = torch.zeros_like(hidden[chunk], dtype=torch.float32)
            for words in block.words():
                weight_block = block.operand(weight[words])
                log_p = block.logits(rows_of_chunk, weight_block).sub_(log_sum_exp[chunk, None])
                grad = log_p.exp()
                if of_entropy is not None:
                    factor = log_p.add_(entropy[chunk, None]).mul_(-of_entropy)
                    grad.mul_(factor if of_label is None else factor.sub_(of_label[:, None]))
                elif of_label is not None:
                    grad.mul_(-of_label[:, None])
                if of_label is not None:
                    columns, is_here = block.columns(labels[chunk], words)
                    rows = is_here.nonzero()[:, 0]
                    grad[rows, columns[rows]] += of_label[rows]
                grad = grad.to(weight_block.dtype)
                summed += grad @ weight_block
                grad_weight[words] += grad.t() @ rows_of_chunk
            grad_hidden[chunk] = summed
        return grad_hidden, sink.stand_in() if sink else grad_weight.to(weight.dtype), None, None, None

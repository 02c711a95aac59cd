"""Hidden states -> log-probs and entropy, over a sharded vocabulary, without ever holding ``[T, V/tp]`` logits.

Logits exist for one block, some tokens by some words, and are computed again in backward. Forward goes over the words with
a running maximum and sum; backward needs no sum over words, so it writes each row of the weight's gradient once. Across the
tensor-parallel group only per-token scalars travel, twice a chunk. Forward is the same code with and without gradient, so
both give the same bits.

Products are torch's. On a GPU they sum in float32 and leave float32: rounded to bfloat16, logits cost a log-prob up to a
tenth. What then happens to a block is ``vocab_kernels`` on a GPU with Triton, and torch elsewhere.

Legend: T tokens, H hidden, V vocabulary, v this rank's part of it (padded columns left out), C tokens of a chunk, B words of
a block.
"""

from __future__ import annotations

from dataclasses import dataclass
from importlib.util import find_spec
from types import ModuleType

import torch
import torch.distributed as dist
from torch import Tensor

CHUNK_TOKENS = {"cpu": 4096, "cuda": 8192}
"""C. Every further chunk reads the weight once more, and adds to its gradient once more; every further block does that with
the hidden states. On a GPU both cost least in square blocks."""
BLOCK_ELEMENTS = {"cpu": 1 << 20, "cuda": 1 << 26}
"""C * B. A block fits a CPU's cache; a GPU needs large kernels."""
ALIGNED_WORDS = 128
"""B is a multiple of it where kernels run, so that rows of a block begin where tensor cores like them to."""


def uses_kernels(device: torch.device) -> bool:
    """Return True if blocks go through the Triton kernels: on a GPU with Triton. Tests put another function here."""
    return device.type == "cuda" and find_spec("triton") is not None


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


def product(a: Tensor, b: Tensor) -> Tensor:
    """Return ``a @ b`` in float32. A GPU sums and returns float32, whatever the operands; a CPU has no such product."""
    if a.is_cuda and a.dtype != torch.float32:
        return torch.mm(a, b, out_dtype=torch.float32)
    return (a @ b).float()


def add_product(total: Tensor, a: Tensor, b: Tensor) -> None:
    """Add ``a @ b`` to ``total``, on a GPU as part of the product."""
    if not a.is_cuda:
        total += a @ b
    elif total.dtype == a.dtype:
        total.addmm_(a, b)
    else:
        torch.addmm(total, a, b, out_dtype=total.dtype, out=total)


@dataclass(frozen=True)
class _Block:
    """One cut of the product hidden x weight, and the meaning of its entries."""

    start: int
    """First word of this rank."""
    valid: int
    """v."""
    end: int
    """Rows of the weight that are multiplied: v, or with kernels some padding more."""
    width: int
    """B."""
    temperature: float
    group: dist.ProcessGroup
    in_float32: bool
    """Products run in float32, whatever the model's dtype."""
    kernels: ModuleType | None
    """``vocab_kernels``, or None for torch."""

    @classmethod
    def of(
        cls, hidden: Tensor, weight: Tensor, vocab_size: int, temperature: float, group: dist.ProcessGroup
    ) -> _Block:
        device, rows = hidden.device, weight.shape[0]
        start = dist.get_rank(group) * rows
        tokens = max(1, min(len(hidden), CHUNK_TOKENS[device.type]))
        width = max(1, BLOCK_ELEMENTS[device.type] // tokens)
        valid = end = max(0, min(rows, vocab_size - start))
        kernels: ModuleType | None = None
        if uses_kernels(device):
            from megatron_rl.parallel import vocab_kernels

            kernels = vocab_kernels
            end = min(rows, -(-valid // ALIGNED_WORDS) * ALIGNED_WORDS)
            width = max(width // ALIGNED_WORDS * ALIGNED_WORDS, min(width, ALIGNED_WORDS))
        return cls(start, valid, end, width, temperature, group, not multiplies_bfloat16_fast(device), kernels)

    def words(self) -> list[slice]:
        return [slice(i, min(i + self.width, self.end)) for i in range(0, self.valid, self.width)]

    def operand(self, x: Tensor) -> Tensor:
        """Return an operand in the type of the products."""
        return x.float() if self.in_float32 else x

    @property
    def unit(self) -> float:
        """The factor that logits still want: kernels divide by the temperature themselves."""
        return 1.0 if self.kernels is None else 1.0 / self.temperature

    def logits(self, hidden: Tensor, weight: Tensor) -> Tensor:
        """Return the logits of two operands, [C, B] float32, in ``unit``."""
        logits = product(hidden, weight.t())
        return logits if self.temperature == 1.0 or self.kernels is not None else logits.div_(self.temperature)

    def holds(self, labels: Tensor) -> Tensor:
        """Return [C] bool, whether this rank has the label's word."""
        return (labels >= self.start) & (labels < self.start + self.valid)

    def columns(self, labels: Tensor, words: slice) -> tuple[Tensor, Tensor]:
        """Return [C] the column of each label in the block, and [C] bool, whether it is there."""
        columns = labels - self.start - words.start
        return columns, (columns >= 0) & (columns < words.stop - words.start)

    def num_words(self, words: slice) -> int:
        """Return how many of a block's columns are no padding."""
        return min(words.stop, self.valid) - words.start

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
    """The label's logit, maximum, sum of exponentials and their dot product with the logits, word block by word block."""

    def __init__(self, tokens: int, device: torch.device, unit: float) -> None:
        self.largest = torch.full((tokens,), float("-inf"), device=device)
        self.total, self.dot, self.label_logit = (torch.zeros_like(self.largest) for _ in range(3))
        self.unit = unit
        """``_Block.unit``: that of ``largest`` and ``label_logit``."""

    def add(self, logits: Tensor, labels: Tensor, words: slice, block: _Block) -> None:
        """Add a block of logits, which is overwritten."""
        columns, is_here = block.columns(labels, words)
        if block.kernels is not None:
            state = {name: getattr(self, name) for name in ("largest", "total", "dot", "label_logit")}
            block.kernels.add_block(logits, columns, num_words=block.num_words(words), unit=self.unit, **state)
            return
        picked = logits.gather(1, columns.clamp(0, logits.shape[1] - 1)[:, None])[:, 0]
        self.label_logit = torch.where(is_here, picked, self.label_logit)
        self.move_to(torch.maximum(self.largest, logits.amax(-1)))
        logits.sub_(self.largest[:, None])
        exp = logits.exp()
        self.total += exp.sum(-1)
        self.dot += exp.mul_(logits).sum(-1)

    def move_to(self, largest: Tensor) -> None:
        """Express the sums relative to another maximum."""
        shift = ((self.largest - largest) * self.unit).clamp(min=-1e30)  # at first from -inf: there is nothing to move
        scale = shift.exp()
        self.dot = scale * (self.dot + self.total * shift)
        self.total = scale * self.total
        self.largest = largest


@dataclass(frozen=True)
class _TokenGradients:
    """Parts of the gradient of a chunk's logits, [C] float32 each.

    With l = log p: d log p[y] / dz = 1[y] - p and d entropy / dz = -p (l + entropy).
    """

    largest: Tensor
    log_total: Tensor
    entropy: Tensor
    of_label: Tensor | None
    of_entropy: Tensor | None
    """Gradients that come from above, divided by the temperature."""

    def of(self, logits: Tensor, labels: Tensor, words: slice, block: _Block, dtype: torch.dtype) -> Tensor:
        """Return the gradient of a block of logits, which is overwritten, in the type of the products."""
        columns, is_here = block.columns(labels, words)
        if block.kernels is not None:
            return block.kernels.gradient(
                logits, columns, num_words=block.num_words(words), unit=block.unit, dtype=dtype, **vars(self)
            )
        log_p = logits.sub_((self.largest + self.log_total)[:, None])
        grad = log_p.exp()
        if self.of_entropy is not None:
            factor = log_p.add_(self.entropy[:, None]).mul_(-self.of_entropy[:, None])
            grad.mul_(factor if self.of_label is None else factor.sub_(self.of_label[:, None]))
        elif self.of_label is not None:
            grad.mul_(-self.of_label[:, None])
        if self.of_label is not None:
            rows = is_here.nonzero()[:, 0]
            grad[rows, columns[rows]] += self.of_label[rows]
        return grad.to(dtype)


def _chunks(hidden: Tensor) -> list[slice]:
    tokens, most = len(hidden), CHUNK_TOKENS[hidden.device.type]
    return [slice(i, min(i + most, tokens)) for i in range(0, tokens, most)]


class _Statistics(torch.autograd.Function):
    @staticmethod
    def forward(ctx, hidden, weight, labels, block, sink):  # type: ignore[no-untyped-def]
        log_probs, entropy, largest, log_totals = (
            torch.empty(len(hidden), device=hidden.device, dtype=torch.float32) for _ in range(4)
        )
        is_top = torch.empty(len(hidden), device=hidden.device, dtype=torch.bool)
        for chunk in _chunks(hidden):
            rows = block.operand(hidden[chunk])
            running = _RunningSoftmax(len(rows), rows.device, block.unit)
            for words in block.words():
                running.add(block.logits(rows, block.operand(weight[words])), labels[chunk], words, block)
            running.move_to(block.max(running.largest))
            target = (running.label_logit - running.largest) * block.unit
            target = torch.where(block.holds(labels[chunk]), target, 0.0)
            target, total, dot = block.sum(target, running.total, running.dot)
            log_total = total.log()
            log_probs[chunk] = target - log_total
            entropy[chunk] = log_total - dot / total
            largest[chunk] = running.largest
            log_totals[chunk] = log_total
            is_top[chunk] = target == 0
        log_sum_exp, top = largest * block.unit + log_totals, -log_totals
        ctx.save_for_backward(hidden, weight, labels, largest, log_totals, entropy)
        ctx.block, ctx.sink = block, sink
        ctx.set_materialize_grads(False)
        ctx.mark_non_differentiable(log_sum_exp, top, is_top)
        return log_probs, entropy, log_sum_exp, top, is_top

    @staticmethod
    def backward(ctx, grad_log_probs, grad_entropy, *_):  # type: ignore[no-untyped-def]
        hidden, weight, labels, largest, log_totals, entropy = ctx.saved_tensors
        block, sink = ctx.block, ctx.sink
        grad_hidden = torch.empty_like(hidden)
        grad_weight = torch.zeros_like(weight, dtype=torch.float32) if sink is None else sink.main_grad
        for chunk in _chunks(hidden):
            of_label, of_entropy = (
                None if given is None else given[chunk].contiguous() / block.temperature
                for given in (grad_log_probs, grad_entropy)
            )
            given = _TokenGradients(largest[chunk], log_totals[chunk], entropy[chunk], of_label, of_entropy)
            rows = block.operand(hidden[chunk])
            summed = torch.zeros_like(hidden[chunk], dtype=torch.float32)
            for words in block.words():
                weight_block = block.operand(weight[words])
                grad = given.of(block.logits(rows, weight_block), labels[chunk], words, block, weight_block.dtype)
                add_product(summed, grad, weight_block)
                add_product(grad_weight[words], grad.t(), rows)
                del grad  # before the next block's logits are there
            grad_hidden[chunk] = summed
        return grad_hidden, sink.stand_in() if sink else grad_weight.to(weight.dtype), None, None, None

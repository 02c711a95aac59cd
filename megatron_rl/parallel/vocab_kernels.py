"""Triton kernels over one block of logits, as a product has left it: statistics in one pass, the gradient in another.

A program takes one token and goes over its row, 4 bytes a logit. What runs without them (``vocab``) reads and writes a block
of this size some ten times. Logits come undivided: ``unit``, one over the temperature, multiplies their distance from the
maximum, where it costs no precision.

``vocab`` imports this module only where it uses it, since Triton is not on every machine.

Legend: C tokens of a chunk, W columns of a block. Columns from ``num_words`` on are padding: they count for nothing,
and their gradient is zero. They are loaded all the same, since masks at whole 16 bytes let loads be that wide.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

TILE = 4096
"""Columns that a program takes at a time."""
NUM_WARPS = 8


def add_block(
    logits: Tensor,
    columns: Tensor,
    *,
    num_words: int,
    unit: float,
    largest: Tensor,
    total: Tensor,
    dot: Tensor,
    label_logit: Tensor,
) -> None:
    """Add a block to the running statistics of its tokens, which are changed in place.

    Args:
        logits: [C, W] float32, contiguous.
        columns: [C] int64, the label's column; outside of [0, num_words) the label is in another block or on another rank.
        num_words: columns that are words.
        unit: one over the temperature.
        largest: [C] float32, the maximum of the logits, not multiplied by ``unit``.
        total: [C] float32, the sum of exp(x) with x = (logit - largest) * unit.
        dot: [C] float32, the sum of x exp(x).
        label_logit: [C] float32, set where the label is in this block.
    """
    assert logits.is_contiguous() and logits.dtype == torch.float32 and 0 < num_words <= logits.shape[1]
    _statistics[(len(logits),)](
        logits, columns, largest, total, dot, label_logit, logits.shape[1], num_words, unit,
        TILE=TILE, num_warps=NUM_WARPS,
    )  # fmt: skip


def gradient(
    logits: Tensor,
    columns: Tensor,
    *,
    num_words: int,
    unit: float,
    largest: Tensor,
    log_total: Tensor,
    entropy: Tensor,
    of_label: Tensor | None,
    of_entropy: Tensor | None,
    dtype: torch.dtype,
) -> Tensor:
    """Return the gradient of a block's logits, [C, W] in ``dtype``; in float32 it takes the place of the logits.

    With l = log p: -p (of_label + of_entropy (l + entropy)), and of_label more at the label.

    Args:
        logits: [C, W] float32, contiguous.
        columns: [C] int64, as in :func:`add_block`.
        num_words: columns that are words.
        unit: one over the temperature.
        largest: [C] float32, of the whole row, over all blocks and ranks; so are the next two.
        log_total: [C] float32, the logarithm of ``add_block``'s total.
        entropy: [C] float32, in nats.
        of_label: [C] float32, the gradient of the label's log-prob times ``unit``; None: there is none.
        of_entropy: [C] float32, likewise of the entropy.
        dtype: what the next products take.
    """
    assert logits.is_contiguous() and logits.dtype == torch.float32 and 0 < num_words <= logits.shape[1]
    found = logits if dtype == torch.float32 else torch.empty_like(logits, dtype=dtype)
    _gradient[(len(logits),)](
        logits, found, columns, largest, log_total, entropy, of_label, of_entropy,
        logits.shape[1], num_words, unit, TILE=TILE, num_warps=NUM_WARPS,
    )  # fmt: skip
    return found


@triton.jit
def _statistics(  # type: ignore[no-untyped-def]
    logits, columns, largest, total, dot, label_logit, width, num_words, unit, TILE: tl.constexpr
):
    token = tl.program_id(0).to(tl.int64)
    logits += token * width
    maximum = tl.load(largest + token)
    summed = tl.load(total + token)
    dotted = tl.load(dot + token)
    for start in range(0, num_words, TILE):
        word = start + tl.arange(0, TILE)
        is_word = word < num_words
        z = tl.load(logits + word, mask=word < width, other=float("-inf"))
        z = tl.where(is_word, z, float("-inf"))
        higher = tl.maximum(maximum, tl.max(z, 0))
        shift = tl.maximum((maximum - higher) * unit, -1e30)  # at first from -inf, where there is nothing to move
        scale = tl.exp(shift)
        dotted = scale * (dotted + summed * shift)
        summed = scale * summed
        maximum = higher
        x = (z - maximum) * unit
        exp = tl.exp(x)
        summed += tl.sum(tl.where(is_word, exp, 0.0), 0)
        dotted += tl.sum(tl.where(is_word, exp * x, 0.0), 0)
    tl.store(largest + token, maximum)
    tl.store(total + token, summed)
    tl.store(dot + token, dotted)
    label = tl.load(columns + token)
    is_here = (label >= 0) & (label < num_words)
    tl.store(label_logit + token, tl.load(logits + label, mask=is_here, other=0.0), mask=is_here)


@triton.jit
def _gradient(  # type: ignore[no-untyped-def]
    logits,
    found,
    columns,
    largest,
    log_total,
    entropy,
    of_label,
    of_entropy,
    width,
    num_words,
    unit,
    TILE: tl.constexpr,
):
    token = tl.program_id(0).to(tl.int64)
    logits += token * width
    found += token * width
    maximum = tl.load(largest + token)
    log_sum = tl.load(log_total + token)
    label = tl.load(columns + token)
    for start in range(0, width, TILE):
        word = start + tl.arange(0, TILE)
        is_word = word < num_words
        z = tl.load(logits + word, mask=word < width, other=float("-inf"))
        z = tl.where(is_word, z, float("-inf"))
        log_p = (z - maximum) * unit - log_sum
        p = tl.exp(log_p)
        factor = tl.zeros_like(p)
        if of_label is not None:
            factor += tl.load(of_label + token)
        if of_entropy is not None:
            factor += tl.load(of_entropy + token) * (log_p + tl.load(entropy + token))
        grad = tl.where(is_word, -p * factor, 0.0)
        if of_label is not None:
            grad += tl.where(is_word & (word == label), tl.load(of_label + token), 0.0)
        tl.store(found + word, grad, mask=word < width)

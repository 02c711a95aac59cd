"""TrainingSample -> MicroBatch and back. The only place where labels are shifted.

Sequences are packed end to end (THD), without padding unless context parallelism has to cut each of them. A row's response
token j is the label of position ``P + j - 1``:

    row        p0 p1 p2 | r0 r1        P = 3 prompt tokens, R = 2 response tokens
    input_ids  p0 p1 p2   r0 r1
    labels     p1 p2 r0   r1 0
    mask        .  .  x    x  .        response_mask: the label is a response token
"""

from __future__ import annotations

import heapq
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from itertools import cycle, islice

import torch
import torch.distributed as dist
from torch import Tensor

from megatron_rl.config import PolicyConfig
from megatron_rl.errors import UserError
from megatron_rl.parallel.context import sum_over_ranks, zigzag_indices
from megatron_rl.types import MicroBatch, TrainingSample

VECTOR_FIELDS = ("weights", "advantages", "old_log_probs", "ref_log_probs")
"""Per-token fields of a sample that travel with a micro-batch where they are set."""

FP8_TOKEN_MULTIPLE = 16
"""FP8 products need a token dimension that is a multiple of this."""


def plan_micro_batches(
    num_tokens: Sequence[int],
    *,
    num_ranks: int,
    max_tokens: int,
    count_multiple: int = 1,
    quadratic_length: float = math.inf,
    units: Sequence[int | None] | None = None,
) -> list[list[list[int]]]:
    """Deal rows to data-parallel ranks and micro-batches: balanced, deterministic, the same count on every rank.

    Longest row first, each into the emptiest bin: the load of the fullest bin is then at most 4/3 of the best possible.
    Bins go to ranks by their cost, dearest first; in each round the dearest goes to the rank with the least cost so far.

    Args:
        num_tokens: tokens of every row of the mini-batch, over all ranks.
        num_ranks: data-parallel size.
        max_tokens: budget of one micro-batch.
        count_multiple: the number of micro-batches of a rank is a multiple of this.
        quadratic_length: length at which attention costs as much as everything else; a row costs
            ``length * (1 + length / quadratic_length)``.
        units: a number for each row; rows with the same one go into one micro-batch, in place of a single row above. None,
            for all rows or for one: the row stands alone.

    Returns:
        ``plan[rank][micro_batch]`` is a list of row indices in rising order. Every rank gets equally many micro-batches,
        none of them empty.

    Raises:
        UserError: a row or a unit is longer than the budget, or there are too few of them to give every rank
            ``count_multiple`` micro-batches within it.
    """
    items = _units(units or [None] * len(num_tokens))
    sizes = [sum(num_tokens[row] for row in rows) for rows in items]
    if max(num_tokens) > max_tokens:
        raise too_long(max(num_tokens), max_tokens)
    if max(sizes) > max_tokens:
        longest = items[sizes.index(max(sizes))]
        raise too_long(max(sizes), max_tokens, num_rows=len(longest))
    bins = _bins(items, sizes, max_tokens, num_ranks=num_ranks, count_multiple=count_multiple)
    costs = [sum(num_tokens[row] * (1 + num_tokens[row] / quadratic_length) for row in rows) for rows in bins]
    dearest_first = sorted(range(len(bins)), key=lambda index: (-costs[index], index))
    plan: list[list[list[int]]] = [[] for _ in range(num_ranks)]
    spent = [0.0] * num_ranks
    for start in range(0, len(bins), num_ranks):
        ranks = sorted(range(num_ranks), key=lambda rank: (spent[rank], rank))
        for rank, index in zip(ranks, dearest_first[start : start + num_ranks]):
            plan[rank].append(sorted(bins[index]))
            spent[rank] += costs[index]
    return plan


def _units(units: Sequence[int | None]) -> list[list[int]]:
    """Return the rows that stay together, in order of their first rows; a row without a unit is alone."""
    found: dict[tuple[bool, int], list[int]] = {}
    for row, unit in enumerate(units):
        found.setdefault((unit is None, row if unit is None else unit), []).append(row)
    return list(found.values())


def _bins(
    items: Sequence[Sequence[int]], sizes: Sequence[int], max_tokens: int, *, num_ranks: int, count_multiple: int
) -> list[list[int]]:
    """Return the rows of each micro-batch of all ranks: as few as hold the items within the budget, none of them empty."""
    multiple = num_ranks * count_multiple
    most = len(items) // multiple
    num_rows = sum(map(len, items))
    name = "rows" if num_rows == len(items) else "units of rows"
    if most == 0:
        raise UserError(
            "policy.train_global_batch_size",
            num_rows,
            f"is too small: {num_ranks} data-parallel ranks need {count_multiple} micro-batches each, and none is empty",
            f"use at least {multiple}" + ("" if name == "rows" else f" {name}: those of a unit stay together"),
        )
    longest_first = sorted(range(len(items)), key=lambda item: (-sizes[item], item))
    count = min(most, max(1, -(-sum(sizes) // (multiple * max_tokens))))
    while True:
        bins = _fill_evenly(longest_first, sizes, count * multiple)
        if all(load <= max_tokens for load, _ in bins):
            return [[row for item in chosen for row in items[item]] for _, chosen in bins]
        if count == most:
            raise UserError(
                "policy.train_micro_batch_tokens",
                max_tokens,
                f"is too small: {len(items)} {name} have to make at most {most * multiple} micro-batches "
                f"({num_ranks} data-parallel ranks, {count_multiple} at a time), and some must share one",
                f"raise it, or use a multiple of {multiple} for policy.train_global_batch_size",
            )
        count = min(most, count + max(1, count // 100))


def full_batches(rows: Sequence[int], *, size: int, multiple: int) -> list[list[int]]:
    """Cut the rows of a forward pass into batches of which every rank gets a share.

    Where rows are missing to a multiple of ``multiple``, the first ones go twice. ``size`` is a multiple of ``multiple``.
    """
    filled = [*rows, *islice(cycle(rows), -len(rows) % multiple)] if rows else []
    return [filled[start : start + size] for start in range(0, len(filled), size)]


def too_long(longest: int, max_tokens: int, *, num_rows: int = 1) -> UserError:
    """Return the error for a row, or a unit of ``num_rows`` rows, that no micro-batch has room for."""
    what = "row has" if num_rows == 1 else f"unit of rows that stay together has {num_rows} rows and"
    return UserError(
        "policy.train_micro_batch_tokens",
        max_tokens,
        f"the longest {what} {longest} tokens, which must fit into one micro-batch",
        f"use {longest} or more, or shorter prompts and responses",
    )


def _fill_evenly(longest_first: Sequence[int], sizes: Sequence[int], count: int) -> list[tuple[int, list[int]]]:
    """Return (load, items) of each bin."""
    heap = [(0, index) for index in range(count)]
    items: list[list[int]] = [[] for _ in range(count)]
    loads = [0] * count
    for item in longest_first:
        load, index = heap[0]
        items[index].append(item)
        loads[index] = load + sizes[item]
        heapq.heapreplace(heap, (loads[index], index))
    return list(zip(loads, items))


@dataclass(frozen=True)
class PackLayout:
    """Requirements of a training layout on a pack."""

    tp_size: int = 1
    """Ranks that split the tokens between layers: the tensor-parallel size under sequence parallelism, else 1."""
    cp_size: int = 1
    cp_rank: int = 0
    token_multiple: int = 1
    """The tokens of each of those ranks are a multiple of this, as FP8 products need it."""
    cp_group: dist.ProcessGroup | None = None
    """The context-parallel ranks, for sums over a sequence in a loss; not needed to pack."""

    @property
    def sequence_multiple(self) -> int:
        """Multiple to which every sequence is padded."""
        return 1 if self.cp_size == 1 else 2 * self.cp_size * self.tp_size

    @property
    def pack_multiple(self) -> int:
        """The pack's length is padded to a multiple of this, itself a multiple of ``sequence_multiple`` under CP."""
        return self.tp_size * math.lcm(self.token_multiple, 2 if self.cp_size > 1 else 1) * self.cp_size

    def padded(self, num_tokens: int) -> int:
        """Return the tokens that a row takes in a pack."""
        return num_tokens + -num_tokens % self.sequence_multiple


def pack_layout(policy: PolicyConfig, *, cp_rank: int = 0, cp_group: dist.ProcessGroup | None = None) -> PackLayout:
    """Return the requirements of a config's layout on a pack."""
    is_sequence_parallel = bool(policy.megatron_cfg.get("sequence_parallel"))
    tp_size = policy.tensor_parallel_size if is_sequence_parallel else 1
    token_multiple = 1
    if policy.megatron_cfg.get("fp8"):
        recipe = policy.megatron_cfg.get("fp8_recipe")
        token_multiple = 2 * FP8_TOKEN_MULTIPLE if recipe == "mxfp8" else FP8_TOKEN_MULTIPLE
        if recipe == "blockwise" and is_sequence_parallel:
            # Transformer Engine up to 2.13 gathers only whole blocks of 128 tokens from each rank, and fails with others.
            token_multiple = 128
    return PackLayout(tp_size, policy.context_parallel_size, cp_rank, token_multiple, cp_group)


def pack(samples: Sequence[TrainingSample], rows: Sequence[int], layout: PackLayout = PackLayout()) -> MicroBatch:
    """Put the given rows of a mini-batch end to end.

    Args:
        samples: the whole mini-batch.
        rows: which of them, in packing order.
        layout: what is padded: under context parallelism each sequence, at its end; under sequence parallelism alone, and in
            eight bits, the pack, with a last sequence. No mask selects padding. Under context parallelism the result is this
            rank's part.
    """
    chosen = [samples[row] for row in rows]
    lengths = [layout.padded(sample.num_tokens) for sample in chosen]
    total = sum(lengths)
    multiple = layout.pack_multiple
    padding = -total % multiple
    size = total + padding

    input_ids = torch.zeros(size, dtype=torch.int64)
    labels = torch.zeros(size, dtype=torch.int64)
    position_ids = torch.zeros(size, dtype=torch.int64)
    response_mask = torch.zeros(size, dtype=torch.bool)
    loss_mask = torch.zeros(size, dtype=torch.bool)
    vectors = {name: torch.zeros(size) for name in vector_names(samples)}
    sequence, kind = torch.full((size,), -1), torch.full((size,), -1)
    told = next((sample.experts for sample in chosen if sample.experts is not None), None)
    experts = None if told is None else torch.full((size, *told.shape[1:]), -1, dtype=torch.int16)

    start = 0
    for number, (sample, length) in enumerate(zip(chosen, lengths)):
        ids = torch.cat([sample.prompt_ids, sample.response_ids])
        input_ids[start : start + len(ids)] = ids
        labels[start : start + len(ids) - 1] = ids[1:]
        position_ids[start : start + length] = torch.arange(length)
        sequence[start : start + len(ids)] = number
        kind[start : start + len(ids)] = int(sample.kind)
        if experts is not None and sample.experts is not None:
            experts[start : start + len(sample.experts)] = sample.experts
        where = response_slice(start, sample)
        response_mask[where] = True
        loss_mask[where] = True if sample.loss_mask is None else sample.loss_mask
        for name in vectors:
            vector = getattr(sample, name) if name in VECTOR_FIELDS else sample.extra.get(name)
            if vector is not None:
                vectors[name][where] = vector
        start += length
    position_ids[total:] = torch.arange(padding)

    borders = [0, *torch.tensor(lengths).cumsum(0).tolist()]
    if padding:
        borders.append(size)
    cu_seqlens = torch.tensor(borders, dtype=torch.int32)
    held = zigzag_indices(cu_seqlens, size=layout.cp_size, rank=layout.cp_rank)
    return MicroBatch(
        input_ids=input_ids[held],
        labels=labels[held],
        position_ids=position_ids[held],
        cu_seqlens=cu_seqlens,
        max_seqlen=max(*lengths, padding),
        response_mask=response_mask[held],
        loss_mask=loss_mask[held],
        rows=list(rows),
        token_indices=held,
        sequence=sequence[held],
        kind=kind[held],
        lengths=torch.tensor([sample.num_tokens for sample in chosen]),
        experts=None if experts is None else experts[held],
        vectors={name: vector[held] for name, vector in vectors.items()},
        sum_over_cp=None if layout.cp_size == 1 else partial(sum_over_ranks, group=layout.cp_group),
    )


def vector_names(samples: Sequence[TrainingSample]) -> list[str]:
    """Return the names of the vectors in every pack of a mini-batch: those of any row. A row without one has zeros."""
    own = dict.fromkeys(name for sample in samples for name in sample.extra)
    assert not own.keys() & set(VECTOR_FIELDS), f"extra vectors {list(own)} have names of built-in ones"
    return [name for name in VECTOR_FIELDS if any(getattr(sample, name) is not None for sample in samples)] + list(own)


def response_slice(start: int, sample: TrainingSample) -> slice:
    """Return the positions whose labels are the response of a sample that starts at ``start`` in the pack."""
    first = start + len(sample.prompt_ids) - 1
    return slice(first, first + sample.num_response_tokens)


def unpack(values: Mapping[str, Tensor], micro_batch: MicroBatch, samples: Sequence[TrainingSample]) -> None:
    """Write packed per-token vectors back into their samples: the inverse of ``pack``.

    Under context parallelism, what other ranks hold is 0.0: the sum over the ranks is whole.

    Args:
        values: field name -> [T] float32.
        micro_batch: what ``pack`` made of ``samples``.
        samples: the whole mini-batch; the rows of the micro-batch get the fields set to [R] float32.
    """
    starts = micro_batch.cu_seqlens.tolist()
    for name, value in values.items():
        whole = torch.zeros(starts[-1]).index_copy(0, micro_batch.token_indices.cpu(), value)
        for start, row in zip(starts, micro_batch.rows):
            setattr(samples[row], name, whole[response_slice(start, samples[row])].clone())

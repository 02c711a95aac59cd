"""Share completions between ranks as flat tensors: of one rank with all, or of all with all.

Token ids travel and stay as int32: a step's rows are on every rank, and ``data/pack.py`` widens the ids of one micro-batch.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
import torch.distributed as dist
from torch import Tensor

from megatron_rl.types import FINISH_REASONS, Completion


def flatten(completions: Sequence[Completion]) -> dict[str, Tensor]:
    """Put completions end to end in four flat tensors.

    Returns:
        ``meta`` [n, 6] int64 (tokens, finish reason, weight version, and the three dimensions of ``experts``, 0 where there
        are none), ``ids`` [sum of tokens] int32, ``log_probs`` [sum of tokens] float32, ``experts`` uint8: the bytes of all
        int16 numbers, because gloo knows no int16.
    """
    experts = [c.experts if c.experts is not None else torch.empty(0, 0, 0, dtype=torch.int16) for c in completions]
    meta = [
        (len(c.response_ids), FINISH_REASONS.index(c.finish_reason), c.weight_version, *chosen.shape)
        for c, chosen in zip(completions, experts)
    ]
    return {
        "meta": torch.tensor(meta, dtype=torch.int64).reshape(-1, 6),
        "ids": torch.cat([torch.empty(0, dtype=torch.int32), *(c.response_ids.int() for c in completions)]),
        "log_probs": torch.cat([c.log_probs for c in completions] or [torch.empty(0)]),
        "experts": torch.cat([torch.empty(0, dtype=torch.int16), *(chosen.flatten() for chosen in experts)]).view(
            torch.uint8
        ),
    }


def unflatten(flat: dict[str, Tensor]) -> list[Completion]:
    """Undo ``flatten``.

    Each completion gets ids and log-probs of its own, because views would keep those of all others in memory: rows and
    successes outlive their step, and most completions of a step may be dropped. Experts are views: they come with rows that
    are all trained on, and are too large to exist twice. Ids may be int64 in old records.
    """
    sizes = flat["meta"][:, 0].tolist()
    experts = flat["experts"].view(torch.int16).split(flat["meta"][:, 3:].prod(1).tolist())
    parts = zip(flat["meta"].tolist(), flat["ids"].int().split(sizes), flat["log_probs"].split(sizes), experts)
    return [
        Completion(
            ids.clone(), log_probs.clone(), FINISH_REASONS[reason], version, chosen.view(shape) if shape[0] else None
        )
        for (_, reason, version, *shape), ids, log_probs, chosen in parts
    ]


def gather_completions(mine: Sequence[Completion], group: dist.ProcessGroup) -> list[list[Completion]]:
    """Gather every rank's completions on every rank. A collective.

    Args:
        mine: this rank's completions.
        group: all ranks, over gloo.

    Returns:
        One list per rank.
    """
    flat = flatten(mine)
    world_size = dist.get_world_size(group)
    counts = torch.tensor([len(values) for values in flat.values()])
    all_counts = [torch.zeros_like(counts) for _ in range(world_size)]
    dist.all_gather(all_counts, counts, group=group)
    sizes = torch.stack(all_counts, dim=1).tolist()
    gathered = {name: _gather_uneven(flat[name], lengths, group) for name, lengths in zip(flat, sizes)}
    return [unflatten({name: parts[rank] for name, parts in gathered.items()}) for rank in range(world_size)]


def _gather_uneven(values: Tensor, sizes: Sequence[int], group: dist.ProcessGroup) -> list[Tensor]:
    """Gather tensors of several lengths: padded to the longest for gloo, which wants equal sizes, and cut afterwards."""
    padded = values.new_zeros((max(sizes), *values.shape[1:]))
    padded[: len(values)] = values
    parts = [torch.empty_like(padded) for _ in sizes]
    dist.all_gather(parts, padded, group=group)
    return [part[:size].clone() for part, size in zip(parts, sizes)]


def broadcast_completions(completions: Sequence[Completion] | None, group: dist.ProcessGroup) -> list[Completion]:
    """Broadcast the completions of the group's first rank. A collective.

    Args:
        completions: those to send, on the first rank; ignored on the others.
        group: all ranks, over gloo.
    """
    source = dist.get_global_rank(group, 0)
    if dist.get_rank(group) == 0:
        assert completions is not None
        flat = flatten(completions)
        sizes = torch.tensor([len(values) for values in flat.values()])
    else:
        flat = flatten([])
        sizes = torch.zeros(len(flat), dtype=torch.int64)
    dist.broadcast(sizes, source, group=group)
    if dist.get_rank(group) != 0:
        flat = {
            name: values.new_empty(size, *values.shape[1:])
            for (name, values), size in zip(flat.items(), sizes.tolist())
        }
    for tensor in flat.values():
        dist.broadcast(tensor, source, group=group)
    return unflatten(flat)

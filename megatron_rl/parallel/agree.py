"""Exchange of plain data between ranks, as JSON and never as pickles; and agreement on errors.

If one rank raises, all ranks raise the same error instead of hanging in the next collective.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from datetime import timedelta
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from megatron_rl.errors import UserError


@contextmanager
def all_ranks_agree(cpu_group: dist.ProcessGroup) -> Iterator[None]:
    """Run a block that may raise ``UserError`` on some ranks; afterwards either none or all of them raise it.

    The block must not contain a collective that only the healthy ranks would reach. Every rank enters the block.

    Args:
        cpu_group: all ranks, over gloo.

    Raises:
        UserError: on every rank, the one of the lowest rank that failed.
    """
    mine: UserError | None = None
    try:
        yield
    except UserError as error:
        mine = error
    raise_first(gather_json(error_to_json(mine), cpu_group), cause=mine.__cause__ if mine else None)


def are_all_here(group: dist.ProcessGroup, limit_s: float) -> bool:
    """Wait for all ranks of a group over gloo, but not for ever; False where one does not come in time."""
    try:
        work = dist.all_reduce(torch.zeros(1), group=group, async_op=True)
        assert work is not None
        work.wait(timedelta(seconds=limit_s))
    except RuntimeError:
        return False
    return True


def broadcast_json(value: Any, cpu_group: dist.ProcessGroup) -> Any:
    """Return the plain data of the group's first rank, on every rank."""
    source = dist.get_global_rank(cpu_group, 0)
    encoded = _encode(value)
    size = torch.tensor([len(encoded)])
    dist.broadcast(size, source, group=cpu_group)
    if dist.get_rank(cpu_group) != 0:
        encoded = torch.empty(int(size), dtype=torch.uint8)
    dist.broadcast(encoded, source, group=cpu_group)
    return _decode(encoded)


def gather_json(value: Any, cpu_group: dist.ProcessGroup) -> list[Any]:
    """Return the plain data of every rank, on every rank, in the order of ranks."""
    encoded = _encode(value)
    sizes = [torch.zeros(1, dtype=torch.int64) for _ in range(dist.get_world_size(cpu_group))]
    dist.all_gather(sizes, torch.tensor([len(encoded)]), group=cpu_group)
    padded = torch.zeros(max(int(size) for size in sizes), dtype=torch.uint8)
    padded[: len(encoded)] = encoded
    gathered = [torch.empty_like(padded) for _ in sizes]
    dist.all_gather(gathered, padded, group=cpu_group)
    return [_decode(row[: int(size)]) for row, size in zip(gathered, sizes)]


def error_to_json(error: UserError | None) -> list[Any] | None:
    """The four parts of an error; a value that JSON does not know becomes text."""
    if error is None:
        return None
    try:
        value = json.loads(json.dumps(error.value))
    except (TypeError, ValueError):
        value = str(error.value)
    return [error.field, value, error.rule, error.fix]


def raise_first(errors: Sequence[list[Any] | None], *, cause: BaseException | None = None) -> None:
    """Raise the first error of a list that every rank has alike; nothing where there is none."""
    for error in errors:
        if error is not None:
            raise UserError(*error) from cause


def _encode(value: Any) -> Tensor:
    return torch.frombuffer(bytearray(json.dumps(value).encode()), dtype=torch.uint8)


def _decode(encoded: Tensor) -> Any:
    return json.loads(encoded.numpy().tobytes())

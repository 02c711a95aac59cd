"""Ranks agree before they stop: an error on one becomes the same error on all, and nobody waits for the dead."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import torch.distributed as dist

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
    everyone: list[UserError | None] = [None] * dist.get_world_size(cpu_group)
    dist.all_gather_object(everyone, mine, group=cpu_group)
    first = next((error for error in everyone if error is not None), None)
    if first is not None:
        raise first from (mine.__cause__ if mine else None)

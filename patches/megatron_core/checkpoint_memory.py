"""Gather the optimizer's state for a checkpoint without spare copies of it.

Why: the distributed optimizer copies weights and moments into flat shards, all three at once, receives each into further
    buffers, joins these, and only then fills the tensors that are written. One rank alone needs nine times the size of its
    float32 weights for that, on top of what it holds anyway.
Upstream: ``DistributedOptimizer.get_parameter_state_dp_zero`` in megatron/core/optimizer/distrib_optimizer.py
Versions: 0.16.1 - 0.19.2 (tested on 0.16.1)
Remove when: upstream receives one kind of state after the other, in its place.
Tested by: tests/unit/patches/test_patch_checkpoint_memory.py
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Mapping
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from .upstream import replace


def apply() -> None:
    """Replace the gathering."""
    from megatron.core.optimizer.distrib_optimizer import DistributedOptimizer

    replace(DistributedOptimizer, "get_parameter_state_dp_zero", _in_place_of)


def _in_place_of(original: Callable[..., Any]) -> Callable[..., Any]:
    @functools.wraps(original)
    def get_state(
        self: Any, use_gloo_comm: bool = True, empty_data: bool = False, return_on_all_ranks: bool = False
    ) -> dict[Any, Any] | None:
        state = original(self, use_gloo_comm, empty_data=True, return_on_all_ranks=return_on_all_ranks)
        if empty_data:
            return state
        group = self.data_parallel_group_gloo if use_gloo_comm else self.data_parallel_group
        for index, ranges in enumerate(self.gbuf_ranges):
            for dtype, shards in ranges.items():
                for key in ("param", *getattr(self, "optimizer_state_keys", ("exp_avg", "exp_avg_sq"))):
                    start = 0
                    for bucket, shard in zip(self.buffers[index].buckets, shards, strict=True):
                        end = start + bucket.numel_unpadded
                        whole = None if state is None else state[index][dtype][key][start:end]
                        start = end
                        if group.size() == 1:
                            assert whole is not None
                            _fill(whole, self, shard["param_map"], key)
                            continue
                        part = torch.zeros(bucket.grad_data.numel() // group.size())
                        _fill(part, self, shard["param_map"], key)
                        _gather(part, whole, group, on_all_ranks=return_on_all_ranks)
        return state

    return get_state


def _fill(shard: Tensor, optimizer: Any, places: Mapping[Any, Any], key: str) -> None:
    """Copy one kind of state of this rank's parameters into their places in the flat shard."""
    for parameter, place in places.items():
        value = optimizer._get_main_param_and_optimizer_states(parameter)[key]
        shard[place["gbuf_local"].start : place["gbuf_local"].end].copy_(value.detach())


def _gather(part: Tensor, whole: Tensor | None, group: dist.ProcessGroup, *, on_all_ranks: bool) -> None:
    """Put the parts of all ranks together, without the padding at their end; None: only rank 0 has a place for them."""
    if whole is None:
        dist.gather(part, None, group=group, group_dst=0)
        return
    padded = part.new_empty(group.size() * len(part))
    if on_all_ranks:
        dist.all_gather(list(padded.chunk(group.size())), part, group=group)
    else:
        dist.gather(part, list(padded.chunk(group.size())), group=group, group_dst=0)
    whole.copy_(padded[: len(whole)])

"""Uneven all-gather and reduce-scatter over gloo, and the distributed optimizer's own two on a single rank.

Why: gloo has no all-gather and no reduce-scatter of parts of different sizes. Megatron needs both when experts are
    tensor parallel, because each rank then holds another number of tokens.
    In a group of one gloo copies, in a thread of its own with an OpenMP team of its own; from then on libgomp counts more
    threads than cores and lets the compute threads sleep between operations: everything after the first update is slower.
Upstream: ``_gather_along_first_dim`` and ``_reduce_scatter_along_first_dim`` in
    megatron/core/tensor_parallel/mappings.py; ``dist_all_gather_func`` and ``dist_reduce_scatter_func`` in
    megatron/core/distributed/param_and_grad_buffer.py
Versions: 0.16.1 - 0.19.2 (tested on 0.16.1 and 0.19.2)
Remove when: torch's gloo backend takes lists of different shapes in ``all_gather`` and ``reduce_scatter``, and does nothing
    where there is nobody to talk to.
Tested by: tests/unit/patches/test_patch_collectives.py

Even splits go to the original functions. Uneven ones are padded to the longest part, or summed in full and cut: up to
world-size times the traffic, which a host can afford at the sizes that run on CPU.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Sequence
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from .upstream import replace


def apply() -> None:
    """Replace all four functions."""
    from megatron.core.distributed import param_and_grad_buffer
    from megatron.core.tensor_parallel import mappings

    replace(param_and_grad_buffer, "dist_all_gather_func", _unless_alone)
    replace(param_and_grad_buffer, "dist_reduce_scatter_func", _unless_alone)

    replace(mappings, "_gather_along_first_dim", _gather_of)
    replace(mappings, "_reduce_scatter_along_first_dim", _reduce_scatter_of)


def _unless_alone(collective: Callable[..., Any]) -> Callable[..., Any]:
    """Both put a tensor together, or take their part of a sum, from what a group of one already has."""

    @functools.wraps(collective)
    def run(output: Tensor, input_: Tensor, *, group: dist.ProcessGroup, **options: Any) -> Any:
        if group.size() > 1:
            return collective(output, input_, group=group, **options)
        if output.data_ptr() != input_.data_ptr():
            output.copy_(input_)
        return None  # nothing to wait for

    return run


def _gather_of(even: Callable[..., Tensor]) -> Callable[..., Tensor]:
    @functools.wraps(even)
    def gather(
        input_: Tensor,
        group: dist.ProcessGroup,
        output_split_sizes: Sequence[int] | None = None,
        use_global_buffer: bool = False,
    ) -> Tensor:
        if output_split_sizes is None or group.size() == 1:
            return even(input_, group, None, use_global_buffer)
        sizes = [int(size) for size in output_split_sizes]
        longest = max(sizes)
        padded = input_.new_zeros((longest, *input_.shape[1:]))
        padded[: len(input_)] = input_
        parts = input_.new_empty((len(sizes) * longest, *input_.shape[1:]))
        dist.all_gather_into_tensor(parts, padded, group=group)
        return torch.cat([parts[rank * longest : rank * longest + size] for rank, size in enumerate(sizes)])

    return gather


def _reduce_scatter_of(even: Callable[..., Tensor]) -> Callable[..., Tensor]:
    @functools.wraps(even)
    def reduce_scatter(
        input_: Tensor,
        group: dist.ProcessGroup,
        input_split_sizes: Sequence[int] | None = None,
        use_global_buffer: bool = False,
    ) -> Tensor:
        if input_split_sizes is None or group.size() == 1:
            return even(input_, group, None, use_global_buffer)
        total = input_.clone(memory_format=torch.contiguous_format)
        dist.all_reduce(total, group=group)
        return total.split([int(size) for size in input_split_sizes])[group.rank()].clone()

    return reduce_scatter

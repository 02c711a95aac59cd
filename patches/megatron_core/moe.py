"""Run mixture-of-experts layers without Transformer Engine, and on CPU.

Why: the router reads ``te_general_gemm``, a name that exists only where Transformer Engine is installed: NameError. The
    all-to-all takes its split sizes as a host array; the function that copies them there does nothing to a tensor that
    is on the host already, and leaves it a tensor: TypeError in the all-to-all.
Upstream: ``RouterGatingLinearFunction`` and ``maybe_move_tensor_to_cpu`` in
    megatron/core/transformer/moe/moe_utils.py, the latter imported by name in token_dispatcher.py
Versions: 0.16.1 - 0.19.2 (tested on both; in 0.19 the name is defined, the split sizes are the same trouble)
Remove when: ``maybe_move_tensor_to_cpu(as_numpy=True)`` returns an array for a CPU tensor, and 0.16 is out of range.
Tested by: tests/unit/patches/test_patch_moe.py
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

import torch

from .upstream import replace


def apply() -> None:
    """Define the missing name where it is missing, and replace the copy to the host in both modules that hold it."""
    from megatron.core.transformer.moe import moe_utils, token_dispatcher

    if not hasattr(moe_utils, "te_general_gemm"):  # fixed upstream from 0.17 on
        moe_utils.te_general_gemm = None
    for module in (moe_utils, token_dispatcher):
        replace(module, "maybe_move_tensor_to_cpu", _as_host_array)


def _as_host_array(original: Callable[..., Any]) -> Callable[..., Any]:
    @functools.wraps(original)
    def move(tensor: Any, as_numpy: bool = False, record_stream: bool = False) -> Any:
        if torch.is_tensor(tensor) and tensor.is_cuda:
            return original(tensor, as_numpy, record_stream)
        return tensor.numpy() if as_numpy and torch.is_tensor(tensor) else tensor

    return move

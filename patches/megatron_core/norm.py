"""Let torch's norms run under sequence parallelism.

Why: without Transformer Engine and Apex the local layer spec has only ``WrappedTorchNorm``, which refuses sequence
    parallelism and ``persist_layer_norm``. Torch's norms work on any split of the sequence; what they lack is the mark
    on their parameters that makes Megatron sum the gradients over the tensor-parallel ranks, without which these
    gradients are silently wrong.
Upstream: ``WrappedTorchNorm.__new__`` in megatron/core/transformer/torch_norm.py; the mark is read by
    ``_allreduce_non_tensor_model_parallel_grads`` in megatron/core/distributed/finalize_model_grads.py
Versions: 0.16.1 - 0.19.2 (tested on 0.16.1 and 0.19.2)
Remove when: ``WrappedTorchNorm`` accepts ``config.sequence_parallel`` and marks its parameters.
Tested by: tests/unit/patches/test_patch_norm.py
"""

from __future__ import annotations

import copy
import functools
from collections.abc import Callable
from typing import Any

from torch import nn

from .upstream import replace


def apply() -> None:
    """Replace the constructor of ``WrappedTorchNorm``."""
    from megatron.core.transformer.torch_norm import WrappedTorchNorm

    replace(WrappedTorchNorm, "__new__", _new_of)


def _new_of(original: Callable[..., nn.Module]) -> Callable[..., nn.Module]:
    @functools.wraps(original)
    def new(cls: type, config: Any, hidden_size: int, eps: float = 1e-5, **options: Any) -> nn.Module:
        accepted = copy.copy(config)
        accepted.sequence_parallel = False
        accepted.persist_layer_norm = False  # names a faster kernel of Apex: the result is the same
        norm = original(cls, accepted, hidden_size, eps, **options)
        for parameter in norm.parameters():
            parameter.sequence_parallel = config.sequence_parallel  # type: ignore[attr-defined]
        return norm

    return new

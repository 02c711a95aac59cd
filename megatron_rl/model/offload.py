"""Memory that only an update needs (gradients, optimizer state), released while rollouts are sampled.

Tensors keep their identity and lose their storage, because Megatron holds views of them in many places. Weights stay: rollout
engines get them. On a CPU the same happens, and saves nothing.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from typing import Any

import torch
from torch import Tensor


class UpdateMemory:
    """Gradient buffers and optimizer state of one rank, present or released."""

    def __init__(self, gradient_buffers: Iterable[Any], optimizer: Any, weights: Iterable[Tensor]) -> None:
        """Args: Megatron's gradient buffers; its optimizer, chained or not, or None; the model's parameters."""
        self._gradients = [buffer.grad_data for buffer in gradient_buffers]
        self._optimizer = optimizer
        self._weights = {weight.untyped_storage().data_ptr() for weight in weights}
        self._sizes: list[int] = []
        """Bytes of each released gradient buffer."""
        self._kept: list[tuple[Tensor, Tensor]] = []
        """(emptied tensor, its copy on the CPU)."""
        self._copies: dict[int, Tensor] = {}

    @property
    def is_released(self) -> bool:
        """True while something is released."""
        return bool(self._sizes or self._kept)

    def release(self) -> int:
        """Release the memory; gradients are lost. Return the bytes freed."""
        if self._optimizer is not None:
            self._optimizer.zero_grad()  # also lets go of float32 copies of gradients in 16 bits
        freed = 0
        for tensor in self._state() if not self._kept else ():
            copy = self._copies.get(id(tensor))
            if copy is None or (copy.shape, copy.dtype) != (tensor.shape, tensor.dtype):
                copy = torch.empty_like(tensor, device="cpu", pin_memory=tensor.is_cuda)
                self._copies[id(tensor)] = copy
            copy.copy_(tensor)
            self._kept.append((tensor, copy))
        self._sizes = self._sizes or [gradients.untyped_storage().nbytes() for gradients in self._gradients]
        for tensor in (*self._gradients, *(tensor for tensor, _ in self._kept)):
            freed += tensor.untyped_storage().nbytes()
            tensor.untyped_storage().resize_(0)
        if torch.cuda.is_initialized():
            torch.cuda.empty_cache()
        return freed

    def resume(self, *, with_gradients: bool = True) -> None:
        """Bring back what was released, the gradients as zeros; or the optimizer's state alone."""
        if with_gradients:
            for gradients, size in zip(self._gradients, self._sizes):
                gradients.untyped_storage().resize_(size)
                gradients.zero_()
            self._sizes = []
        for tensor, copy in self._kept:
            tensor.untyped_storage().resize_(copy.nbytes)
            tensor.copy_(copy)
        self._kept = []

    def _state(self) -> Iterator[Tensor]:
        """Yield Adam's moments and the float32 main weights: tensors of their own, and in a GPU run not those on the CPU."""
        on_gpu = any(gradients.is_cuda for gradients in self._gradients)
        seen: set[int] = set()
        for tensor in _tensors_of(getattr(self._optimizer, "chained_optimizers", [self._optimizer])):
            storage = tensor.untyped_storage()
            is_whole = storage.nbytes() == tensor.nbytes  # a view of something larger is somebody else's
            place = storage.data_ptr()
            if is_whole and tensor.is_cuda == on_gpu and place not in self._weights and place not in seen:
                seen.add(place)
                yield tensor


def _tensors_of(optimizers: Sequence[Any]) -> Iterator[Tensor]:
    for part in optimizers:
        if getattr(part, "optimizer", None) is None:  # a rank without such parameters
            continue
        for groups in getattr(part, "shard_fp32_from_float16_groups", ()):
            yield from (tensor for tensor in groups if tensor is not None)
        for state in part.optimizer.state.values():
            yield from (value for value in state.values() if isinstance(value, Tensor) and value.dim())

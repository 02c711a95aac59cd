"""Random weights that stand for a checkpoint: for models trained from scratch."""

from __future__ import annotations

import hashlib
from pathlib import Path

import torch
from torch import Tensor

from megatron_rl.convert.architecture.shape import ModelShape
from megatron_rl.convert.tables.kinds import Extent
from megatron_rl.convert.tables.table import hf_tensors


class RandomReader:
    """Reads like ``HFReader``. Each tensor follows from seed and name, so every layout starts from the same weights.

    Matrices are normal with config.json's ``initializer_range`` as standard deviation, norms one, biases zero: what
    transformers does. Another kind of device draws other numbers; a GPU draws billions in a moment.
    """

    def __init__(self, shape: ModelShape, *, seed: int, device: torch.device | str = "cpu") -> None:
        self.directory = Path("random initialization")
        self._shapes = hf_tensors(shape)
        self._seed, self._std, self._device = seed, shape.initializer_range, device

    @property
    def names(self) -> set[str]:
        """Names of the tensors."""
        return set(self._shapes)

    def shape(self, name: str) -> Extent:
        """Shape of a tensor."""
        return self._shapes[name]

    def check(self, name: str, shape: Extent) -> None:
        """Check nothing: both sides come from the same table."""
        assert self._shapes[name] == shape

    def read(self, name: str, slices: tuple[slice, ...] | None = None) -> Tensor:
        """Return one rectangle of a tensor, or all of it, float32, on the device."""
        extent = self._shapes[name]
        if name.endswith("norm.weight"):
            tensor = torch.ones(extent, device=self._device)
        elif name.endswith((".bias", "_bias")):
            tensor = torch.zeros(extent, device=self._device)
        else:
            digest = hashlib.blake2b(f"{self._seed}/{name}".encode(), digest_size=8).digest()
            generator = torch.Generator(self._device).manual_seed(int.from_bytes(digest, "little") >> 1)
            tensor = torch.randn(extent, generator=generator, device=self._device) * self._std
        return tensor if slices is None else tensor[slices]

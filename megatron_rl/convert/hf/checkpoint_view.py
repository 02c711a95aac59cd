"""The part of a checkpoint that a model uses: some tensors are dropped on purpose, 8-bit weights are made whole again."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

import torch
from torch import Tensor

from megatron_rl.convert.architecture.shape import ModelShape
from megatron_rl.convert.hf.reader import HFReader
from megatron_rl.convert.tables.kinds import Extent
from megatron_rl.convert.tables.table import dropped_tensors
from megatron_rl.errors import UserError

_SCALE = "_scale_inv"
"""Suffix that turns an 8-bit weight's name into that of its scales, by which the stored values are multiplied."""


class CheckpointView:
    """Reads like the ``HFReader`` that it wraps. Of an 8-bit weight only the blocks that are read are dequantised.

    Args:
        reader: the checkpoint.
        shape: of the model.
    """

    def __init__(self, reader: HFReader, shape: ModelShape) -> None:
        self.directory: Path = reader.directory
        self.dropped = dropped_tensors(sorted(reader.names), shape)
        """HF name -> why the model does not use it."""
        self._reader, self._block = reader, shape.fp8_block
        scales = {name for name in reader.names if name.endswith(_SCALE)} if shape.fp8_block else set()
        self._scaled = {name.removesuffix(_SCALE) for name in scales} & reader.names
        self._names = reader.names - set(self.dropped) - {name + _SCALE for name in self._scaled}

    @property
    def names(self) -> set[str]:
        """Names of the tensors that the model uses, or that are there by mistake."""
        return self._names

    def summary(self) -> str:
        """Return one line that says what is dropped and why; empty if nothing is."""
        reasons: dict[str, list[str]] = {}
        for name, reason in self.dropped.items():
            reasons.setdefault(reason, []).append(name)
        parts = [f"{len(names)} tensors ({names[0]}, ...): {reason}" for reason, names in reasons.items()]
        return f"{self.directory}: left out {'; '.join(parts)}" if parts else ""

    def shape(self, name: str) -> Extent:
        """Shape of a tensor, from the header."""
        return self._reader.shape(name)

    def check(self, name: str, shape: Extent) -> None:
        """Check a tensor's shape and type; for an 8-bit weight also that each of its blocks has a scale.

        Raises:
            UserError: otherwise.
        """
        if name not in self._scaled:
            return self._reader.check(name, shape)
        field = f"{self.directory}: {name}"
        if self.shape(name) != shape:
            rule, fix = f"config.json gives the shape {shape}", "use the config.json that belongs to these weights"
            raise UserError(field, self.shape(name), rule, fix)
        found = self._reader.read(name, tuple(slice(0, 1) for _ in shape)).dtype
        if len(shape) != 2 or found != torch.float8_e4m3fn:
            rule = "has scales, so it must be a matrix of 8-bit floats (F8_E4M3)"
            raise UserError(field, f"{found}, {shape}", rule, "use the original checkpoint")
        assert self._block is not None
        self._reader.check(
            name + _SCALE, tuple(-(-size // side) for size, side in zip(shape, self._block, strict=True))
        )
        return None

    def read(self, name: str, slices: tuple[slice, ...] | None = None) -> Tensor:
        """Read one rectangle of a tensor, or all of it: as stored, or float32 if the stored weight is 8-bit."""
        if name not in self._scaled:
            return self._reader.read(name, slices)
        assert self._block is not None
        if slices is None:
            slices = tuple(slice(0, size) for size in self.shape(name))
        pairs = list(zip(slices, self._block, strict=True))
        blocks = tuple(slice(part.start // side, -(-part.stop // side)) for part, side in pairs)
        scales = self._reader.read(name + _SCALE, blocks).float()
        for dim, (part, side) in enumerate(pairs):
            index = torch.arange(part.start, part.stop) // side - blocks[dim].start
            scales = scales.index_select(dim, index)
        return self._reader.read(name, slices).float() * scales


def exported_config(fields: Mapping[str, object]) -> dict[str, object]:
    """Return a ``config.json`` without the fields of what an export lacks: 8-bit weights, prediction layers."""
    kept = {name: value for name, value in fields.items() if name != "quantization_config"}
    return kept | {name: 0 for name in ("num_nextn_predict_layers", "num_mtp_layers") if name in kept}

"""Content of a Megatron ``torch_dist`` checkpoint of a model: keys, extents, and the place of each parameter.

Megatron stacks layers and experts: parameter ``decoder.layers.3.mlp.linear_fc2.weight`` is row 3 of the stored tensor
``decoder.layers.mlp.linear_fc2.weight`` [L, hidden, ffn]. Experts are stacked as well:
``decoder.layers.3.mlp.experts.local_experts.5.linear_fc2.weight`` is [3, 5] of
``decoder.layers.mlp.experts.experts.linear_fc2.weight`` [L, E, hidden, ffn]. Where layers differ in kind (DeepSeek's first
ones are dense), every layer has keys of its own: ``decoder.layers.3.mlp...``. Nothing is cut for tensor parallelism:
qkv groups follow one another, all gate rows precede all up rows, and whoever loads takes its part.

Layer specs name some norms differently, since Transformer Engine fuses a norm into the linear layer behind it, and Megatron's
local spec writes such names too, where that layer exists:

    parameter                 local                     te                          te, layer of experts
    input_layernorm           linear_qkv.layer_norm_    linear_qkv.layer_norm_      linear_qkv.layer_norm_
    pre_mlp_layernorm         linear_fc1.layer_norm_    linear_fc1.layer_norm_      pre_mlp_layernorm.
    with latent attention (``linear_qkv`` does not exist):
    input_layernorm           input_layernorm.          input_layernorm.            input_layernorm.
    q_layernorm, kv_layernorm the same                  linear_q_up_proj.layer_norm_, linear_kv_up_proj.layer_norm_
    pre_mlp_layernorm         pre_mlp_layernorm.        linear_fc1.layer_norm_      pre_mlp_layernorm.

Every linear layer, and every norm of Transformer Engine 2 that stands alone, also has an ``_extra_state`` object (state of
FP8), which a model asks for on load. Ours say that there is none.
"""

from __future__ import annotations

import re
from collections.abc import Iterable
from dataclasses import dataclass
from math import prod
from typing import Literal, get_args

from megatron_rl.convert.architecture.shape import ModelShape
from megatron_rl.convert.hf.load import check_tiling
from megatron_rl.convert.tables.kinds import Box, Extent, boxes, hf_shapes, shard_shape
from megatron_rl.convert.tables.table import Entry, entries

LayerSpec = Literal["both", "local", "te"]
"""Megatron's layer spec for which a checkpoint is written. ``both`` has the names of both, and small tensors twice if they
differ: each finds all that it asks for, and something that only the other one wants."""

_LAYER = re.compile(r"^(?:module\.)*decoder\.layers\.(\d+)\.(.+)$")
_EXPERT = re.compile(r"\.local_experts\.(\d+)\.")
_LINEAR = re.compile(r"(^|\.)linear_[a-z0-9_]+\.weight$")
_NORM = re.compile(r"(^|\.)[a-z_]*(layernorm|_norm)\.weight$")


@dataclass(frozen=True)
class Slot:
    """The place of one parameter: ``index`` of the leading dimensions of the stored tensor ``key``."""

    key: str
    index: Extent
    """(), (layer,), (expert,) or (layer, expert)."""
    counts: Extent
    """Extents of these dimensions."""


@dataclass(frozen=True)
class RowRun:
    """Whole rows of one HF tensor that are whole rows of a parameter (rows: indices of dimension 0)."""

    hf_name: str
    hf_row: int
    row: int
    num_rows: int


def parameter_extent(entry: Entry, shape: ModelShape) -> Extent:
    """Return the shape of an uncut parameter. A vocabulary has no padding rows, which Megatron adds on load."""
    return shard_shape(entry.kind, shape, 1, vocab_multiple=1)


def runs(entry: Entry, shape: ModelShape) -> list[RowRun]:
    """Return the HF rows that make a whole parameter, in the order of its rows."""

    def run(box: Box) -> RowRun:
        assert box.size[1:] == extent[1:] and not any(box.hf_start[1:]), f"{entry.name}: a part of a row"
        return RowRun(entry.hf_names[box.tensor], box.hf_start[0], box.shard_start[0], box.size[0])

    extent = parameter_extent(entry, shape)
    return [run(box) for box in boxes(entry.kind, shape, 0, 1, vocab_multiple=1)]


class StoredLayout:
    """The stored tensors and objects of a checkpoint of one model.

    Args:
        shape: of the model.
        layer_spec: whose names.
    """

    def __init__(self, shape: ModelShape, layer_spec: LayerSpec = "both") -> None:
        assert layer_spec in get_args(LayerSpec), layer_spec
        self.shape, self.layer_spec = shape, layer_spec
        self.entries = [entry for entry in entries(shape).values() if not entry.is_copy]
        """Owners of all HF tensors: a tied output layer is not stored, the stage that needs it reads the embedding."""
        self._layers: dict[int, set[str]] = {}
        for entry in self.entries:
            if match := _LAYER.match(entry.name):
                self._layers.setdefault(int(match[1]), set()).add(match[2])
        self.is_stacked = len({frozenset(names) for names in self._layers.values()}) == 1
        """True: layers share keys, since all have the same parameters."""
        self.slots: dict[str, tuple[Slot, ...]] = {entry.name: tuple(self._slots(entry)) for entry in self.entries}
        """Parameter -> its places; more than one only under ``both``."""
        self.objects: list[str] = sorted({name for entry in self.entries for name in self._objects(entry)})
        """Unique keys of the ``_extra_state`` objects."""

    @property
    def extents(self) -> dict[str, Extent]:
        """Key -> extent of every stored tensor, in the order of the model."""
        return {
            slot.key: (*slot.counts, *parameter_extent(entry, self.shape))
            for entry in self.entries
            for slot in self.slots[entry.name]
        }  # fmt: skip

    def check(self) -> None:
        """Check that every HF tensor fills parameters once, and that the parameters of each stored tensor fill it once.

        Raises:
            AssertionError: the table or this module is wrong; no input of a user can cause it.
        """
        for kind in {entry.kind for entry in self.entries}:
            check_tiling(kind, self.shape, 1, vocab_multiple=1)
        used = [name for entry in self.entries for name in entry.hf_names]
        assert len(used) == len(set(used)), "an HF tensor has two owners"
        filled: dict[str, set[Extent]] = {}
        counts: dict[str, Extent] = {}
        for entry in self.entries:
            for slot in self.slots[entry.name]:
                assert slot.index not in filled.setdefault(slot.key, set()), f"{slot} is filled twice"
                assert counts.setdefault(slot.key, slot.counts) == slot.counts, slot
                filled[slot.key].add(slot.index)
        for key, indices in filled.items():
            assert len(indices) == prod(counts[key]), f"{key} has gaps"

    def _slots(self, entry: Entry) -> Iterable[Slot]:
        match = _LAYER.match(entry.name)
        if match is None:
            yield Slot(entry.name, (), ())
            return
        layer, rest = int(match[1]), match[2]
        for name in dict.fromkeys(_name(rest, self._layers[layer], spec) for spec in self._specs()):
            yield self._slot(layer, name)

    def _specs(self) -> tuple[LayerSpec, ...]:
        return ("local", "te") if self.layer_spec == "both" else (self.layer_spec,)

    def _slot(self, layer: int, rest: str) -> Slot:
        """Return the slot of a layer's parameter or object, named without the layer."""
        index: list[int] = []
        counts: list[int] = []
        prefix = f"decoder.layers.{layer}."
        if self.is_stacked:
            prefix, index, counts = "decoder.layers.", [layer], [self.shape.num_layers]
        if found := _EXPERT.search(rest):
            index, counts = [*index, int(found[1])], [*counts, self.shape.num_experts]
            rest = _EXPERT.sub(".experts.", rest)
        return Slot(prefix + rest, tuple(index), tuple(counts))

    def _objects(self, entry: Entry) -> Iterable[str]:
        match = _LAYER.match(entry.name)
        if match is None:
            # The output layer's is dropped by Megatron, an embedding has none.
            if _NORM.search(entry.name) and "te" in self._specs():
                yield _unique_key(Slot(entry.name.removesuffix("weight") + "_extra_state", (), ()))
            return
        layer, rest = int(match[1]), match[2]
        is_alone = "te" in self._specs() and _NORM.search(_name(rest, self._layers[layer], "te"))
        if _LINEAR.search(rest) or is_alone:
            yield _unique_key(self._slot(layer, rest.removesuffix("weight") + "_extra_state"))


def stored_names(name: str, shape: ModelShape) -> list[Slot]:
    """Return every slot in which some version or option of Megatron may have stored a parameter, likeliest first.

    Stacked layers or not, stacked experts or not (``singleton_local_shards``), fused or plain names of norms.
    """
    match = _LAYER.match(name)
    if match is None:
        return [Slot(name, (), ())]
    layer = int(match[1])
    names = [match[2]] if _EXPERT.search(match[2]) or not _NORM.search(match[2]) else [*_aliases(match[2]), match[2]]
    found = []
    for rest in names:
        expert = _EXPERT.search(rest)
        experts: list[tuple[str, Extent, Extent]] = [(rest, (), ())]
        if expert is not None:
            experts = [
                (_EXPERT.sub(".experts.", rest), (int(expert[1]),), (shape.num_experts,)),
                (_EXPERT.sub(rf".experts.{expert[1]}.", rest), (), ()),
            ]
        for stored, index, counts in experts:
            found.append(Slot(f"decoder.layers.{stored}", (layer, *index), (shape.num_layers, *counts)))
            found.append(Slot(f"decoder.layers.{layer}.{stored}", index, counts))
    return found


_FUSIONS = {
    "input_layernorm.": "self_attention.linear_qkv.layer_norm_",
    "pre_mlp_layernorm.": "mlp.linear_fc1.layer_norm_",
    "self_attention.q_layernorm.": "self_attention.linear_q_up_proj.layer_norm_",
    "self_attention.kv_layernorm.": "self_attention.linear_kv_up_proj.layer_norm_",
}


def _name(rest: str, layer: set[str], spec: LayerSpec) -> str:
    """Return the name by which a spec stores a layer's parameter. ``layer``: all plain names of the layer."""
    has_plain_attention = "self_attention.linear_qkv.weight" in layer
    for plain, fused in _FUSIONS.items():
        if not rest.startswith(plain):
            continue
        linear = fused.removesuffix("layer_norm_") + "weight"
        # The local spec renames by a fixed list, whatever the layer behind the norm is.
        is_fused = has_plain_attention and "_up_proj" not in fused if spec == "local" else linear in layer
        return fused + rest.removeprefix(plain) if is_fused else rest
    return rest


def _aliases(rest: str) -> list[str]:
    return [fused + rest.removeprefix(plain) for plain, fused in _FUSIONS.items() if rest.startswith(plain)]


def _unique_key(slot: Slot) -> str:
    index, counts = (slot.index, slot.counts) if slot.index else ((0,), (1,))
    return f"{slot.key}/shard_{'.'.join(map(str, index))}_{'.'.join(map(str, counts))}"


def hf_extents(layout: StoredLayout) -> dict[str, Extent]:
    """Return every HF tensor and its extent, in the order of the model."""
    return {
        name: extent
        for entry in layout.entries
        for name, extent in zip(entry.hf_names, hf_shapes(entry.kind, layout.shape), strict=True)
    }  # fmt: skip

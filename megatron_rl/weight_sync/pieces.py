"""Pieces of the weights that go from trainer to servers, and bundles of those that take the same ways.

    piece     a rectangle of a trainer's parameter that ranks of a server lack
    bundle    pieces that the same trainer ranks hold and the same ranks of a server need; they travel together

Both sides are boxes of Hugging Face tensors (``convert.tables.kinds`` for Megatron, ``served`` for SGLang); a piece is the
overlap of two boxes. Where servers hold FP8 weights, a piece of a linear layer travels in eight bits, and its scales are pieces
of a tensor of their own. The pieces of one layer repeat in every layer of its kind: they are computed once a kind.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import cached_property
from math import prod
from typing import Literal

from megatron_rl.convert.architecture.shape import ModelShape
from megatron_rl.convert.tables.kinds import Extent, boxes
from megatron_rl.convert.tables.table import Entry, entries, hf_tensors
from megatron_rl.weight_sync.fp8_format import Fp8Format, grid, is_quantized
from megatron_rl.weight_sync.served import Form, RolloutLayout, check_served, served_parameters

DtypeName = Literal["float32", "bfloat16", "float16", "float8_e4m3fn"]
"""A name in torch."""
ITEM_BYTES: Mapping[DtypeName, int] = {"float32": 4, "bfloat16": 2, "float16": 2, "float8_e4m3fn": 1}


@dataclass(frozen=True)
class ServedForm:
    """Dtypes of the servers' parameters."""

    trained: Literal["float32", "bfloat16", "float16"]
    """Dtype of weights as they are trained."""
    fp8: Fp8Format | None = None
    """Format of linear layers, if it is another one; its scales are those of blocks."""

    def dtype_name(self, form: Form) -> DtypeName:
        """Return the dtype of a parameter."""
        return self.trained if form == "trained" else "float8_e4m3fn" if form == "fp8" else "float32"


@dataclass(frozen=True)
class TrainingLayout:
    """Megatron's ranks: tensor parallel inside context and data parallel inside pipeline parallel."""

    tp_size: int = 1
    pp_size: int = 1
    dp_size: int = 1
    """Ranks with the same weights, except for experts: data times context parallel size."""
    vpp_size: int = 1
    ep_size: int = 1
    etp_size: int | None = None
    """Tensor-parallel size of each expert; ``tp_size`` unless given."""

    @property
    def num_ranks(self) -> int:
        """World size."""
        return self.tp_size * self.dp_size * self.pp_size

    @property
    def expert_tp_size(self) -> int:
        """Ranks that each expert is cut over."""
        return self.tp_size if self.etp_size is None else self.etp_size

    @property
    def ranks_per_stage(self) -> int:
        """Ranks of one pipeline stage."""
        return self.tp_size * self.dp_size

    def stage_of_layer(self, layer: int, num_layers: int) -> int:
        """Return the pipeline rank that holds a layer."""
        return layer // (num_layers // (self.pp_size * self.vpp_size)) % self.pp_size

    def stage_of(self, entry: Entry, num_layers: int) -> int:
        """Return the pipeline rank that holds a parameter."""
        if entry.name.startswith("decoder.layers."):
            return self.stage_of_layer(int(entry.name.split(".", 3)[2]), num_layers)
        return 0 if entry.name.startswith("embedding.") else self.pp_size - 1

    def shards(self, entry: Entry, shape: ModelShape) -> list[tuple[int, int, range]]:
        """Return (rank in the cut, its size, ranks of the stage with that shard) for each shard of a parameter."""
        count = self.ranks_per_stage
        if entry.kind.name == "replicated" and entry.expert is None:
            return [(0, self.tp_size, range(count))]
        if entry.expert is None:
            return [(rank, self.tp_size, range(rank, count, self.tp_size)) for rank in range(self.tp_size)]
        cut, owner = self.expert_tp_size, entry.expert // (shape.num_experts // self.ep_size)
        return [(rank, cut, range(owner * cut + rank, count, cut * self.ep_size)) for rank in range(cut)]


@dataclass(frozen=True, slots=True)
class Target:
    """The place of a piece in a server rank."""

    tp_rank: int
    """Rank in the server."""
    name: str
    """SGLang's name of the parameter."""
    start: Extent
    """Corner in that parameter; may have one more dimension in front, the expert's place."""


@dataclass(frozen=True, slots=True)
class Piece:
    """A rectangle of a trainer's parameter that ranks of a server lack; the same for every server."""

    number: int
    """Number among all pieces."""
    hf_name: str
    hf_start: Extent
    hf_extent: Extent
    """Shape of the whole Hugging Face tensor."""
    size: Extent
    """Size in the dimensions of that tensor."""
    source: str
    """Global Megatron name of the parameter."""
    start: Extent
    """Corner in that parameter; of scales, in ``hf_name``."""
    dtype_name: DtypeName
    """Dtype of the server's parameter."""
    targets: tuple[Target, ...]
    form: Form = "trained"

    @property
    def num_bytes(self) -> int:
        """Bytes that travel."""
        return prod(self.size) * ITEM_BYTES[self.dtype_name]


@dataclass
class Bundle:
    """Pieces that the same trainer ranks hold and the same ranks of a server need."""

    number: int
    holders: range
    """World ranks of the trainer."""
    tp_ranks: tuple[int, ...]
    """Ranks in a server."""
    parts: list[_LayerPieces] = field(default_factory=list)

    @cached_property
    def num_bytes(self) -> int:
        """Bytes of all pieces."""
        return sum(piece.num_bytes for part in self.parts for piece in part.pattern)

    def pieces(self) -> Iterator[Piece]:
        """Yield all pieces."""
        for part in self.parts:
            yield from part.pieces()

    def numbers(self) -> list[int]:
        """Return the numbers of all pieces."""
        return [part.first + piece.number for part in self.parts for piece in part.pattern]


@dataclass(frozen=True, slots=True)
class _LayerPieces:
    """Pieces of one layer, as another layer of its kind has them."""

    pattern: Sequence[Piece]
    """Pieces of the layer that stands for its kind; their numbers count within the layer."""
    first: int
    """Number of the layer's first piece."""
    rename: tuple[str, str]
    """Part of a name that says the layer, there and here."""

    def pieces(self) -> Iterator[Piece]:
        old, new = self.rename
        for piece in self.pattern:
            targets = tuple(Target(t.tp_rank, t.name.replace(old, new, 1), t.start) for t in piece.targets)
            yield Piece(
                self.first + piece.number, piece.hf_name.replace(old, new, 1), piece.hf_start, piece.hf_extent,
                piece.size, piece.source.replace(old, new, 1), piece.start, piece.dtype_name, targets, piece.form,
            )  # fmt: skip


def make_bundles(
    shape: ModelShape, training: TrainingLayout, rollout: RolloutLayout, form: ServedForm, most_bytes: int
) -> tuple[list[Bundle], int, int]:
    """Return all bundles, the number of their pieces, and the bytes that one server holds.

    Args:
        shape: of the model.
        training: of the trainer.
        rollout: of the servers.
        form: of the servers' parameters.
        most_bytes: a piece of more is cut into several, row by row.

    Raises:
        UserError: a layout does not fit the model, or the format the layout.
    """
    if form.fp8 is not None:
        check_served(shape, form.fp8, rollout)
    found: dict[tuple[range, tuple[int, ...]], Bundle] = {}
    num_pieces = held = 0
    for stands, layers in _kinds(shape):
        patterns, count, num_bytes = _pattern(shape, training, rollout, form, stands, most_bytes)
        for layer in layers:
            for (stage, holders, tp_ranks), pattern in patterns.items():
                if layer is not None:
                    stage = training.stage_of_layer(layer, shape.num_layers)
                first = stage * training.ranks_per_stage
                world = range(holders.start + first, holders.stop + first, holders.step)
                bundle = found.setdefault((world, tp_ranks), Bundle(len(found), world, tp_ranks))
                rename = (f"layers.{stands}.", f"layers.{layer}.") if layer is not None else ("", "")
                bundle.parts.append(_LayerPieces(pattern, num_pieces, rename))
            num_pieces += count
            held += num_bytes
    return list(found.values()), num_pieces, held


def _kinds(shape: ModelShape) -> Iterator[tuple[int | None, list[int | None]]]:
    """Yield a layer of each kind and all layers of that kind; first None, for what is outside the layers."""
    yield None, [None]
    for has_experts in (False, True):
        layers: list[int | None] = [n for n in range(shape.num_layers) if shape.has_experts(n) == has_experts]
        if layers:
            yield layers[0], layers


_Key = tuple[int, range, tuple[int, ...]]
"""Stage of what is outside the layers; ranks of a stage; ranks of a server."""


def _pattern(
    shape: ModelShape,
    training: TrainingLayout,
    rollout: RolloutLayout,
    form: ServedForm,
    layer: int | None,
    most_bytes: int,
) -> tuple[dict[_Key, list[Piece]], int, int]:
    """Return the pieces of one layer, or of what is outside the layers, by who has and who needs them; with both counts."""
    layers = () if layer is None else (layer,)
    extents = hf_tensors(shape, layers)
    sources = _sources(shape, training, layers, is_outer=layer is None)
    if form.fp8 is not None:
        _add_scales(sources, extents, form.fp8)
    targets: dict[tuple[str, Extent, Extent], tuple[_TrainerBox, Form, list[Target]]] = {}
    held = 0
    for tp_rank in range(rollout.tp_size):
        for parameter in served_parameters(shape, rollout, tp_rank, layers, fp8=form.fp8):
            for box in parameter.boxes:
                overlaps = 0
                for source in sources.get(box.hf_name, ()):
                    shared = _meet(box.hf_start, box.size, source.hf_start, source.size)
                    if shared is None:
                        continue
                    start, size = shared
                    target = Target(tp_rank, parameter.name, _shift(start, box.hf_start, box.start))
                    targets.setdefault((box.hf_name, start, size), (source, parameter.form, []))[2].append(target)
                    overlaps += prod(size)
                assert overlaps in (0, prod(box.size)), f"{box.hf_name} is not covered"
                held += overlaps * ITEM_BYTES[form.dtype_name(parameter.form)]
    found: dict[_Key, list[Piece]] = defaultdict(list)
    count = 0
    for (name, start, size), (source, form_of_it, places) in targets.items():
        key = (source.stage, source.ranks, tuple(sorted({place.tp_rank for place in places})))
        whole = Piece(
            0, name, start, extents[name], size, source.name, _shift(start, source.hf_start, source.start),
            form.dtype_name(form_of_it), tuple(places), form_of_it,
        )  # fmt: skip
        for piece in _chop(whole, most_bytes):
            found[key].append(replace(piece, number=count))
            count += 1
    return found, count, held


@dataclass(frozen=True, slots=True)
class _TrainerBox:
    """A box of a Hugging Face tensor, and the ranks of a stage that hold it."""

    name: str
    start: Extent
    hf_start: Extent
    size: Extent
    ranks: range
    stage: int


def _sources(
    shape: ModelShape, training: TrainingLayout, layers: tuple[int, ...], *, is_outer: bool
) -> dict[str, list[_TrainerBox]]:
    found: dict[str, list[_TrainerBox]] = defaultdict(list)
    for entry in entries(shape, layers).values():
        if entry.is_copy or entry.name.startswith("decoder.layers.") == is_outer:
            continue
        stage = 0 if layers else training.stage_of(entry, shape.num_layers)
        for rank, size, ranks in training.shards(entry, shape):
            for box in boxes(entry.kind, shape, rank, size):
                source = _TrainerBox(entry.name, box.shard_start, box.hf_start, box.size, ranks, stage)
                found[entry.hf_names[box.tensor]].append(source)
    return found


def _add_scales(sources: dict[str, list[_TrainerBox]], extents: dict[str, Extent], fp8: Fp8Format) -> None:
    """Add the scales of quantised weights: a holder of a weight's rectangle has those of the blocks that begin in it."""
    for name in [name for name in sources if is_quantized(name, extents[name])]:
        scale_name = fp8.scale_name(name)
        extents[scale_name] = fp8.scale_shape(extents[name])
        for box in sources[name]:
            first = grid(box.hf_start)
            end = grid(tuple(start + size for start, size in zip(box.hf_start, box.size)))
            if all(a < b for a, b in zip(first, end)):
                size = tuple(b - a for a, b in zip(first, end))
                sources[scale_name].append(replace(box, start=first, hf_start=first, size=size))


def _chop(piece: Piece, most_bytes: int) -> Iterator[Piece]:
    """Yield a piece in runs of whole rows that are no larger than a bucket."""
    rows = max(1, most_bytes // (piece.num_bytes // piece.size[0]))
    if rows >= piece.size[0]:
        yield piece
        return
    front = [len(target.start) - len(piece.size) for target in piece.targets]
    for first in range(0, piece.size[0], rows):
        yield replace(
            piece,
            hf_start=_moved(piece.hf_start, 0, first),
            start=_moved(piece.start, 0, first),
            size=(min(rows, piece.size[0] - first), *piece.size[1:]),
            targets=tuple(
                replace(target, start=_moved(target.start, dim, first)) for target, dim in zip(piece.targets, front)
            ),
        )


def _moved(start: Extent, dim: int, by: int) -> Extent:
    return (*start[:dim], start[dim] + by, *start[dim + 1 :])


def _meet(a_start: Extent, a_size: Extent, b_start: Extent, b_size: Extent) -> tuple[Extent, Extent] | None:
    """Return start and size of the overlap of two rectangles, or None."""
    start = tuple(map(max, a_start, b_start))
    size = tuple(min(a + n, b + m) - s for a, n, b, m, s in zip(a_start, a_size, b_start, b_size, start, strict=True))
    return (start, size) if min(size) > 0 else None


def _shift(start: Extent, origin: Extent, place: Extent) -> Extent:
    """Move a corner with its rectangle from ``origin`` to ``place``, which may have more dimensions in front."""
    front = len(place) - len(origin)
    return (*place[:front], *(p + s - o for p, s, o in zip(place[front:], start, origin, strict=True)))

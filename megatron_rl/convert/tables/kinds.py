"""The relation of one Megatron parameter to its Hugging Face tensors: a kind, and the boxes that it stands for.

A kind is data; ``boxes`` is the one primitive. Loading, export, verification and weight-sync plans all read the same
boxes in one direction or the other, so that what one writes the other reads back.

    kind          HF tensors            this rank's shard
    replicated    [d0, ...]             the same
    column        [d0, ...]             rows [r, r + 1) * d0 / tp
    row           [d0, d1]              columns [r, r + 1) * d1 / tp
    vocab         [vocab, ...]          rows [r, r + 1) * padded / tp; rows at and beyond ``vocab`` are zero
    qkv           q, k, v: [heads * head_dim, ...]   whole query groups, each: its query heads, its key, its value
    gated         gate, up: [d0, ...]   rows of gate [r, r + 1) * d0 / tp, then the same rows of up

An expert's tensors are ``gated`` and ``row``, cut over the expert-tensor-parallel group: what is special about experts is
their names, not their cuts.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from math import prod
from typing import Literal

from megatron_rl.convert.architecture.shape import ModelShape
from megatron_rl.errors import UserError

DEFAULT_VOCAB_MULTIPLE = 128
"""Megatron's own default of ``make_vocab_size_divisible_by``."""

Extent = tuple[int, ...]


@dataclass(frozen=True)
class ShardKind:
    """The way a parameter is cut. ``dims`` names the sizes (keys of ``ModelShape.dims``) of each of its HF tensors."""

    name: Literal["replicated", "column", "row", "vocab", "qkv", "gated"]
    dims: tuple[str, ...]


def replicated(*dims: str) -> ShardKind:
    """Kind of a parameter that every rank holds whole."""
    return ShardKind("replicated", dims)


def column(*dims: str) -> ShardKind:
    """Kind that is cut along dimension 0, the output of the layer."""
    return ShardKind("column", dims)


def row(*dims: str) -> ShardKind:
    """Kind that is cut along dimension 1, the input of the layer."""
    return ShardKind("row", dims)


def vocab(*dims: str) -> ShardKind:
    """Kind that is cut along the rows of the padded vocabulary."""
    return ShardKind("vocab", ("vocab", *dims))


def qkv(*dims: str) -> ShardKind:
    """Kind of queries, keys and values in one parameter, group by group; ``dims`` are those after the first."""
    return ShardKind("qkv", dims)


def gated(*dims: str) -> ShardKind:
    """Kind of gate and up projection, stacked within each rank."""
    return ShardKind("gated", dims)


@dataclass(frozen=True)
class Box:
    """A rectangle of HF tensor number ``tensor`` that equals a rectangle of one rank's shard."""

    tensor: int
    """Index into the entry's ``hf_names``."""
    hf_start: Extent
    shard_start: Extent
    size: Extent

    @property
    def hf_slices(self) -> tuple[slice, ...]:
        """Index into the HF tensor."""
        return tuple(slice(a, a + n) for a, n in zip(self.hf_start, self.size, strict=True))

    @property
    def shard_slices(self) -> tuple[slice, ...]:
        """Index into the shard."""
        return tuple(slice(a, a + n) for a, n in zip(self.shard_start, self.size, strict=True))

    @property
    def num_elements(self) -> int:
        """Number of elements copied."""
        return prod(self.size)


def padded_vocab_size(vocab_size: int, tp_size: int, vocab_multiple: int = DEFAULT_VOCAB_MULTIPLE) -> int:
    """Return the rows of Megatron's embedding over all ranks: the next multiple of ``vocab_multiple * tp_size``."""
    step = vocab_multiple * tp_size
    return -(-vocab_size // step) * step


def check_tensor_parallel(shape: ModelShape, tp_size: int) -> None:
    """Check that each rank gets whole query groups and an equal part of the MLP.

    Megatron itself could split one group's heads over ranks; its shards would then hold no whole group.

    Raises:
        UserError: a size is not divisible by ``tp_size``.
    """
    for what in ("num_attention_heads", "num_key_value_heads", *shape.width_fields):
        if tp_size < 1 or getattr(shape, what) % tp_size:
            raise UserError(
                "policy.megatron_cfg.tensor_model_parallel_size", tp_size,
                f"must divide the model's {what} = {getattr(shape, what)}",
                "choose a smaller tensor_model_parallel_size",
            )  # fmt: skip


def hf_shapes(kind: ShardKind, shape: ModelShape) -> list[Extent]:
    """Return the shapes of the HF tensors, in the order of the entry's ``hf_names``."""
    rest = tuple(shape.dims[dim] for dim in kind.dims)
    match kind.name:
        case "qkv":
            return [(shape.dims["q"], *rest), (shape.dims["kv"], *rest), (shape.dims["kv"], *rest)]
        case "gated":
            return [rest, rest]
        case _:
            return [rest]


def shard_shape(
    kind: ShardKind, shape: ModelShape, tp_size: int, *, vocab_multiple: int = DEFAULT_VOCAB_MULTIPLE
) -> Extent:
    """Return the shape of each rank's parameter."""
    check_tensor_parallel(shape, tp_size)
    tensors = hf_shapes(kind, shape)
    first, rest = sum(tensor[0] for tensor in tensors), tensors[0][1:]
    match kind.name:
        case "replicated":
            return tensors[0]
        case "row":
            return (first, rest[0] // tp_size, *rest[1:])
        case "vocab":
            return (padded_vocab_size(first, tp_size, vocab_multiple) // tp_size, *rest)
        case _:
            return (first // tp_size, *rest)


def boxes(
    kind: ShardKind, shape: ModelShape, tp_rank: int, tp_size: int, *, vocab_multiple: int = DEFAULT_VOCAB_MULTIPLE
) -> list[Box]:
    """Return the boxes that fill the shard of ``tp_rank``, in the order of its rows.

    Args:
        kind: of the parameter.
        shape: of the model.
        tp_rank: whose shard; in [0, tp_size).
        tp_size: tensor-parallel size.
        vocab_multiple: Megatron's ``make_vocab_size_divisible_by``; only ``vocab`` reads it.

    Returns:
        Boxes without overlap. What none of them covers is padding, and zero.
    """
    assert 0 <= tp_rank < tp_size, f"tp_rank {tp_rank} of {tp_size}"
    shard = shard_shape(kind, shape, tp_size, vocab_multiple=vocab_multiple)
    match kind.name:
        case "replicated":
            pieces = [(0, 0, shard[0])]
        case "row":
            origin, corner = (0, tp_rank * shard[1], *(0 for _ in shard[2:])), tuple(0 for _ in shard)
            return [Box(0, origin, corner, shard)]
        case "column":
            pieces = [(0, tp_rank * shard[0], shard[0])]
        case "vocab":
            start = tp_rank * shard[0]
            pieces = [(0, start, min(shard[0], shape.vocab_size - start))]
        case "gated":
            half = shard[0] // 2
            pieces = [(0, tp_rank * half, half), (1, tp_rank * half, half)]
        case "qkv":
            pieces = _qkv_pieces(shape, tp_rank, tp_size)
    return _stack(pieces, shard[1:])


def _qkv_pieces(shape: ModelShape, tp_rank: int, tp_size: int) -> list[tuple[int, int, int]]:
    """Return the pieces as ``get_query_key_value_tensors`` of megatron.core's SelfAttention splits them."""
    num_groups = shape.num_key_value_heads // tp_size
    key_rows = shape.head_dim
    query_rows = shape.num_attention_heads // shape.num_key_value_heads * shape.head_dim
    pieces = []
    for group in range(tp_rank * num_groups, (tp_rank + 1) * num_groups):
        pieces += [(0, group * query_rows, query_rows), (1, group * key_rows, key_rows),
                   (2, group * key_rows, key_rows)]  # fmt: skip
    return pieces


def _stack(pieces: Iterable[tuple[int, int, int]], rest: Extent) -> list[Box]:
    """Stack boxes of whole rows. A piece is (tensor, first row of the HF tensor, number of rows)."""
    result, position, corner = [], 0, tuple(0 for _ in rest)
    for tensor, start, num_rows in pieces:
        if num_rows > 0:  # a rank may hold nothing but padding rows of the vocabulary
            result.append(Box(tensor, (start, *corner), (position, *corner), (num_rows, *rest)))
            position += num_rows
    return result


@dataclass(frozen=True)
class Rule:
    """One line of a family's table: a Megatron name, the HF names it is made of, how they are cut."""

    megatron: str
    """``{layer}`` stands for the global layer number, ``{expert}`` for that of an expert among the layer's."""
    hf: tuple[str, ...]
    kind: ShardKind
    needs: str = ""
    """A boolean of ``ModelShape`` that must hold for the line to apply."""
    is_copy: bool = False
    """True: another line has the same HF tensors. Loading fills both parameters; export writes that line's alone."""
    layers: Literal["all", "dense", "experts"] = "all"
    """Layers that have it, in a model whose first layers are dense and whose others have experts."""
    is_float32: bool = False
    """Kept in float32 by checkpoints and by Megatron, whatever the type of the model."""

"""Parameters of each rank of an SGLang server, and the boxes of Hugging Face tensors that they are made of.

From SGLang 0.5.23's layers (QKVParallelLinear, MergedColumnParallelLinear, VocabParallelEmbedding, FusedMoE):

    qkv_proj, gate_up_proj     the rank's rows of q, k, v (of gate, up), stacked; fewer key-value heads than ranks: repeated
    o_proj, down_proj          the rank's columns
    embed_tokens, lm_head      the rank's rows of the vocabulary, padded to a multiple of 64
    experts.w13, experts.w2    [experts of the rank, ...]: gate rows above up rows; columns of down
    everything else            whole

Servers of FP8 weights (``fp8_format``) hold linear layers in eight bits, and their scales, cut alike, under NAME_scale_inv.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, replace
from typing import Literal

from megatron_rl.convert.architecture.shape import ModelShape
from megatron_rl.convert.tables.kinds import Extent
from megatron_rl.convert.tables.table import hf_tensors
from megatron_rl.errors import UserError
from megatron_rl.weight_sync.fp8_format import BLOCK, Fp8Format, grid, is_quantized, parts_of_fused

VOCAB_MULTIPLE = 64


@dataclass(frozen=True)
class RolloutLayout:
    """Servers of one kind."""

    num_servers: int = 1
    tp_size: int = 1
    ep_size: int = 1
    """Groups among the ``tp_size`` ranks that divide the experts between them; within a group each expert is cut."""

    @property
    def num_ranks(self) -> int:
        """Ranks of all servers."""
        return self.num_servers * self.tp_size

    def check(self, shape: ModelShape) -> None:
        """Raise ``UserError`` if SGLang could not serve the model this way, or its way is unknown here."""
        _check_family(shape)
        tp_size, heads, kv_heads = self.tp_size, shape.num_attention_heads, shape.num_key_value_heads
        if heads % tp_size or (kv_heads % tp_size and tp_size % kv_heads):
            rule = f"must divide {heads} heads, and divide or be a multiple of {kv_heads} key-value heads"
            raise UserError("rollout.sglang_cfg.tp_size", tp_size, rule, "choose another size")
        if tp_size % self.ep_size or (shape.num_experts and shape.num_experts % self.ep_size):
            rule = f"must divide tp_size = {tp_size} and the number of experts = {shape.num_experts}"
            raise UserError("rollout.sglang_cfg.ep_size", self.ep_size, rule, "choose another size")
        width = getattr(shape, shape.width_field)
        cut = tp_size // self.ep_size if shape.num_experts else tp_size
        if width % cut:
            rule = f"must cut the width {width} of the MLP evenly"
            raise UserError("rollout.sglang_cfg.tp_size", tp_size, rule, "choose another size")


def _check_family(shape: ModelShape) -> None:
    if shape.latent is not None:
        rule = f"cannot be worked out for {shape.family}, whose attention SGLang keeps in forms of its own"
        fix = "set weight_sync.transport=tensors: whole tensors, which SGLang takes apart itself"
        raise UserError("weight_sync.transport", "shards", rule, fix)
    if shape.family == "mixtral" and shape.head_dim * shape.num_attention_heads != shape.hidden_size:
        rule = f"must be hidden_size / num_attention_heads = {shape.hidden_size // shape.num_attention_heads} in SGLang"
        raise UserError("config.json: head_dim", shape.head_dim, rule, "use another model, or engine transformers")


@dataclass(frozen=True)
class ServedBox:
    """A rectangle of a Hugging Face tensor, and where it lies in a server rank's parameter."""

    hf_name: str
    hf_start: Extent
    start: Extent
    """Corner in the parameter. An expert's box has one more dimension than its tensor: the expert's place comes first."""
    size: Extent
    """Size in the tensor."""


Form = Literal["trained", "fp8", "scales"]
"""Numbers of a served parameter: as trained; rounded to eight bits; the scales of those."""


@dataclass(frozen=True)
class ServedParameter:
    """One parameter of one server rank."""

    name: str
    shape: Extent
    boxes: tuple[ServedBox, ...]
    """Boxes that cover the parameter without overlap, except for padding of the vocabulary."""
    form: Form = "trained"


_STACKED = {
    "q_proj": ("qkv_proj", 0), "k_proj": ("qkv_proj", 1), "v_proj": ("qkv_proj", 2),
    "gate_proj": ("gate_up_proj", 0), "up_proj": ("gate_up_proj", 1),
}  # fmt: skip
"""Hugging Face layer -> SGLang's fused one, and the place in it."""
_BY_COLUMNS = ("o_proj", "down_proj")
_EXPERT_LAYERS = {"mixtral": ("w1", "w3", "w2")}
"""Gate, up and down projection of an expert, for families with other names than most."""
_USUAL_EXPERT_LAYERS = ("gate_proj", "up_proj", "down_proj")
_VOCABULARY = ("embed_tokens", "lm_head")


def served_parameters(
    shape: ModelShape,
    layout: RolloutLayout,
    tp_rank: int,
    layers: tuple[int, ...] | None = None,
    *,
    fp8: Fp8Format | None = None,
) -> list[ServedParameter]:
    """Return all parameters of one rank of a server, in the order of the model.

    Args:
        shape: of the model.
        layout: of the server.
        tp_rank: of the rank in it.
        layers: those to go through; None means all.
        fp8: format of the server's linear layers, with scales of blocks, that ``check_served`` allows; None means as trained.

    Raises:
        UserError: the layout does not fit the model.
    """
    layout.check(shape)
    tensors, found = hf_tensors(shape, layers), []
    done: set[str] = set()
    for name, extent in tensors.items():
        target = _target(name, shape)
        if target in done:
            continue
        done.add(target)
        if ".experts." in name:
            found.append(_experts(target, name, shape, layout, tp_rank))
        elif (layer := _layer(name)) in _STACKED:
            found.append(_stacked(target, name, tensors, shape, layout.tp_size, tp_rank))
        elif layer in _VOCABULARY:
            rows = -(-shape.vocab_size // VOCAB_MULTIPLE) * VOCAB_MULTIPLE // layout.tp_size
            start = tp_rank * rows
            count = max(0, min(rows, shape.vocab_size - start))
            boxes = (ServedBox(name, (start, 0), (0, 0), (count, extent[1])),) if count else ()
            found.append(ServedParameter(target, (rows, extent[1]), boxes))
        elif layer in _BY_COLUMNS and len(extent) == 2:
            columns = extent[1] // layout.tp_size
            size = (extent[0], columns)
            found.append(ServedParameter(target, size, (ServedBox(name, (0, tp_rank * columns), (0, 0), size),)))
        else:
            corner = tuple(0 for _ in extent)
            found.append(ServedParameter(target, extent, (ServedBox(name, corner, corner, extent),)))
    if fp8 is None:
        return found
    return [each for parameter in found for each in _in_eight_bits(parameter, tensors, fp8)]


def _in_eight_bits(parameter: ServedParameter, tensors: dict[str, Extent], fp8: Fp8Format) -> Iterator[ServedParameter]:
    """Yield a parameter as a server of FP8 weights holds it."""
    name = parameter.boxes[0].hf_name if parameter.boxes else ""
    if not is_quantized(name, tensors.get(name, ())):
        yield parameter
        return
    yield replace(parameter, form="fp8")
    boxes = tuple(
        ServedBox(fp8.scale_name(box.hf_name), _block(box.hf_start), _block(box.start), grid(box.size))
        for box in parameter.boxes
    )
    extent = (*parameter.shape[:-2], *grid(parameter.shape[-2:]))
    yield ServedParameter(fp8.scale_name(parameter.name), extent, boxes, "scales")


def _block(corner: Extent) -> Extent:
    """Return the block of a corner; an expert's place, in front, stays."""
    return (*corner[:-2], *(place // BLOCK for place in corner[-2:]))


def check_served(shape: ModelShape, fmt: Fp8Format, layout: RolloutLayout) -> None:
    """Raise ``UserError`` if SGLang would refuse the format: a rank's part of a layer must consist of whole blocks.

    Args:
        shape: of the model.
        fmt: the format; scales of whole tensors fit any layout.
        layout: of the servers.
    """
    # Latent attention is not cut here: there SGLang itself refuses.
    if fmt.granularity == "tensor" or shape.latent is not None:
        return
    extents = hf_tensors(shape)
    for parameter in served_parameters(shape, layout, tp_rank=0):
        for part in parameter.boxes:
            extent = extents[part.hf_name]
            if not is_quantized(part.hf_name, extent):
                continue
            is_stacked = len(parts_of_fused(part.hf_name)) > 1
            for what, size, whole in zip(("rows", "columns"), part.size, extent):
                if size % BLOCK and (size < whole or (is_stacked and what == "rows")):
                    raise UserError(
                        "rollout.sglang_cfg.tp_size",
                        layout.tp_size,
                        f"a rank holds {size} {what} of {part.hf_name}, where SGLang wants whole blocks of {BLOCK}",
                        "choose another size, or one scale for each tensor",
                    )


def _layer(name: str) -> str:
    """Return the layer of a name: ``model.layers.0.mlp.up_proj.weight`` -> ``up_proj``."""
    return name.rsplit(".", 2)[-2]


def _target(name: str, shape: ModelShape) -> str:
    """Return the parameter that a tensor is part of."""
    if ".experts." in name:
        prefix, rest = name.split(".experts.")
        down = _EXPERT_LAYERS.get(shape.family, _USUAL_EXPERT_LAYERS)[2]
        return f"{prefix}.experts.{'w2' if f'.{down}.' in rest else 'w13'}_weight"
    layer = _layer(name)
    return name.replace(layer, _STACKED[layer][0]) if layer in _STACKED else name


def _rows(layer: str, rows: int, shape: ModelShape, tp_size: int, tp_rank: int) -> tuple[int, int]:
    """Return the first row and the number of rows of a rank."""
    if layer in ("k_proj", "v_proj") and tp_size > shape.num_key_value_heads:
        repeats = tp_size // shape.num_key_value_heads
        return tp_rank // repeats * shape.head_dim, shape.head_dim
    return tp_rank * (rows // tp_size), rows // tp_size


def _stacked(
    target: str, name: str, tensors: dict[str, Extent], shape: ModelShape, tp_size: int, tp_rank: int
) -> ServedParameter:
    layer, position, boxes = _layer(name), 0, []
    for other in sorted((key for key, (fused, _) in _STACKED.items() if fused == _STACKED[layer][0]), key=_place):
        extent = tensors[name.replace(layer, other)]
        start, count = _rows(other, extent[0], shape, tp_size, tp_rank)
        rest, corner = extent[1:], tuple(0 for _ in extent[1:])
        boxes.append(ServedBox(name.replace(layer, other), (start, *corner), (position, *corner), (count, *rest)))
        position += count
    return ServedParameter(target, (position, *tensors[name][1:]), tuple(boxes))


def _place(layer: str) -> int:
    return _STACKED[layer][1]


def _experts(target: str, name: str, shape: ModelShape, layout: RolloutLayout, tp_rank: int) -> ServedParameter:
    cut = layout.tp_size // layout.ep_size
    group, rank_in_expert = divmod(tp_rank, cut)
    held = shape.num_experts // layout.ep_size
    width = shape.moe_intermediate_size // cut
    first = rank_in_expert * width
    prefix = name.split(".experts.")[0]
    gate, up, down = _EXPERT_LAYERS.get(shape.family, _USUAL_EXPERT_LAYERS)
    boxes: list[ServedBox] = []
    for place in range(held):
        expert = f"{prefix}.experts.{group * held + place}."
        if target.endswith("w2_weight"):
            size = (shape.hidden_size, width)
            boxes.append(ServedBox(f"{expert}{down}.weight", (0, first), (place, 0, 0), size))
        else:
            size = (width, shape.hidden_size)
            boxes += [
                ServedBox(f"{expert}{half}.weight", (first, 0), (place, number * width, 0), size)
                for number, half in enumerate((gate, up))
            ]
    whole = (held, shape.hidden_size, width) if target.endswith("w2_weight") else (held, 2 * width, shape.hidden_size)
    return ServedParameter(target, whole, tuple(boxes))

"""The table of a whole model: every Megatron parameter by its global name, and the HF tensors it is made of.

Global means: layers numbered over the whole model, whatever pipeline stage or chunk holds them, and no wrapper's
``module.`` in front. A norm that Transformer Engine fuses into the linear layer behind it has the name of the plain
layer here; ``find_entry`` accepts both.
"""

from __future__ import annotations

import re
from dataclasses import dataclass
from functools import lru_cache

from megatron_rl.convert import llama, qwen2, qwen3, qwen3_moe
from megatron_rl.convert.kinds import Extent, Kind, Rule, hf_shapes
from megatron_rl.convert.shape import Family, ModelShape
from megatron_rl.errors import UserError

TABLES: dict[Family, tuple[Rule, ...]] = {
    "llama": llama.TABLE,
    "qwen2": qwen2.TABLE,
    "qwen3": qwen3.TABLE,
    "qwen3_moe": qwen3_moe.TABLE,
}

_FUSED_NORMS = {
    "self_attention.linear_qkv.layer_norm_weight": "input_layernorm.weight",
    "mlp.linear_fc1.layer_norm_weight": "pre_mlp_layernorm.weight",
}
_LAYER = re.compile(r"^(decoder\.layers\.)(\d+)(\..+)$")
_EXPERT = re.compile(r"(\.local_experts\.)(\d+)(\.)")


@dataclass(frozen=True)
class Entry:
    """One Megatron parameter of one model."""

    name: str
    """Global, with the plain name of a fused norm."""
    hf_names: tuple[str, ...]
    kind: Kind
    is_copy: bool
    """Another entry owns the HF tensors: this one is loaded, never exported (tied output layer)."""
    expert: int | None = None
    """Which of the layer's experts it belongs to; such a parameter lives on one expert-parallel rank."""


def entries(shape: ModelShape) -> dict[str, Entry]:
    """All parameters, layer by layer in the order of the model: embedding, layers, final norm, output layer."""
    return dict(_entries(TABLES[shape.family], shape))


def find_entry(name: str, shape: ModelShape) -> Entry:
    """The entry of a global name, with the plain or the fused name of a norm.

    Raises:
        UserError: the checkpoint has nothing for this parameter.
    """
    entry = _entries(TABLES[shape.family], shape).get(plain_name(name))
    if entry is None:
        raise UserError(
            f"Megatron parameter {name}", None, f"the weight table of {shape.family} has nothing to fill it with",
            "remove the megatron_cfg option that adds it",
        )  # fmt: skip
    return entry


def plain_name(name: str) -> str:
    """A norm's name without fusion: ``...linear_qkv.layer_norm_weight`` -> ``...input_layernorm.weight``."""
    match = _LAYER.match(name)
    if match is None:
        return name
    prefix, layer, rest = match.groups()
    return f"{prefix}{layer}.{_FUSED_NORMS.get(rest[1:], rest[1:])}"


def global_name(local_name: str, layer_offset: int, expert_offset: int = 0) -> str:
    """The global name of a parameter of one pipeline stage or chunk.

    Args:
        local_name: as ``named_parameters`` gives it, with or without the ``module.`` of wrappers.
        layer_offset: global number of the chunk's layer 0 (``layer.layer_number - 1`` of that layer).
        expert_offset: number of this expert-parallel rank's first expert.

    Example:
        >>> global_name("module.decoder.layers.1.mlp.linear_fc2.weight", layer_offset=4)
        'decoder.layers.5.mlp.linear_fc2.weight'
    """
    name = re.sub(r"^(module\.)+", "", local_name)
    match = _LAYER.match(name)
    if match is None:
        return name
    prefix, layer, rest = match.groups()
    rest = _EXPERT.sub(lambda found: f"{found[1]}{int(found[2]) + expert_offset}{found[3]}", rest)
    return f"{prefix}{int(layer) + layer_offset}{rest}"


def names_of_all_experts(name: str, shape: ModelShape) -> list[str]:
    """The same parameter of every expert of the layer; of what belongs to no expert, the name itself."""
    if _EXPERT.search(name) is None:
        return [name]
    return [_EXPERT.sub(rf"\g<1>{expert}\g<3>", name) for expert in range(shape.num_experts)]


def hf_tensors(shape: ModelShape) -> dict[str, Extent]:
    """Every tensor of the HF checkpoint and its shape, in the order of ``entries``."""
    return {
        name: extent
        for entry in entries(shape).values()
        for name, extent in zip(entry.hf_names, hf_shapes(entry.kind, shape), strict=True)
    }  # fmt: skip


@lru_cache(maxsize=8)
def _entries(table: tuple[Rule, ...], shape: ModelShape) -> dict[str, Entry]:
    rules = [rule for rule in table if not rule.needs or getattr(shape, rule.needs)]
    per_layer = [rule for rule in rules if "{layer}" in rule.megatron]
    embedding, *outer = [rule for rule in rules if "{layer}" not in rule.megatron]
    found: dict[str, Entry] = {}

    def add(rule: Rule, layer: int) -> None:
        for expert in range(shape.num_experts) if "{expert}" in rule.megatron else (None,):
            name = rule.megatron.format(layer=layer, expert=expert)
            assert name not in found, f"{name} is declared twice"
            hf_names = tuple(hf.format(layer=layer, expert=expert) for hf in rule.hf)
            found[name] = Entry(name, hf_names, rule.kind, rule.is_copy, expert)

    add(embedding, 0)
    for layer in range(shape.num_layers):
        for rule in per_layer:
            add(rule, layer)
    for rule in outer:
        add(rule, 0)
    return found

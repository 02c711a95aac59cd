"""The table of a whole model: every Megatron parameter by its global name, and the HF tensors it is made of.

Global means: layers and experts numbered over the whole model, whatever rank or chunk holds them, and no wrapper's
``module.`` in front. Megatron has several names for one thing; ``find_entry`` accepts all, the table has the plain one:

    mlp.linear_fc1.layer_norm_weight      a norm that Transformer Engine fuses into the layer behind it
    mlp.experts.linear_fc1.weight3        expert 3 of a grouped layer; here mlp.experts.local_experts.3.linear_fc1.weight
"""

from __future__ import annotations

import re
from collections.abc import Iterable
from dataclasses import dataclass
from functools import lru_cache

from megatron_rl.convert.architecture.shape import Family, ModelShape
from megatron_rl.convert.tables import deepseek_v3, llama, mixtral, qwen2, qwen3, qwen3_moe
from megatron_rl.convert.tables.kinds import Extent, Rule, ShardKind, hf_shapes
from megatron_rl.errors import UserError

TABLES: dict[Family, tuple[Rule, ...]] = {
    "llama": llama.TABLE,
    "mistral": llama.TABLE,
    "qwen2": qwen2.TABLE,
    "qwen3": qwen3.TABLE,
    "qwen3_moe": qwen3_moe.TABLE,
    "mixtral": mixtral.TABLE,
    "deepseek_v3": deepseek_v3.TABLE,
}

_FUSED_NORMS = {
    "self_attention.linear_qkv.layer_norm_weight": "input_layernorm.weight",
    "self_attention.linear_q_up_proj.layer_norm_weight": "self_attention.q_layernorm.weight",
    "self_attention.linear_kv_up_proj.layer_norm_weight": "self_attention.kv_layernorm.weight",
    "mlp.linear_fc1.layer_norm_weight": "pre_mlp_layernorm.weight",
}
_LAYER = re.compile(r"^(decoder\.layers\.)(\d+)(\..+)$")
_GROUPED = re.compile(r"\.experts\.(linear_fc[12])\.weight(\d+)$")
_EXPERT = re.compile(r"(\.local_experts\.|\.experts\.linear_fc[12]\.weight)(\d+)(?=\.|$)")
_STACKED = re.compile(r"\.experts\.weight[12]$")
_EXTRA_STATE = "_extra_state"


@dataclass(frozen=True)
class Entry:
    """One Megatron parameter of one model."""

    name: str
    """Global name, with the plain name of a fused norm."""
    hf_names: tuple[str, ...]
    kind: ShardKind
    is_copy: bool
    """Another entry owns the HF tensors: this one is loaded, never exported (tied output layer)."""
    expert: int | None = None
    """Number of the layer's expert that it belongs to; such a parameter lives on one expert-parallel rank."""
    is_float32: bool = False
    """Kept in float32 by checkpoints and by Megatron, whatever the type of the model."""


def entries(shape: ModelShape, layers: tuple[int, ...] | None = None) -> dict[str, Entry]:
    """Return all parameters in the order of the model: embedding, layers, final norm, output layer.

    Args:
        shape: of the model.
        layers: those to go through; None means all.
    """
    return dict(_entries(TABLES[shape.family], shape, layers))


def find_entry(name: str, shape: ModelShape) -> Entry:
    """Return the entry of a global name, plain, fused or grouped.

    Raises:
        UserError: the checkpoint has nothing for this parameter.
    """
    entry = _entries(TABLES[shape.family], shape).get(plain_name(name))
    if entry is None and _STACKED.search(name):
        raise UserError(
            f"Megatron parameter {name}", None, "stacks all experts of a rank in one matrix (the legacy grouped layer)",
            "remove moe_use_legacy_grouped_gemm: moe_grouped_gemm alone keeps one parameter an expert",
        )  # fmt: skip
    if entry is None:
        raise UserError(
            f"Megatron parameter {name}", None, f"the weight table of {shape.family} has nothing to fill it with",
            "remove the megatron_cfg option that adds it",
        )  # fmt: skip
    return entry


def is_extra_state(name: str) -> bool:
    """Say whether a state dict's entry is a module's bookkeeping (scales of FP8 products), which no checkpoint fills."""
    return name.endswith(_EXTRA_STATE)


def plain_name(name: str) -> str:
    """Return the table's name: ``...linear_qkv.layer_norm_weight`` -> ``...input_layernorm.weight``."""
    match = _LAYER.match(name)
    if match is None:
        return name
    prefix, layer, rest = match.groups()
    rest = _GROUPED.sub(r".experts.local_experts.\g<2>.\g<1>.weight", rest)
    return f"{prefix}{layer}.{_FUSED_NORMS.get(rest[1:], rest[1:])}"


def dropped_tensors(names: Iterable[str], shape: ModelShape) -> dict[str, str]:
    """Return the tensors of a checkpoint that are left out of the model on purpose, and why.

    Args:
        names: of all tensors in the checkpoint.
        shape: of the model.

    Returns:
        HF name -> reason, in the order of ``names``. What is neither here nor in ``hf_tensors`` is a mistake.
    """
    last = shape.num_layers + shape.num_mtp_layers
    prefixes = tuple(f"model.layers.{layer}." for layer in range(shape.num_layers, last))
    reason = "multi-token prediction is not trained"
    return {name: reason for name in names if prefixes and name.startswith(prefixes)}


def global_name(local_name: str, layer_offset: int, expert_offset: int = 0) -> str:
    """Return the global name of a parameter of one pipeline stage or chunk.

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
    rest = _EXPERT.sub(lambda found: f"{found[1]}{int(found[2]) + expert_offset}", rest)
    return f"{prefix}{int(layer) + layer_offset}{rest}"


def names_of_all_experts(name: str, shape: ModelShape) -> list[str]:
    """Return the same parameter of every expert of the layer; without an expert, the name itself."""
    if _EXPERT.search(name) is None:
        return [name]
    return [_EXPERT.sub(rf"\g<1>{expert}", name) for expert in range(shape.num_experts)]


def hf_tensors(shape: ModelShape, layers: tuple[int, ...] | None = None) -> dict[str, Extent]:
    """Return every tensor of the HF checkpoint and its shape, in the order of ``entries``; ``layers`` as there."""
    return {
        name: extent
        for entry in entries(shape, layers).values()
        for name, extent in zip(entry.hf_names, hf_shapes(entry.kind, shape), strict=True)
    }  # fmt: skip


def float32_tensors(shape: ModelShape) -> frozenset[str]:
    """Return the HF tensors that a checkpoint stores in float32, whatever the type of the others."""
    return frozenset(name for entry in entries(shape).values() if entry.is_float32 for name in entry.hf_names)


@lru_cache(maxsize=8)
def _entries(table: tuple[Rule, ...], shape: ModelShape, layers: tuple[int, ...] | None = None) -> dict[str, Entry]:
    rules = [rule for rule in table if not rule.needs or getattr(shape, rule.needs)]
    per_layer = [rule for rule in rules if "{layer}" in rule.megatron]
    embedding, *outer = [rule for rule in rules if "{layer}" not in rule.megatron]
    found: dict[str, Entry] = {}

    def add(rule: Rule, layer: int) -> None:
        for expert in range(shape.num_experts) if "{expert}" in rule.megatron else (None,):
            name = rule.megatron.format(layer=layer, expert=expert)
            assert name not in found, f"{name} is declared twice"
            hf_names = tuple(hf.format(layer=layer, expert=expert) for hf in rule.hf)
            found[name] = Entry(name, hf_names, rule.kind, rule.is_copy, expert, rule.is_float32)

    add(embedding, 0)
    for layer in range(shape.num_layers) if layers is None else layers:
        kind = "experts" if shape.has_experts(layer) else "dense"
        for rule in per_layer:
            if rule.layers in ("all", kind):
                add(rule, layer)
    for rule in outer:
        add(rule, 0)
    return found

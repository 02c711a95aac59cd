"""Formats of rollout weights in eight bits: which tensors have them, and with which scales. ``quantize`` computes them."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from math import ceil
from typing import Literal

from megatron_rl.convert.tables.kinds import Extent

BLOCK = 128
_KEPT = ("embed_tokens", "lm_head", "gate", "router")
_FUSED = (("q_proj", "k_proj", "v_proj"), ("gate_proj", "up_proj"), ("w1", "w3"), ("q_a_proj", "kv_a_proj_with_mqa"))
"""Layers that SGLang stacks into one; the third as Mixtral's experts name them, the last is DeepSeek's."""


@dataclass(frozen=True)
class Fp8Format:
    """The storage format of weights in eight bits."""

    granularity: Literal["block", "tensor"] = "block"
    power_of_two: bool = False
    """Scales are rounded up to powers of two, which e8m0 can hold. SGLang then also quantises activations that way."""

    def scale_name(self, name: str) -> str:
        """Return the name of the tensor with the scales of ``name``."""
        return name + ("_scale_inv" if self.granularity == "block" else "_scale")

    def scale_shape(self, extent: Extent) -> Extent:
        """Return the shape of that tensor: one number for each block, or a scalar."""
        return grid(extent) if self.granularity == "block" else ()


def is_quantized(name: str, extent: Extent) -> bool:
    """Check whether a Hugging Face tensor is the weight of a linear layer of the decoder, routers excluded."""
    layer = name.split(".")[-2] if "." in name else ""
    return name.startswith("model.layers.") and name.endswith(".weight") and len(extent) == 2 and layer not in _KEPT


def parts_of_fused(name: str) -> tuple[str, ...]:
    """Return all weights that SGLang fuses into one layer with this one, itself included."""
    prefix, layer, last = name.rsplit(".", 2)
    for parts in _FUSED:
        if layer in parts:
            return tuple(f"{prefix}.{part}.{last}" for part in parts)
    return (name,)


def quantization_config(names: Iterable[str], fmt: Fp8Format) -> dict[str, object]:
    """Return ``quantization_config`` of config.json, as SGLang and transformers read it.

    Args:
        names: of the model's tensors.
        fmt: the format; transformers reads ``granularity="block"`` only.
    """
    routers = [name.removesuffix(".weight") for name in names if name.endswith((".gate.weight", ".router.weight"))]
    fields: dict[str, object] = {
        "quant_method": "fp8",
        "fmt": "e4m3",
        "activation_scheme": "dynamic",
        "modules_to_not_convert": ["lm_head", *routers],
    }
    if fmt.granularity == "block":
        fields["weight_block_size"] = [BLOCK, BLOCK]
    if fmt.power_of_two:
        fields["scale_fmt"] = "ue8m0"
    return fields


def grid(extent: Extent) -> Extent:
    """Return the number of blocks along each dimension."""
    return tuple(ceil(size / BLOCK) for size in extent)

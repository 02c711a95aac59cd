"""Tensors of a transformers model in memory under the names of its checkpoint.

transformers 5 fuses the experts of a layer, and calls Mixtral's layers as in other families; checkpoints keep experts apart
and Mixtral's own names.
"""

from __future__ import annotations

from collections.abc import Mapping

from torch import Tensor

from megatron_rl.convert.architecture.shape import Family

ROUTER_BIAS = ".gate.e_score_correction_bias"
"""End of the name of the one buffer that checkpoints hold; DeepSeek-V3's routers have it."""

_MIXTRAL = {"gate_proj": "w1", "up_proj": "w3", "down_proj": "w2"}


def checkpoint_views(tensors: Mapping[str, Tensor], family: Family) -> dict[str, Tensor]:
    """Return views by checkpoint name.

    Args:
        tensors: parameters (or their gradients) and, where a checkpoint holds some, buffers, by name in memory.
        family: of the model.
    """
    views: dict[str, Tensor] = {}
    for name, tensor in tensors.items():
        prefix, found, last = name.rpartition("experts.")
        if not found or last not in ("gate_up_proj", "down_proj"):
            views[_stored_name(name, family)] = tensor
            continue
        for expert, weight in enumerate(tensor.unbind()):
            parts = zip(("gate_proj", "up_proj"), weight.chunk(2)) if last == "gate_up_proj" else ((last, weight),)
            views |= {_stored_name(f"{prefix}experts.{expert}.{part}.weight", family): view for part, view in parts}
    return views


def _stored_name(name: str, family: Family) -> str:
    if family != "mixtral" or ".mlp." not in name:
        return name
    prefix, rest = name.split(".mlp.")
    return f"{prefix}.block_sparse_moe.{'.'.join(_MIXTRAL.get(part, part) for part in rest.split('.'))}"

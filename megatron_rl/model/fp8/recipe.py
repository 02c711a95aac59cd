"""FP8 recipes under Megatron's field names, and where they run.

    fp8         inputs and weights   gradients of outputs
    e4m3        e4m3                 e4m3
    hybrid      e4m3                 e5m2

    fp8_recipe  one scale for                              runs on
    delayed     a tensor, from the amax of past passes     Ada, Hopper and later
    tensorwise  a tensor, from its own amax                Ada, Hopper and later; Transformer Engine 2.2
    blockwise   1 x 128 elements, 128 x 128 of weights     Hopper; Transformer Engine 2.3, CUDA 12.9
    mxfp8       1 x 32 elements                            Blackwell before 12.0; Transformer Engine 2.1

On a CPU all four are emulated (``emulation.py``).
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Literal

import torch

from megatron_rl.config import Config, installed
from megatron_rl.errors import UserError

RecipeName = Literal["delayed", "tensorwise", "blockwise", "mxfp8"]
Version = tuple[int, ...]

_FIELD = "policy.megatron_cfg.fp8_recipe"


@dataclass(frozen=True)
class Fp8Recipe:
    """The types and scales of the three products of a linear layer."""

    kind: RecipeName
    forward: torch.dtype
    """Type of inputs and weights."""
    backward: torch.dtype
    """Type of the gradient of the output."""
    margin: int = 0
    """Delayed scaling: powers of two left free above the largest value."""
    history_len: int = 1
    """Delayed scaling: passes that are remembered."""
    uses_max: bool = False
    """Delayed scaling: the largest of them counts, not the last."""
    quantizes_weight_gradient: bool = True


def recipe_of(passed: Mapping[str, Any]) -> Fp8Recipe | None:
    """Read the recipe from fields of Megatron's config, with Megatron's defaults; None without ``fp8``."""
    if not passed.get("fp8"):
        return None
    kind: RecipeName = passed.get("fp8_recipe") or "delayed"
    return Fp8Recipe(
        kind=kind,
        forward=torch.float8_e4m3fn,
        backward=torch.float8_e5m2 if passed["fp8"] == "hybrid" else torch.float8_e4m3fn,
        margin=passed.get("fp8_margin", 0),
        history_len=passed.get("fp8_amax_history_len", 1),
        uses_max=passed.get("fp8_amax_compute_algo") == "max",
        # Megatron passes the switch on under delayed scaling alone.
        quantizes_weight_gradient=passed.get("fp8_wgrad", True) or kind != "delayed",
    )


@dataclass(frozen=True)
class _Needs:
    capability: Version
    engine: Version
    cuda: Version
    below: Version | None = None
    """The first capability that has it no longer."""
    instead: str = "tensorwise"


_NEEDS: dict[RecipeName, _Needs] = {
    "delayed": _Needs((8, 9), (1, 0), (12, 1), instead="no fp8 at all"),
    "tensorwise": _Needs((8, 9), (2, 2), (12, 1), instead="delayed"),
    "blockwise": _Needs((9, 0), (2, 3), (12, 9), below=(10, 0)),
    "mxfp8": _Needs((10, 0), (2, 1), (12, 8), below=(12, 0)),
}


_NOT_EMULATED = {
    "fp8_dot_product_attention": "has attention in eight bits, which is not emulated",
    "fp8_multi_head_attention": "has attention in eight bits, which is not emulated",
}


def check_fp8(config: Config, recipe: Fp8Recipe, device: torch.device, *, is_local: bool) -> None:
    """A config's recipe can run where its model is to live.

    Args:
        config: of the run.
        recipe: that its ``policy.megatron_cfg`` asks for.
        device: of the model.
        is_local: whether its layers are Megatron's own.

    Raises:
        UserError: it cannot.
    """
    passed = config.policy.megatron_cfg
    if device.type == "cpu":
        _check_emulated(passed, recipe)
    elif is_local and _engine_version() is not None:
        raise UserError(
            "policy.megatron_cfg.transformer_impl", "local", "computes nothing in eight bits, whatever fp8 says",
            "leave it out, or leave fp8 out",
        )  # fmt: skip
    else:
        check_here(recipe.kind, device)


def check_here(kind: RecipeName, device: torch.device) -> None:
    """``check_gpu`` of a GPU of this machine, and what is installed."""
    capability, cuda = torch.cuda.get_device_capability(device), _version(torch.version.cuda or "0")
    check_gpu(kind, capability=capability, engine=_engine_version(), cuda=cuda)


def _check_emulated(passed: Mapping[str, Any], recipe: Fp8Recipe) -> None:
    for field, why in _NOT_EMULATED.items():
        if passed.get(field):
            raise UserError(f"policy.megatron_cfg.{field}", True, why + "; this is a CPU", "leave it out, or use a GPU")
    recomputed = "selective: moe" if passed.get("moe_layer_recompute") else passed.get("recompute_granularity")
    if recipe.kind == "delayed" and recomputed and (recomputed != "selective" or _recomputed(passed) != ["core_attn"]):
        raise UserError(
            "policy.megatron_cfg.recompute_granularity", recomputed,
            "would move the scales of delayed scaling twice; this is a CPU, where FP8 is emulated",
            f"leave it out, or set {_FIELD}=tensorwise",
        )  # fmt: skip
    if recipe.kind == "delayed" and passed.get("expert_model_parallel_size", 1) > 1:
        raise UserError(
            _FIELD, recipe.kind, "is not emulated with experts on several ranks: this is a CPU", "use tensorwise"
        )  # fmt: skip


def _recomputed(passed: Mapping[str, Any]) -> list[str]:
    return list(passed.get("recompute_modules") or ["core_attn"])


def _engine_version() -> Version | None:
    found = installed.version_of(installed.BINDINGS)
    return None if found is None else _version(found)


def _version(text: str) -> Version:
    numbers = [re.match(r"\d+", part) for part in text.split(".")[:2]]
    return tuple(int(number[0]) for number in numbers if number)


def check_gpu(kind: RecipeName, *, capability: Version, engine: Version | None, cuda: Version) -> None:
    """A GPU and its software can run a recipe.

    Args:
        kind: the recipe.
        capability: of the GPU, as (major, minor).
        engine: version of Transformer Engine; None where it is not installed.
        cuda: version that torch was built for.

    Raises:
        UserError: they cannot. Nothing falls back to another precision by itself.
    """
    needs = _NEEDS[kind]
    if engine is None:
        raise UserError(
            "policy.megatron_cfg.fp8", kind, "needs Transformer Engine, which is not installed",
            "make PLATFORM=gpu installs it (docs/fp8.md); or leave fp8 out",
        )  # fmt: skip
    if capability < needs.capability or (needs.below is not None and capability >= needs.below):
        wanted = f"{_text(needs.capability)} or later" + (f", before {_text(needs.below)}" if needs.below else "")
        rule = f"needs a GPU of compute capability {wanted}"
        if kind == "blockwise":  # Transformer Engine would take later ones, and make other blocks of these
            rule = "needs a GPU of compute capability 9.0, Hopper, the one with such blocks of its own"
        instead = "mxfp8" if kind == "blockwise" and (10, 0) <= capability < (12, 0) else needs.instead
        if capability < _NEEDS["tensorwise"].capability:
            instead = "no fp8 at all"
        raise UserError(
            _FIELD,
            kind,
            f"{rule}; this one has {_text(capability)}",
            f"use {instead}",
        )
    for name, found, least in (("Transformer Engine", engine, needs.engine), ("CUDA", cuda, needs.cuda)):
        if found < least:
            raise UserError(
                _FIELD, kind, f"needs {name} {_text(least)} or later; this is {_text(found)}",
                f"use {needs.instead}, or a newer {name}",
            )  # fmt: skip


def _text(version: Version) -> str:
    return ".".join(map(str, version))

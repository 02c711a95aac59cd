"""Rotary embedding parameters of a ``config.json``, in the transformers 4 and 5 spellings.

4: {"rope_theta": 5e5, "rope_scaling": {"rope_type": "llama3", "factor": 8.0, ...}}    ("type" in older files)
5: {"rope_parameters": {"rope_theta": 5e5, "rope_type": "llama3", "factor": 8.0, ...}}
"""

from __future__ import annotations

from collections.abc import Collection
from dataclasses import dataclass
from typing import Literal

from megatron_rl.convert.architecture.fields import ConfigFields

_LLAMA3_KEYS = ("factor", "low_freq_factor", "high_freq_factor", "original_max_position_embeddings")
_YARN_KEYS = ("factor", "original_max_position_embeddings", "beta_fast", "beta_slow", "mscale", "mscale_all_dim")
_KNOWN_KEYS = {
    "default": {"rope_theta", "rope_type", "type", "partial_rotary_factor"},
    "llama3": set(_LLAMA3_KEYS),
    "yarn": set(_YARN_KEYS),
}

RopeType = Literal["default", "llama3", "yarn"]


@dataclass(frozen=True)
class RopeScaling:
    """The "llama3" scaling of the inverse frequencies, under the names of ``config.json``."""

    factor: float
    low_freq_factor: float
    high_freq_factor: float
    original_max_position_embeddings: int


@dataclass(frozen=True)
class YarnScaling:
    """YaRN (arXiv 2309.00071) as DeepSeek uses it, under the names of ``config.json``."""

    factor: float
    original_max_position_embeddings: int
    beta_fast: float
    beta_slow: float
    mscale: float
    mscale_all_dim: float
    """0.0: the softmax keeps its scale. Otherwise scores are also multiplied by (0.1 mscale_all_dim ln(factor) + 1)^2."""


def read_rope(
    config: ConfigFields, *, types: Collection[RopeType] = ("default", "llama3"), default_theta: float = 10_000.0
) -> tuple[float, RopeScaling | YarnScaling | None]:
    """Return (rope_theta, scaling).

    Args:
        config: the file.
        types: those that the family's model implements; any other is refused.
        default_theta: of the family's class, where the file says nothing.
    """
    known = set().union(*(_KNOWN_KEYS[kind] for kind in types))
    implemented = " and ".join(repr(kind) for kind in types)
    found: dict[str, tuple[str, object]] = {}  # parameter -> (where the file says it, value)
    for section in ("rope_scaling", "rope_parameters"):
        values = config.get(section, {})
        if not isinstance(values, dict):
            raise config.error(section, "must be an object or null")
        if set(values) - known:
            raise config.error(
                f"{section}.{sorted(set(values) - known)[0]}",
                "this rotary parameter is not implemented",
                f"use a model with rope type {implemented}",
            )
        for key, value in values.items():
            _add(config, found, "rope_type" if key == "type" else key, f"{section}.{key}", value)
    for key in ("rope_theta", "partial_rotary_factor"):
        _add(config, found, key, key, config.get(key))

    rope_type_field, rope_type = found.get("rope_type", ("rope_parameters.rope_type", "default"))
    if rope_type not in types:
        raise config.error(
            rope_type_field,
            f"only the rope types {implemented} are implemented",
            "use a model without context extension",
        )
    partial_field, partial = found.get("partial_rotary_factor", ("partial_rotary_factor", 1.0))
    if partial != 1:
        raise config.error(partial_field, "rotating a part of each head is not implemented", "use another model")
    theta = config.check_positive(*found.get("rope_theta", ("rope_theta", default_theta)))
    if rope_type == "default":
        return theta, None
    section = rope_type_field.split(".")[0]
    return theta, (_read_llama3 if rope_type == "llama3" else _read_yarn)(config, found, section)


def _add(config: ConfigFields, found: dict[str, tuple[str, object]], key: str, field: str, value: object) -> None:
    """Note one parameter. A file that carries both spellings is fine as long as they agree."""
    if value is None:
        return
    if key in found and found[key][1] != value:
        raise config.error(field, f"contradicts {found[key][0]} = {found[key][1]!r}", "remove one of the two")
    found.setdefault(key, (field, value))


def _read_llama3(config: ConfigFields, found: dict[str, tuple[str, object]], section: str) -> RopeScaling:
    values = {}
    for key in _LLAMA3_KEYS:
        if key not in found:
            raise config.error(f"{section}.{key}", "is required by rope type 'llama3'")
        values[key] = config.check_positive(*found[key])
    scaling = RopeScaling(
        values["factor"], values["low_freq_factor"], values["high_freq_factor"],
        int(values["original_max_position_embeddings"]),
    )  # fmt: skip
    if scaling.high_freq_factor <= scaling.low_freq_factor:
        raise config.error(f"{section}.high_freq_factor", f"must exceed low_freq_factor = {scaling.low_freq_factor}")
    return scaling


def _read_yarn(config: ConfigFields, found: dict[str, tuple[str, object]], section: str) -> YarnScaling:
    for key in ("factor", "original_max_position_embeddings"):
        if key not in found:
            raise config.error(f"{section}.{key}", "is required by rope type 'yarn'")
    # With one of the two alone, implementations differ in what they compute.
    if ("mscale" in found) != ("mscale_all_dim" in found):
        missing = "mscale" if "mscale_all_dim" in found else "mscale_all_dim"
        raise config.error(f"{section}.{missing}", "mscale and mscale_all_dim must be given together, or neither")
    neither: dict[str, object] = {"beta_fast": 32.0, "beta_slow": 1.0, "mscale": 1.0, "mscale_all_dim": None}
    values = {key: found.get(key, (f"{section}.{key}", neither.get(key))) for key in _YARN_KEYS}
    numbers = {
        key: 0.0 if value is None else config.check_positive(where, value) for key, (where, value) in values.items()
    }
    if numbers["factor"] < 1:
        raise config.error(values["factor"][0], "must be at least 1")
    original = int(numbers.pop("original_max_position_embeddings"))
    return YarnScaling(original_max_position_embeddings=original, **numbers)

"""Rotary embedding parameters of a ``config.json``, in the transformers 4 and 5 spellings.

4: {"rope_theta": 5e5, "rope_scaling": {"rope_type": "llama3", "factor": 8.0, ...}}    ("type" in older files)
5: {"rope_parameters": {"rope_theta": 5e5, "rope_type": "llama3", "factor": 8.0, ...}}
"""

from __future__ import annotations

from dataclasses import dataclass

from megatron_rl.convert.fields import ConfigFields

_LLAMA3_KEYS = ("factor", "low_freq_factor", "high_freq_factor", "original_max_position_embeddings")
_KNOWN_KEYS = {"rope_theta", "rope_type", "type", "partial_rotary_factor", *_LLAMA3_KEYS}


@dataclass(frozen=True)
class RopeScaling:
    """The "llama3" scaling of the inverse frequencies, under the names of ``config.json``."""

    factor: float
    low_freq_factor: float
    high_freq_factor: float
    original_max_position_embeddings: int


def read_rope(config: ConfigFields) -> tuple[float, RopeScaling | None]:
    """(rope_theta, scaling): refuses every type but the plain one and "llama3"."""
    found: dict[str, tuple[str, object]] = {}  # parameter -> (where the file says it, value)
    for section in ("rope_scaling", "rope_parameters"):
        values = config.get(section, {})
        if not isinstance(values, dict):
            raise config.error(section, "must be an object or null")
        if set(values) - _KNOWN_KEYS:
            unknown = sorted(set(values) - _KNOWN_KEYS)[0]
            raise config.error(
                f"{section}.{unknown}",
                "this rotary parameter is not implemented",
                "use a model with plain or llama3 rotary embeddings",
            )
        for key, value in values.items():
            _add(config, found, "rope_type" if key == "type" else key, f"{section}.{key}", value)
    for key in ("rope_theta", "partial_rotary_factor"):
        _add(config, found, key, key, config.get(key))

    rope_type_field, rope_type = found.get("rope_type", ("rope_parameters.rope_type", "default"))
    if rope_type not in ("default", "llama3"):
        raise config.error(
            rope_type_field,
            "only the rope types 'default' and 'llama3' are implemented",
            "use a model without context extension",
        )
    partial_field, partial = found.get("partial_rotary_factor", ("partial_rotary_factor", 1.0))
    if partial != 1:
        raise config.error(partial_field, "rotating a part of each head is not implemented", "use another model")
    theta = config.check_positive(*found.get("rope_theta", ("rope_theta", 10_000.0)))
    return theta, _read_llama3(config, found, rope_type_field) if rope_type == "llama3" else None


def _add(config: ConfigFields, found: dict[str, tuple[str, object]], key: str, field: str, value: object) -> None:
    """Note one parameter. A file that carries both spellings is fine as long as they agree."""
    if value is None:
        return
    if key in found and found[key][1] != value:
        raise config.error(field, f"contradicts {found[key][0]} = {found[key][1]!r}", "remove one of the two")
    found.setdefault(key, (field, value))


def _read_llama3(config: ConfigFields, found: dict[str, tuple[str, object]], rope_type_field: str) -> RopeScaling:
    section = rope_type_field.split(".")[0]
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

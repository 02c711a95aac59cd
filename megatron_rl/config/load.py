"""Reads a YAML file and dotted overrides into a checked ``Config``."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import asdict
from difflib import get_close_matches
from pathlib import Path
from typing import Any, get_args

from omegaconf import OmegaConf
from omegaconf.errors import OmegaConfBaseException
from pydantic import TypeAdapter, ValidationError

from megatron_rl.config import secrets
from megatron_rl.config.methods import MethodConfig, check_can_be_saved, find_method, settings_code
from megatron_rl.config.other_names import translate
from megatron_rl.config.reader import Tree, read_tree
from megatron_rl.config.schema import Config
from megatron_rl.config.secrets import Keys
from megatron_rl.config.section import ARE_PATHS, ARE_SETS, IS_PATH
from megatron_rl.config.upstream import nearest
from megatron_rl.errors import UserError

MAX_FLOAT32, MIN_FLOAT32 = 3.4028234e38, 1.1754944e-38
RENAMED = {
    "algorithm.mask_threshold": "algorithm.selection.max_probability",
    "algorithm.probabilities": "algorithm.selection.probabilities",
}
"""Keys of older files. Leaving one out would change what is trained, so the error names the new key."""
GONE = {
    "rollout.servers.use_router": "the engine itself chooses a server for each prompt",
}
"""Keys of older files that have no successor, and why."""


def load_config(path: str | Path, overrides: Sequence[str] = ()) -> Config:
    """Read a config file: ``defaults:`` first, then the file, then the overrides, then interpolation, then the checks.

    Args:
        path: YAML file. ``defaults: other.yaml`` (or a list) names files to inherit from, relative to this one.
        overrides: ``section.field=value``, in YAML syntax.

    Raises:
        UserError: for the first thing that is wrong, naming the dotted key.
    """
    written = read_tree(path, overrides)
    given = _resolve(written, path)
    for where, value in _leaves(given):
        if value == "???":  # in an exemplar, one that only the user knows
            raise _missing(".".join(where))
    method = _find_method(given.get("algorithm", {}))
    secrets.remember(
        written,
        given,
        is_path=lambda where: any(kind in (IS_PATH, ARE_PATHS, ARE_SETS) for kind in _types_of(where, method)),
    )
    for where, value in _leaves(given):
        if isinstance(value, bool):
            types = _types_of(where, method)
            if bool not in types and (int in types or float in types):
                raise UserError(".".join(where), value, "is no number", "give one")
    given["algorithm"] = _check_method(given["algorithm"], method)
    try:
        config = TypeAdapter(Config).validate_python(given)
    except ValidationError as error:
        raise _explain(error, Config, ()) from None
    _check_numbers(config)
    secrets.refuse_clear_text(written)
    return config


def _find_method(given: object) -> type[MethodConfig]:
    """Return the class that checks the section ``algorithm``: its name picks it."""
    if not isinstance(given, dict):
        rule = "is a section with a name, not a value"
        raise UserError("algorithm", given, rule, "give algorithm.name=grpo, or another method")
    if "name" not in given:
        raise UserError(
            "algorithm.name", None, "has no default and must be given", "add algorithm.name=grpo, or another"
        )
    return find_method(given["name"])


def _check_method(given: Tree, settings: type[MethodConfig]) -> MethodConfig:
    """Check the section ``algorithm``."""
    with settings_code(given["name"]):
        try:
            method = TypeAdapter(settings).validate_python(given)
        except ValidationError as error:
            raise _explain(error, settings, ("algorithm",)) from None
    check_can_be_saved(method)
    return method


def _resolve(written: Tree, path: str | Path) -> Tree:
    """Return the tree with its interpolations filled in."""
    try:
        resolved = OmegaConf.to_container(OmegaConf.create(written), resolve=True, throw_on_missing=False)
    except (OmegaConfBaseException, RecursionError) as error:
        key = getattr(error, "full_key", None) or str(path)
        reason = str(error).splitlines()[0]
        fix = "export the variable" if "Environment variable" in reason else "correct the interpolation"
        raise UserError(key, None, f"cannot be resolved ({reason})", fix) from None
    assert isinstance(resolved, dict)
    return {str(key): value for key, value in resolved.items()}


def _leaves(tree: Any, where: Keys = ()) -> Iterator[tuple[Keys, Any]]:
    """Yield each single value of nested dicts and lists, with the keys that lead to it."""
    if isinstance(tree, dict | list | tuple):
        for key, inner in tree.items() if isinstance(tree, dict) else enumerate(tree):
            yield from _leaves(inner, (*where, str(key)))
    else:
        yield where, tree


def _types_of(where: Keys, method: type) -> list[Any]:
    """Return what the annotation of a field is made of; nothing for keys that lead to no field."""
    found: list[Any] = [Config]
    for key in where:
        fields = getattr(found[0], "__pydantic_fields__", {})
        if key not in fields:
            break
        field = fields[key]
        is_method = found[0] is Config and key == "algorithm"
        found = [method] if is_method else [*_parts_of(field.annotation), *field.metadata]
    return [] if hasattr(found[0], "__pydantic_fields__") else found


def _parts_of(hint: Any) -> Iterator[Any]:
    yield hint
    for part in get_args(hint):
        yield from _parts_of(part)


def _check_numbers(config: Config) -> None:
    """Check that tensors, counters and files can hold every number of a config."""
    for where, value in _leaves(asdict(config)):
        field = ".".join(where)
        if isinstance(value, int) and not -(2**63) <= value < 2**63:
            raise UserError(field, value, "does not fit into 64 bits", "give a smaller number")
        if isinstance(value, float) and value and not MIN_FLOAT32 <= abs(value) <= MAX_FLOAT32:
            rule = f"must be 0, or between {MIN_FLOAT32:.2g} and {MAX_FLOAT32:.2g} in size: a float32 holds no other"
            raise UserError(field, value, rule, "correct the value")


def _missing(key: str) -> UserError:
    return UserError(key, None, "has no default and must be given", f"add {key}=VALUE to the command line or the file")


def _explain(error: ValidationError, section: type, where: tuple[str, ...]) -> Exception:
    """Turn pydantic's first error into ours; what a section's own check raised stays what it is.

    Args:
        error: of checking a section.
        section: the class that was checked.
        where: keys that lead to the section.
    """
    first = error.errors(include_url=False)[0]
    cause = first.get("ctx", {}).get("error")
    if isinstance(cause, UserError) or (isinstance(cause, Exception) and not first["loc"]):
        return cause
    inner = [str(part) for part in first["loc"]]
    key = ".".join([*where, *inner])
    if first["type"] == "unexpected_keyword_argument" and key in RENAMED:
        return UserError(key, first["input"], "is not a known key", f"it is {RENAMED[key]} now")
    if first["type"] == "unexpected_keyword_argument" and key in GONE:
        return UserError(key, first["input"], f"is gone: {GONE[key]}", "leave it out")
    if first["type"] == "unexpected_keyword_argument":
        ours = _fields(section, inner[:-1])
        other = translate(key, first["input"])
        if other and (other.is_exact or not get_close_matches(inner[-1], ours, cutoff=0.8)):
            return UserError(other.key, other.value, other.rule, other.fix)
        return UserError(key, first["input"], "is not a known key", nearest(inner[-1], ours))
    if first["type"] in ("missing", "missing_argument", "missing_keyword_only_argument"):
        return _missing(key)
    if first["type"] == "kind":
        return UserError(key, first["input"], *first["ctx"].values())
    if first["type"] == "dataclass_type":
        return UserError(key, first["input"], "is a section, not a value", f"give its fields, as {key}.FIELD=VALUE")
    rule = first["msg"][0].lower() + first["msg"][1:]
    # YAML reads 5 as a number, and the prompt template {question} as a mapping.
    needs_quotes = first["type"] == "string_type" and isinstance(first["input"], int | float | dict)
    text = first["input"] if isinstance(first["input"], int | float) else "{...}"
    fix = f"put it into quotes of its own, as in {key}='\"{text}\"'" if needs_quotes else "correct the value"
    if key == "trainer.max_steps" and first["input"] == 0:
        fix = "megatron-rl eval MODEL evaluates without training"
    return UserError(key, first["input"], rule, fix)


def _fields(section: Any, keys: Sequence[str]) -> list[str]:
    """Return the field names of the section that ``keys`` lead to."""
    for key in keys:
        section = section.__pydantic_fields__[key].annotation
    return list(getattr(section, "__pydantic_fields__", ()))

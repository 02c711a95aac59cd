"""Reads a YAML file and dotted overrides into a checked ``Config``."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from typing import get_type_hints

from omegaconf import DictConfig, OmegaConf
from omegaconf.errors import OmegaConfBaseException
from pydantic import TypeAdapter, ValidationError
from yaml import YAMLError

from megatron_rl.config.methods import MethodConfig, check_can_be_saved, find_method, settings_code
from megatron_rl.config.schema import Config
from megatron_rl.config.upstream import nearest
from megatron_rl.errors import UserError
from megatron_rl.files import disk_errors, write_atomic

NOT_YAML = (YAMLError, OmegaConfBaseException, ValueError)
"""Errors of reading a text that is not YAML, or whose keys and interpolations OmegaConf does not know."""
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
    merged = _read(Path(path), seen=())
    for item in overrides:
        merged = _override(merged, item)
    try:
        data = OmegaConf.to_container(merged, resolve=True, throw_on_missing=False)
    except OmegaConfBaseException as error:
        key = getattr(error, "full_key", None) or str(path)
        raise UserError(
            key, None, f"cannot be resolved ({str(error).splitlines()[0]})", "correct the interpolation"
        ) from None
    assert isinstance(data, dict)
    _check_given(data, ())
    given = {str(key): value for key, value in data.items()}
    given["algorithm"] = _check_method(given.get("algorithm", {}))
    try:
        return TypeAdapter(Config).validate_python(given)
    except ValidationError as error:
        raise _explain(error, Config, ()) from None


def _check_method(given: object) -> MethodConfig:
    """Check the section ``algorithm`` by the class that its name picks."""
    if not isinstance(given, dict):
        rule = "is a section with a name, not a value"
        raise UserError("algorithm", given, rule, "give algorithm.name=grpo, or another method")
    if "name" not in given:
        raise UserError(
            "algorithm.name", None, "has no default and must be given", "add algorithm.name=grpo, or another"
        )
    settings = find_method(given["name"])
    with settings_code(given["name"]):
        try:
            method = TypeAdapter(settings).validate_python(given)
        except ValidationError as error:
            raise _explain(error, settings, ("algorithm",)) from None
    check_can_be_saved(method)
    return method


def save_resolved(config: Config, path: Path) -> None:
    """Write the config with every default filled in, so that the file alone repeats the run; makes the folder.

    Raises:
        UserError: it cannot be written.
    """
    with disk_errors(path, field="exp_manager.exp_dir"):
        write_atomic(path, OmegaConf.to_yaml(OmegaConf.create(asdict(config))))


def _read(path: Path, seen: tuple[Path, ...]) -> DictConfig:
    path = path.resolve()
    if path in seen:
        chain = " -> ".join(p.name for p in (*seen, path))
        raise UserError(
            "defaults", path.name, f"files inherit from each other in a circle: {chain}", "break the circle"
        )
    try:
        loaded = OmegaConf.load(path)
    except OSError as error:
        reason = error.strerror or str(error)
        raise UserError("config", str(path), f"cannot be read ({reason})", "give the path of a YAML file") from None
    except NOT_YAML as error:
        raise UserError("config", str(path), f"is not valid YAML ({_reason(error)})", "correct the file") from None
    if not isinstance(loaded, DictConfig):
        raise UserError("config", str(path), "must be a mapping of sections", "start from a file in configs/")
    plain = OmegaConf.to_container(loaded, resolve=False)
    assert isinstance(plain, dict)
    parents = plain.pop("defaults", None) or []
    parents = [parents] if isinstance(parents, str) else parents
    if not (isinstance(parents, list) and all(isinstance(parent, str) for parent in parents)):
        raise UserError("defaults", parents, "must be the path of a YAML file, or a list of such", f"correct {path}")
    above = [_read(path.parent / parent, (*seen, path)) for parent in parents]
    try:
        merged = OmegaConf.merge(*above, plain)
    except TypeError as error:
        raise UserError("config", str(path), f"does not fit its defaults ({error})", "correct the file") from None
    assert isinstance(merged, DictConfig)
    return merged


def _override(config: DictConfig, item: str) -> DictConfig:
    """Return the config with one override in it."""
    key, equals, value = item.partition("=")
    if not equals or not all(key.split(".")) or key != key.strip():
        raise UserError("override", item, "must read section.field=value", "for example trainer.max_steps=100")
    try:
        merged = OmegaConf.merge(config, OmegaConf.from_dotlist([item]))
    except NOT_YAML as error:
        fix = f"put a text that is not YAML into quotes of its own, as in {key}='\"a: b\"'"
        raise UserError(key, value, f"is not a valid YAML value ({_reason(error)})", fix) from None
    except TypeError as error:
        raise UserError(key, value, f"does not fit what is there ({error})", "give a value of the same kind") from None
    assert isinstance(merged, DictConfig)
    return merged


def _reason(error: Exception) -> str:
    """Say what is wrong with a YAML text, and where if that is known, without the excerpts that parsers add."""
    mark = getattr(error, "problem_mark", None)
    where = "" if mark is None else f"line {mark.line + 1}, column {mark.column + 1}: "
    return where + (getattr(error, "problem", None) or next(iter(str(error).splitlines()), type(error).__name__))


def _check_given(data: object, where: tuple[str, ...]) -> None:
    """A value of ``???`` in an exemplar is one that only the user knows."""
    if isinstance(data, dict):
        for key, value in data.items():
            _check_given(value, (*where, str(key)))
    elif data == "???":
        key = ".".join(where)
        raise UserError(
            key, None, "has no default and must be given", f"add {key}=VALUE to the command line or the file"
        )


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
        return UserError(key, first["input"], "is not a known key", nearest(inner[-1], _fields(section, inner[:-1])))
    if first["type"] in ("missing", "missing_argument", "missing_keyword_only_argument"):
        return UserError(
            key, None, "has no default and must be given", f"add {key}=VALUE to the command line or the file"
        )
    if first["type"] == "dataclass_type":
        return UserError(key, first["input"], "is a section, not a value", f"give its fields, as {key}.FIELD=VALUE")
    rule = first["msg"][0].lower() + first["msg"][1:]
    return UserError(key, first["input"], rule, "correct the value")


def _fields(section: type, keys: Sequence[str]) -> list[str]:
    """Return the field names of the section that ``keys`` lead to."""
    for key in keys:
        section = get_type_hints(section).get(key, object)
    return list(getattr(section, "__dataclass_fields__", ()))

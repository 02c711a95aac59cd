"""Values from the environment: used as they are, but saved, printed and sent as the interpolation that gave them.

    exp_manager: {mlflow_logger_kwargs: {tracking_uri: "${oc.env:MLFLOW_URI}"}}

``remember`` notes such values while a config is loaded. ``shown`` is the config for every eye but the run's own: its saved file
still works where the variable is set. A path is no secret, and stays readable. A secret in clear text is refused.
"""

from __future__ import annotations

import os
import re
from collections.abc import Callable, Iterator, Mapping
from dataclasses import asdict
from hashlib import blake2b
from pathlib import Path
from typing import Any

from omegaconf import OmegaConf

from megatron_rl.config.schema import Config
from megatron_rl.errors import UserError, hide, is_clear_text
from megatron_rl.files import atomic_file, disk_errors

FROM_ENVIRONMENT = re.compile(r"\$\{\s*oc\.env\s*:")

Keys = tuple[str, ...]
_TEXTS: dict[tuple[Keys, str], str] = {}
"""Keys that lead to a value from the environment, and the value -> its interpolation."""


def remember(written: Any, resolved: Any, *, is_path: Callable[[Keys], bool]) -> None:
    """Note the values that interpolations took from the environment.

    Args:
        written: the config as it is written.
        resolved: the same, interpolated.
        is_path: tells the keys of paths.
    """
    texts = {where: (text, value) for where, text, value in _pairs(written, resolved) if value and not is_path(where)}
    taken = {value: text for text, value in texts.values() if FROM_ENVIRONMENT.search(text)}
    for where, (text, value) in texts.items():
        if value in taken or ("${" in text and any(secret in value for secret in taken)):
            _TEXTS[where, value] = text if "${" in text else taken[value]
            hide(value, _TEXTS[where, value])


def refuse_clear_text(written: Any, where: Keys = ()) -> None:
    """Refuse secrets that are written out: ``api_key: abc``, ``http://user:password@host``, ``http://host/?token=abc``.

    Raises:
        UserError: there is one.
    """
    if isinstance(written, dict | list):
        for key, inner in written.items() if isinstance(written, dict) else enumerate(written):
            refuse_clear_text(inner, (*where, str(key)))
    elif is_clear_text(next((key for key in reversed(where) if not key.isdecimal()), ""), written):
        raise UserError(
            ".".join(where),
            None,
            "holds a secret in clear text, which would be saved, printed and seen by others on the machine",
            "export it as a variable, and give ${oc.env:VARIABLE}",
        )


def _pairs(written: Any, resolved: Any, where: Keys = ()) -> Iterator[tuple[Keys, str, str]]:
    """Yield keys, text as written and value of each text of a config; no text for what an interpolated section holds."""
    if isinstance(resolved, dict | list):
        for key, inner in resolved.items() if isinstance(resolved, dict) else enumerate(resolved):
            text = written[key] if isinstance(written, dict | list) else ""
            yield from _pairs(text, inner, (*where, str(key)))
    elif isinstance(resolved, str) and isinstance(written, str):
        yield where, written, resolved


def shown(config: Config, *, with_digests: bool = False) -> dict[str, Any]:
    """Return the config as nested dicts, with interpolations in place of values from the environment.

    Args:
        config: a checked config.
        with_digests: put a digest behind each interpolation, so that two ranks can compare what they got.
    """

    def masked(value: Any, where: Keys) -> Any:
        if isinstance(value, Mapping):
            return {key: masked(inner, (*where, str(key))) for key, inner in value.items()}
        if isinstance(value, list | tuple):
            return [masked(inner, (*where, str(index))) for index, inner in enumerate(value)]
        if not isinstance(value, str) or (where, value) not in _TEXTS:
            return value
        text = _TEXTS[where, value]
        return f"{text} [{blake2b(value.encode(), digest_size=8).hexdigest()}]" if with_digests else text

    tree = masked(asdict(config), ())
    assert isinstance(tree, dict)
    return tree


def to_yaml(config: Config) -> str:
    """Return the config with every default filled in, as YAML."""
    return OmegaConf.to_yaml(OmegaConf.create(shown(config)))


def save_resolved(config: Config, path: Path) -> None:
    """Write the config with every default filled in, so that the file alone repeats the run; only its owner may read it.

    Makes the folder.

    Raises:
        UserError: it cannot be written.
    """
    with (
        disk_errors(path, field="exp_manager.exp_dir"),
        atomic_file(path) as temporary,
        open(temporary, "w", encoding="utf-8", opener=_private) as file,
    ):
        file.write(to_yaml(config))


def _private(path: str, flags: int) -> int:
    """Open a file for its owner alone, before the first byte."""
    descriptor = os.open(path, flags, 0o600)
    os.fchmod(descriptor, 0o600)
    return descriptor

"""Typed access to the fields of one ``config.json``, with errors that name the file and the field."""

from __future__ import annotations

import json
import math
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from megatron_rl.errors import UserError

MAX_WIDTH, MAX_LENGTH = 2**20, 2**30
"""Limits of a layer's sizes, and of vocabulary and context: far beyond any model, and within what a machine can address."""


@dataclass(frozen=True)
class ConfigFields:
    """The fields of one file. A ``null`` counts as absent, as in transformers."""

    path: Path
    values: dict[str, Any]

    @staticmethod
    def read(path: Path) -> ConfigFields:
        """Read and parse the file, which must hold one json object."""
        fix = "point model_path at a directory written by save_pretrained or downloaded from the hub"
        try:
            values = json.loads(path.read_text(encoding="utf-8"))
        except OSError as error:
            raise UserError(str(path), None, f"cannot be read ({error.strerror})", fix) from error
        except ValueError as error:
            raise UserError(str(path), None, f"is not valid json ({error})", fix) from error
        if not isinstance(values, dict):
            raise UserError(str(path), None, "must hold one json object", fix)
        return ConfigFields(path, values)

    def get(self, key: str, default: Any = None) -> Any:
        """Return the raw value, unchecked."""
        value = self.values.get(key)
        return default if value is None else value

    def error(self, key: str, rule: str, fix: str = "correct the file, or use another model") -> UserError:
        """Return the error to raise; it shows the field as the file has it."""
        value: object = self.values
        for part in key.split("."):
            value = value.get(part) if isinstance(value, dict) else None
        return UserError(f"{self.path}: {key}", value, rule, fix)

    def positive_int(self, key: str, default: int | None = None, *, at_most: int = MAX_WIDTH) -> int:
        """Return an integer of at least 1; it is required if ``default`` is None."""
        value = self.get(key, default)
        if type(value) is not int or not 1 <= value <= at_most:
            raise self.error(key, f"must be a positive integer, at most {at_most}")
        return value

    def count(self, key: str, default: int) -> int:
        """Return an integer of at least 0."""
        value = self.get(key, default)
        if type(value) is not int or value < 0:
            raise self.error(key, "must be 0 or a positive integer")
        return value

    def positive_float(self, key: str, default: float | None = None) -> float:
        """Return a finite number above 0; it is required if ``default`` is None."""
        return self.check_positive(key, self.get(key, default))

    def check_positive(self, key: str, value: object) -> float:
        """Return ``value`` as a float; ``key`` is only for the error."""
        if type(value) not in (int, float) or not math.isfinite(value) or value <= 0:  # type: ignore[arg-type, operator]
            raise self.error(key, "must be a positive number")
        return float(value)  # type: ignore[arg-type]

    def boolean(self, key: str, default: bool) -> bool:
        """Return a json boolean; 0 and 1 are refused."""
        value = self.get(key, default)
        if type(value) is not bool:
            raise self.error(key, "must be true or false")
        return value

    def token_ids(self, key: str) -> tuple[int, ...]:
        """Return one id or a list of ids as a tuple; an absent field gives an empty one."""
        value = self.get(key, [])
        ids = value if isinstance(value, list) else [value]
        if any(type(token) is not int for token in ids):
            raise self.error(key, "must be a token id or a list of token ids")
        return tuple(ids)

    def token_id(self, key: str) -> int | None:
        """Return one id, or None."""
        ids = self.token_ids(key)
        if len(ids) > 1:
            raise self.error(key, "must be one token id")
        return ids[0] if ids else None

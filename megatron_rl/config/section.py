"""Config sections: each is a frozen, keyword-only dataclass that refuses unknown keys, NaN and infinity."""

from __future__ import annotations

from typing import TypeVar, cast, dataclass_transform

from pydantic import ConfigDict
from pydantic.dataclasses import dataclass

T = TypeVar("T")


@dataclass_transform(frozen_default=True, kw_only_default=True)
def section(cls: type[T]) -> type[T]:
    """Make a checked section of a class with annotated fields."""
    # NaN passes every bound that is checked by comparison, and an infinite rate or limit says nothing anyone means.
    checks = ConfigDict(extra="forbid", validate_default=True, allow_inf_nan=False)
    make = dataclass(frozen=True, kw_only=True, config=checks)
    return cast("type[T]", make(cls))

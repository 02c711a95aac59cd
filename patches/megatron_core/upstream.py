"""Applies a patch: check that upstream still has what is to be changed, change it once, or stop and say so.

Not a patch itself.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable
from importlib import metadata
from types import ModuleType
from typing import Any

_MARK = "_megatron_rl_patch"


def require(owner: ModuleType | type, name: str) -> Any:
    """The attribute that ``owner`` itself defines, not one that it inherits.

    Raises:
        RuntimeError: upstream has moved or removed it, so the patch needs a person to look at it.
    """
    if name not in vars(owner):
        place = owner.__name__ if isinstance(owner, ModuleType) else f"{owner.__module__}.{owner.__qualname__}"
        raise RuntimeError(
            f"{place} has no {name} in megatron-core {metadata.version('megatron-core')}: "
            f"a patch of megatron_rl changes it. Install a version in the range its header states, or adapt the patch."
        )
    return getattr(owner, name)


def replace(owner: ModuleType | type, name: str, wrap: Callable[[Any], Any]) -> None:
    """Set ``owner.name = wrap(original)``, once: what is already ours is left alone.

    Args:
        owner: the module or class that defines the function.
        name: of the function; a static method stays one.
        wrap: from the original function to ours.
    """
    original = require(owner, name)
    if hasattr(original, _MARK):
        return
    kind = type(inspect.getattr_static(owner, name))
    assert kind is not classmethod, f"{name} is bound to its class: wrap its __func__"
    ours = wrap(original)
    setattr(ours, _MARK, original)
    setattr(owner, name, staticmethod(ours) if kind is staticmethod else ours)


def restore(owner: ModuleType | type, name: str) -> None:
    """Undo ``replace``, for tests that show what breaks without a patch."""
    ours = require(owner, name)
    is_static = isinstance(inspect.getattr_static(owner, name), staticmethod)
    original = getattr(ours, _MARK)
    setattr(owner, name, staticmethod(original) if is_static else original)

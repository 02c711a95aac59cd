"""Patches of torch itself, for every process that opens a store: launcher, ranks, servers."""

from __future__ import annotations

from . import bound_store


def apply() -> list[str]:
    """Apply all; returns their names. Harmless when repeated."""
    bound_store.apply()
    return ["bound_store"]

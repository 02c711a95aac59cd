"""The stock SGLang wheel on a machine without a GPU. Applied by the server process alone: see ``apply_cpu``."""

from __future__ import annotations


def apply_cpu() -> list[str]:
    """Make ``import sglang`` possible. Call it in the server's main module, before that import.

    SGLang's scheduler and detokenizer are forked from its process, patches included.

    Returns:
        Names of the applied topics.
    """
    from . import absent_packages, forked_children, unpinned_memory

    absent_packages.apply()
    forked_children.apply()
    unpinned_memory.apply()
    return ["absent_packages", "forked_children", "unpinned_memory"]

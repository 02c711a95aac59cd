"""The stock SGLang wheel on a machine without a GPU. Applied by the server process alone: see ``apply_cpu``."""

from __future__ import annotations


def apply_cpu() -> list[str]:
    """Make ``import sglang`` possible. Call it in the body of the server's main module, before that import.

    SGLang starts its scheduler and detokenizer with the ``spawn`` method, which imports the main module anew in each of
    them: what its body does, every process of the server does.

    Returns:
        Names of the applied topics.
    """
    from . import absent_packages, unpinned_memory

    absent_packages.apply()
    unpinned_memory.apply()
    return ["absent_packages", "unpinned_memory"]

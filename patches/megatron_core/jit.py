"""Load Megatron-Core without torch.compile.

Why: about forty functions are decorated with ``torch.compile`` while Megatron is imported. On CPU that loads the
    compiler (seconds a process) and calls g++ in the first step: 26 s until a tiny model has done one step.
Upstream: ``megatron.core.jit.enable_jit_fuser``, called at import; ``disable_jit_fuser`` exists, but cannot be called
    before ``megatron.core`` has imported, and decorated, everything.
Versions: 0.16.1 - 0.19.2 (tested on 0.16.1 and 0.19.2)
Remove when: the fuser can be switched off before the import, by an environment variable or per call.
Tested by: tests/unit/patches/test_patch_jit.py
"""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch

from .upstream import require


def _leave_uncompiled(function: Callable[..., Any] | None = None, **_options: object) -> Callable[..., Any]:
    """Stand-in for ``torch.compile`` in both of its forms, ``@compile`` and ``@compile(option=...)``."""
    return function if function is not None else _leave_uncompiled


@contextmanager
def without_compiler() -> Iterator[None]:
    """Import ``megatron.core`` inside this block; modules that are imported later stay uncompiled as well.

    Raises:
        RuntimeError: ``megatron.core`` is there already, with its functions decorated.
    """
    if "megatron.core" in sys.modules:
        raise RuntimeError("megatron.core is already imported: call megatron_rl.patches.apply() before that")
    original = torch.compile
    torch.compile = _leave_uncompiled  # type: ignore[assignment]
    try:
        yield
    finally:
        torch.compile = original
    require(sys.modules["megatron.core.jit"], "disable_jit_fuser")()

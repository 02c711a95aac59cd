"""What we had to change in upstream packages, applied at run time: one folder an upstream, one file a topic.

Importing this package changes nothing. ``apply()`` is called once, at process start, before the first import of
``megatron.core``. Each topic file says in its header what breaks without it and when it can go.
"""

from __future__ import annotations

import importlib.util
import logging

import torch

from megatron_rl.errors import UserError

logger = logging.getLogger("megatron_rl.patches")

_applied: list[str] | None = None
_REQUIRED_BY_CHECKPOINTS = ("psutil", "tqdm")


def apply() -> list[str]:
    """Patch upstream for this machine, once; later calls change nothing and return the same names.

    On a machine with CUDA only what concerns checkpoints is patched; the rest is about running on CPU and gloo.

    Returns:
        Names of the applied patches, as ``upstream.topic``, in order of application.

    Raises:
        UserError: a package is missing without which checkpoints would hang.
        RuntimeError: ``megatron.core`` was imported earlier, or no longer has what a patch changes.
    """
    global _applied
    if _applied is None:
        _check_packages()
        from . import megatron_core

        topics = [] if torch.cuda.is_available() else megatron_core.apply_cpu()
        names = [f"megatron_core.{topic}" for topic in topics + megatron_core.apply_everywhere()]
        for name in names:
            logger.info("applied patch %s", name)
        _applied = names
    return list(_applied)


def _check_packages() -> None:
    """Megatron imports these optionally, and its checkpoint writers die or hang without them, far from the cause."""
    for package in _REQUIRED_BY_CHECKPOINTS:
        if importlib.util.find_spec(package) is None:
            raise UserError(
                package, None, "must be installed: saving a checkpoint hangs without it", f"pip install {package}"
            )

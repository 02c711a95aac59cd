"""Changes to upstream packages, applied at run time: one folder an upstream, one file a topic.

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
_device_type: str | None = None
_REQUIRED_BY_CHECKPOINTS = ("psutil", "tqdm")


def apply(device_type: str | None = None) -> list[str]:
    """Patch upstream for the device that the model will live on, once; later calls change nothing and return the same names.

    What is about running on CPU and gloo is for those alone; local layers, torch's Adam and checkpoints need their patches
    anywhere.

    Args:
        device_type: ``cpu`` or ``cuda``; None, for those without a config, takes CUDA where torch sees it.

    Returns:
        Names of the applied patches, as ``upstream.topic``, in order of application.

    Raises:
        UserError: a package is missing without which checkpoints would hang.
        RuntimeError: ``megatron.core`` was imported earlier, or no longer has what a patch changes; or this process was patched
            for the other type of device, which cannot be undone.
    """
    global _applied, _device_type
    if device_type is None:
        device_type = _device_type or ("cuda" if torch.cuda.is_available() else "cpu")
    if _device_type not in (None, device_type):
        raise RuntimeError(f"megatron.core is patched for {_device_type} and cannot serve {device_type} in one process")
    if _applied is None:
        _check_packages()
        from . import megatron_core, pytorch

        topics = megatron_core.apply_cpu() if device_type == "cpu" else []
        names = [f"pytorch.{topic}" for topic in pytorch.apply()]
        names += [f"megatron_core.{topic}" for topic in topics + megatron_core.apply_everywhere()]
        for name in names:
            logger.info("applied patch %s", name)
        _applied, _device_type = names, device_type
    return list(_applied)


def _check_packages() -> None:
    """Megatron imports these optionally, and its checkpoint writers die or hang without them, far from the cause."""
    for package in _REQUIRED_BY_CHECKPOINTS:
        if importlib.util.find_spec(package) is None:
            raise UserError(
                package, None, "must be installed: saving a checkpoint hangs without it", f"pip install {package}"
            )

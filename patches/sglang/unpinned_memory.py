"""Host buffers that need not be pinned where there is no GPU to copy to.

Why: the buffer for routed experts registers its memory with CUDA whatever the device: AssertionError, "Torch not compiled
    with CUDA enabled", and the server ends.
Upstream: ``_cuda_host_register`` in sglang/srt/mem_cache/pool_host/common.py
Versions: 0.5.23 - 0.5.23
Remove when: ``BaseHostCache`` asks for pinned memory on CUDA alone.
Tested by: tests/servers/test_experts_server.py
"""

from __future__ import annotations

from typing import Any


def apply() -> None:
    """Replace the registration; imports SGLang, so ``absent_packages`` comes first."""
    from sglang.srt.mem_cache.pool_host import common

    if not hasattr(common, "_cuda_host_register"):
        raise RuntimeError("sglang's mem_cache/pool_host/common.py has no _cuda_host_register: this patch needs a look")
    common._cuda_host_register = _leave_as_it_is


def _leave_as_it_is(*_args: Any, **_options: Any) -> None:
    pass

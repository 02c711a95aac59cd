"""Host buffers that need not be pinned where there is no GPU to copy to.

Why: the buffer for routed experts registers its memory with CUDA whatever the device: AssertionError, "Torch not compiled
    with CUDA enabled", and the server ends.
Upstream: ``torch.cuda.cudart`` as ``_cuda_host_register`` in sglang/srt/mem_cache/pool_host/common.py uses it
Versions: 0.5.23 - 0.5.23
Remove when: ``BaseHostCache`` asks for pinned memory on CUDA alone.
Tested by: tests/servers/test_experts_server.py
"""

from __future__ import annotations

import torch


def apply() -> None:
    """Let CUDA's runtime say yes; nothing is imported for it, SGLang reads the attribute when it needs it."""
    torch.cuda.cudart = _NoRuntime


class _NoRuntime:
    def cudaHostRegister(self, *_: int) -> int:
        """Success."""
        return 0

    def cudaHostUnregister(self, *_: int) -> int:
        """Success."""
        return 0

"""Host buffers that need not be pinned where there is no GPU to copy to.

Why: the buffer for routed experts registers its memory with CUDA whatever the device: AssertionError, "Torch not compiled
    with CUDA enabled", and the server ends.
Upstream: ``torch.cuda.cudart`` as ``_cuda_host_register`` in sglang/srt/mem_cache/pool_host/common.py uses it
Versions: 0.5.23 - 0.5.23
Remove when: ``BaseHostCache`` asks for pinned memory on CUDA alone.
Tested by: tests/servers/test_experts_server.py
"""

from __future__ import annotations

from importlib.machinery import PathFinder
from pathlib import Path

import torch


def apply() -> None:
    """Let CUDA's runtime say yes; nothing is imported for it, SGLang reads the attribute when it needs it.

    Raises:
        RuntimeError: SGLang does not register memory there any more, so this patch needs a look.
    """
    spec = PathFinder.find_spec("sglang")
    assert spec is not None and spec.origin is not None
    source = Path(spec.origin).parent / "srt/mem_cache/pool_host/common.py"
    if "def _cuda_host_register(" not in source.read_text():
        raise RuntimeError(f"{source} has no _cuda_host_register: this patch of megatron_rl needs a look")
    torch.cuda.cudart = _NoRuntime


class _NoRuntime:
    def cudaHostRegister(self, *_: int) -> int:
        """Success."""
        return 0

    def cudaGetErrorString(self, *_: int) -> str:
        """Never asked for: nothing fails."""
        return "no CUDA"

    def cudaHostUnregister(self, *_: int) -> int:
        """Success."""
        return 0

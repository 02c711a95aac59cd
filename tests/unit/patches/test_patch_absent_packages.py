"""In processes of their own: the stand-ins must not reach the trainer, nor the other tests."""

from __future__ import annotations

import subprocess
import sys
from importlib.machinery import PathFinder

import pytest

BODY = """
import sys
from megatron_rl.patches import sglang
assert "triton" not in sys.modules
sglang.apply_cpu()
sglang.apply_cpu()
"""


def run(code: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run([sys.executable, "-c", BODY + code], capture_output=True, text=True, timeout=120)


@pytest.mark.slow
@pytest.mark.skipif(PathFinder.find_spec("triton") is not None, reason="triton is installed: nothing stands in for it")
def test_decorators_classes_and_constants_work_as_modules_use_them() -> None:
    done = run(
        """
import triton, triton.language as tl
from torchvision.transforms import InterpolationMode
@triton.jit
def kernel(): return 1
@triton.autotune(configs=[], key=[])
@triton.jit(debug=True)
def other(): return 2
assert (kernel(), other()) == (1, 2)
assert triton.cdiv(7, 2) == 4 and triton.next_power_of_2(5) == 8
assert InterpolationMode.BICUBIC == "BICUBIC"
class Mine(tl.Tensor): pass
assert not triton.runtime and list(tl) == []
"""
    )
    assert done.returncode == 0, done.stderr


@pytest.mark.slow
def test_a_call_that_would_compute_fails_loudly() -> None:
    done = run("import sgl_kernel; sgl_kernel.silu_and_mul(1, 2)")
    assert done.returncode == 1 and "sgl_kernel.silu_and_mul is not installed" in done.stderr


@pytest.mark.slow
def test_without_the_patch_sglang_does_not_import() -> None:
    """When this fails, the patch can go."""
    done = subprocess.run(
        [sys.executable, "-c", "import sglang.srt.managers.scheduler"],
        capture_output=True,
        text=True,
        timeout=120,
        env={"SGLANG_USE_CPU_ENGINE": "1", "PATH": ""},
    )
    assert done.returncode == 1 and "No module named" in done.stderr

"""Freed blocks stay in the heap up to 32 MiB, so that they are quick to have again, and ``trim_heap`` gives them back."""

from __future__ import annotations

import os
import subprocess
import sys

from megatron_rl.launch.command import ALLOCATOR

SCRIPT = """
import numpy, psutil
from megatron_rl.process.heap import trim_heap

def resident():
    return psutil.Process().memory_info().rss / 1e6

def keep_after(count, size):
    blocks = [numpy.ones(size, dtype=numpy.uint8) for _ in range(count)]
    last = blocks.pop()  # lies behind the others: the heap cannot shrink from its end
    before = resident()
    blocks.clear()
    return last, before - resident()

large, returned_large = keep_after(4, 64 << 20)
small, returned_small = keep_after(200, 1 << 20)
before = resident()
trim_heap()
print(returned_large, returned_small, before - resident())
"""


def test_small_blocks_are_kept_until_the_heap_is_trimmed() -> None:
    environment = {**os.environ, **ALLOCATOR}
    command = [sys.executable, "-c", SCRIPT]
    printed = subprocess.run(command, env=environment, check=True, capture_output=True, text=True).stdout
    returned_large, returned_small, trimmed = map(float, printed.split())
    assert returned_large > 180
    assert returned_small < 20
    assert trimmed > 180

from __future__ import annotations

import subprocess
import sys
import uuid
from pathlib import Path

from megatron_rl.rollout.sglang.leftovers import remove_leftovers

MAP = """
import mmap, sys
with open(sys.argv[1], "r+b") as file:
    mapped = mmap.mmap(file.fileno(), 16)
print(flush=True)
sys.stdin.readline()
"""


def test_a_file_goes_with_the_last_process_that_maps_it() -> None:
    used, left, foreign = (
        Path("/dev/shm") / name.replace("X", uuid.uuid4().hex)
        for name in ("sglang_loads_X.shm", "sglang_loads_X.shm", "X.shm")
    )
    for path in (used, left, foreign):
        path.write_bytes(bytes(16))
    command = [sys.executable, "-c", MAP, str(used)]
    with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True) as process:
        process.stdout.readline()
        remove_leftovers()
        assert used.exists() and not left.exists() and foreign.exists()
        process.communicate("end\n", timeout=30)
    remove_leftovers()
    assert not used.exists()
    foreign.unlink()

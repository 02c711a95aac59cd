"""The scripts for GPUs run: here on a CPU, in small."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).parents[2]


def last_line(*command: str) -> str:
    done = subprocess.run([sys.executable, *command], cwd=ROOT, check=True, capture_output=True, text=True)
    return done.stdout.splitlines()[-1]


def test_agreement() -> None:
    found = json.loads(last_line("benchmarks/gpu/agreement.py", "--tiny"))
    assert found["first_log_ratio_local_packed"] == found["first_log_ratio_local_alone"] == 0.0
    assert found["packing_abs_diff_local"] < 2e-3


def test_an_update_of_each_recipe() -> None:
    found = json.loads(last_line("benchmarks/gpu/train_step.py", "--tiny", "--one", "blockwise"))
    assert found["tokens_per_s"] > 0 and found["mfu"] > 0


def test_without_a_gpu_nothing_is_claimed() -> None:
    assert last_line("benchmarks/gpu/run.py") == "no GPU here: nothing was run"

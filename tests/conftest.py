"""Before any test module is imported: one thread a process, and the patches, so that tests may import megatron.core."""

from __future__ import annotations

import importlib.util
import os
from pathlib import Path
from typing import NoReturn

os.environ["OMP_NUM_THREADS"] = "1"

import torch

torch.set_num_threads(1)

if importlib.util.find_spec("megatron_rl.patches") is None:  # a checkout that nobody has installed
    import megatron_rl

    megatron_rl.__path__.append(str(Path(__file__).parents[1]))

from megatron_rl import patches  # noqa: E402

patches.apply("cpu")

_exit, _process = os._exit, os.getpid()


def _refuse_to_end(status: int) -> NoReturn:
    """Fail the test that ends the test process, as our programs do at their end: with status 0 all would seem well."""
    if os.getpid() == _process:
        raise AssertionError(f"a test ended the test process with status {status}")
    _exit(status)


if "PYTEST_XDIST_WORKER" not in os.environ:  # whose own end is this one
    os._exit = _refuse_to_end

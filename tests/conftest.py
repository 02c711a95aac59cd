"""Before any test module is imported: one thread a process, and the patches, so that tests may import megatron.core."""

from __future__ import annotations

import importlib.util
import os
from pathlib import Path

os.environ["OMP_NUM_THREADS"] = "1"

import torch

torch.set_num_threads(1)

if importlib.util.find_spec("megatron_rl.patches") is None:  # a checkout that nobody has installed
    import megatron_rl

    megatron_rl.__path__.append(str(Path(__file__).parents[1]))

from megatron_rl import patches  # noqa: E402

patches.apply("cpu")

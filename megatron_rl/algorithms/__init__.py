"""One file a method. ``ALGORITHMS`` is the whole list; each class takes its config section and the whole config."""

from __future__ import annotations

from megatron_rl.algorithms.base import Algorithm
from megatron_rl.algorithms.dph_rl import DPHRL
from megatron_rl.algorithms.grpo import GRPO
from megatron_rl.algorithms.rlep import RLEP
from megatron_rl.algorithms.sft import SFT
from megatron_rl.config import Config

ALGORITHMS: dict[str, type[Algorithm]] = {"grpo": GRPO, "dph_rl": DPHRL, "rlep": RLEP, "sft": SFT}


def build_algorithm(config: Config) -> Algorithm:
    """The algorithm that ``algorithm.name`` asks for."""
    return ALGORITHMS[config.algorithm.name](config)

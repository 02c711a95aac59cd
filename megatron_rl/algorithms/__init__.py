"""One file a method. ``ALGORITHMS`` is the whole list; each class takes its config section and the whole config."""

from __future__ import annotations

from megatron_rl.algorithms.base import Algorithm
from megatron_rl.algorithms.dph_rl import DPHRL
from megatron_rl.algorithms.grpo import GRPO
from megatron_rl.algorithms.rlep import RLEP
from megatron_rl.algorithms.sft import SFT
from megatron_rl.algorithms.spo_chain import SPOChain
from megatron_rl.algorithms.spo_tree import SPOTree
from megatron_rl.config import Config

ALGORITHMS: dict[str, type[Algorithm]] = {
    "grpo": GRPO, "dph_rl": DPHRL, "rlep": RLEP, "spo_chain": SPOChain, "spo_tree": SPOTree, "sft": SFT,
}  # fmt: skip


def build_algorithm(config: Config) -> Algorithm:
    """The algorithm that ``algorithm.name`` asks for."""
    return ALGORITHMS[config.algorithm.name](config)

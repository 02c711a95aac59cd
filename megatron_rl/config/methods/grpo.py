"""Settings of GRPO."""

from __future__ import annotations

from typing import ClassVar

from megatron_rl.config.methods.shared import GroupConfig
from megatron_rl.config.section import section


@section
class GRPOConfig(GroupConfig):
    """GRPO (arXiv 2402.03300) and what its users vary: DAPO, Dr. GRPO and RLOO are settings of it."""

    implementation: ClassVar[str] = "megatron_rl.algorithms.grpo:GRPO"
    name: str = "grpo"

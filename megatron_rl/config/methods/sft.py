"""Settings of supervised training."""

from __future__ import annotations

from typing import ClassVar

from megatron_rl.config.methods.base import MethodConfig, Stage
from megatron_rl.config.section import section


@section
class SFTConfig(MethodConfig):
    """Supervised next-token training on the worked solutions of the task: warm start, and later mid-training."""

    implementation: ClassVar[str] = "megatron_rl.algorithms.sft:SFT"
    stage: ClassVar[Stage] = "sft"
    name: str = "sft"

    @property
    def num_rows(self) -> None:
        """One step is one optimizer update on policy.train_global_batch_size rows."""
        return None

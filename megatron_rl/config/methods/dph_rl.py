"""Settings of DPH-RL."""

from __future__ import annotations

from dataclasses import replace
from typing import ClassVar, Literal, Self

from pydantic import Field, NonNegativeFloat, PositiveFloat, PositiveInt

from megatron_rl.config.methods.shared import GroupConfig
from megatron_rl.config.section import PathText, section

FDivergence = Literal["forward_kl", "js", "js_definition", "alpha", "reverse_kl", "likelihood"]


@section
class RehearsalConfig:
    """DPH-RL's divergence to the start, on samples of the start's own (``megatron-rl presample`` makes the pool)."""

    pool: PathText
    """Directory of the pool: the policy's initial model sampled it, and gave each token's log-prob."""
    divergence: FDivergence = "js"
    """f of the term. ``forward_kl`` always pulls a forgotten behaviour back; ``js``, ``alpha`` and ``reverse_kl`` let go of one
    that is nearly forgotten. ``js_definition`` also acts on rollouts, and keeps the initial weights for it."""
    alpha: float = Field(default=0.2, gt=0, lt=1)
    """Parameter of ``alpha``: near 0 it is the reverse KL, near 1 the forward KL."""
    coef: NonNegativeFloat = 0.025
    """The eta of loss = L_rollouts + eta L_rehearsal, each a mean over its own tokens. The released code weighs rows and not
    means: its values (js 0.05 to 0.2, forward_kl and alpha 0.01 to 0.05) times num_rows_per_update / train_global_batch_size
    are the same strength. For the same local strength js needs twice that of the KLs."""
    num_rows_per_update: PositiveInt = 128
    """Stored rows beside the policy.train_global_batch_size rollouts of each update."""


@section
class DPHRLConfig(GroupConfig):
    """DPH-RL (arXiv 2509.07430): GRPO on what the start does not solve yet, rehearsal of what it solves."""

    implementation: ClassVar[str] = "megatron_rl.algorithms.dph_rl:DPHRL"
    stored_rows_formula: ClassVar[str] = "algorithm.rehearsal.num_rows_per_update"
    name: str = "dph_rl"
    num_prompts_per_step: PositiveInt = 128
    num_generations_per_prompt: PositiveInt = 16
    ratio_clip_max: PositiveFloat = 0.28
    ratio_clip_c: float | None = 3.0
    rehearsal: RehearsalConfig

    @property
    def num_stored_rows_per_update(self) -> int:
        """Rows of the rehearsal pool in each update."""
        return self.rehearsal.num_rows_per_update

    def stored_pools(self) -> dict[str, str]:
        """Return the pool of the initial model's samples."""
        return {"algorithm.rehearsal.pool": self.rehearsal.pool}

    def scaled_down(self, num_rows: int, *, num_stored: int) -> Self:
        """Return the same method with few rollouts and few stored rows."""
        rehearsal = replace(self.rehearsal, num_rows_per_update=num_stored)
        return replace(super().scaled_down(num_rows, num_stored=num_stored), rehearsal=rehearsal)

"""Settings of RLEP."""

from __future__ import annotations

from typing import ClassVar, Literal

from pydantic import PositiveFloat, PositiveInt

from megatron_rl.config.methods.shared import GroupConfig
from megatron_rl.config.section import PathText, section
from megatron_rl.errors import UserError


@section
class ReplayConfig:
    """RLEP's verified successes of each question, put among its fresh rollouts."""

    source: Literal["pool", "online"] = "pool"
    """``pool``: of an earlier, trained policy. ``online``: those that this run itself has found in earlier steps."""
    pool: PathText | None = None
    """Directory of the pool (``megatron-rl presample`` with presample.purpose replay), where that is the source."""
    num_per_prompt: PositiveInt = 2
    """M; a question with fewer successes gets fewer."""
    max_stored_per_prompt: PositiveInt = 8
    """Successes that ``online`` keeps of each problem, the newest."""

    def __post_init__(self) -> None:
        if (self.source == "pool") != (self.pool is not None):
            raise UserError(
                "algorithm.replay.pool",
                self.pool,
                "is given exactly when algorithm.replay.source is pool",
                "name the directory of a pool" if self.pool is None else "set algorithm.replay.pool=null",
            )


@section
class RLEPConfig(GroupConfig):
    """RLEP (arXiv 2507.07451): groups of fresh rollouts and replayed successes, judged together."""

    implementation: ClassVar[str] = "megatron_rl.algorithms.rlep:RLEP"
    name: str = "rlep"
    num_prompts_per_step: PositiveInt = 512
    num_generations_per_prompt: PositiveInt = 16
    ratio_clip_max: PositiveFloat = 0.28
    ratio_clip_c: float | None = 10.0
    replay: ReplayConfig

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.kl.coef > 0:
            raise UserError(
                "algorithm.kl.coef",
                self.kl.coef,
                "estimates KL from the policy's own samples, which replays are not",
                "set it to 0 under rlep",
            )
        if self.use_dynamic_sampling:
            raise UserError(
                "algorithm.use_dynamic_sampling",
                True,
                "would throw groups without a success away before their replays come",
                "leave it off under rlep",
            )

    @property
    def has_uneven_groups(self) -> bool:
        """Groups get as many replays as there are."""
        return True

    def stored_pools(self) -> dict[str, str]:
        """Return the pool of earlier successes, where that is their source."""
        return {} if self.replay.pool is None else {"algorithm.replay.pool": self.replay.pool}

"""RL with experience replay (RLEP, arXiv 2507.07451): each question's fresh rollouts, and verified successes of earlier ones.

A group has G fresh rollouts and up to M replayed successes, and advantages are against all of them: successes in the group make
failures count as failures even where no fresh rollout succeeds. The ratio of a replayed token is to the current policy of the
step's start, as if that had sampled it; nothing corrects for the policy that did.

    pool     phase 1 trains a policy; ``megatron-rl presample`` (presample.purpose replay) keeps its successes; phase 2, this
             one, starts from the same base again
    online   successes that the run itself has found in earlier steps

Deviations from the released code: a question with fewer than M successes gets fewer replays, where the code fills up with empty
responses that count as failures; a replayed response is whole, never cut. Replays join the update of their question, so 512 of
them are 8 updates, where the code cuts its 9,216 mixed rows into 9 updates of 1,024. It scores 1 and -1, our tasks 1 and 0, so
its penalty of 1 for long responses is ``algorithm.overlong.penalty: 0.5``.
"""

from __future__ import annotations

from megatron_rl.algorithms.grpo import GRPO
from megatron_rl.algorithms.parts.replay import ReplayedRows
from megatron_rl.config import Config
from megatron_rl.config.methods.rlep import RLEPConfig


class RLEP(GRPO):
    """GRPO on groups of fresh rollouts and replayed successes."""

    def __init__(self, config: Config) -> None:
        assert isinstance(config.algorithm, RLEPConfig)
        super().__init__(config, stored=ReplayedRows(config, config.algorithm.replay))

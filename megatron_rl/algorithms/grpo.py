"""Group Relative Policy Optimization (arXiv 2402.03300), and the variants that are settings of it.

    rollouts     G of each prompt (parts/groups.py)
    credit       A_i = (r_i - mean) / (std + 1e-6) within the group, for all tokens of rollout i (parts/credit.py)
    objective    max(-A rho, -A clip(rho, 1 - ratio_clip_min, 1 + ratio_clip_max))  +  coef * KL (parts/objective.py)
    selection    all tokens, or those that ``algorithm.selection`` keeps (parts/selection.py)

    DAPO         (2503.14476)  ratio_clip_max 0.28, token-mean, use_dynamic_sampling, overlong, no KL
    Dr. GRPO     (2503.20783)  normalize_rewards false, seq-mean-token-sum-norm
    RLOO         (2402.14740)  use_leave_one_out_baseline, normalize_rewards false

Deviations from the paper: standard deviations are unbiased and get +1e-6; KL is off unless asked for; the KL term of the
loss gets the same token weights as the policy term.
"""

from __future__ import annotations

from megatron_rl.algorithms.base import OnlineAlgorithm
from megatron_rl.algorithms.parts.base import Credit, Objective, StoredRows, TokenSelection
from megatron_rl.algorithms.parts.credit import GroupCredit
from megatron_rl.algorithms.parts.groups import GroupRollouts
from megatron_rl.algorithms.parts.selection import ProbabilityMask
from megatron_rl.config import Config, GroupConfig


class GRPO(OnlineAlgorithm):
    """G rollouts per prompt, each judged against the others of its group."""

    def __init__(
        self,
        config: Config,
        *,
        selection: TokenSelection | None = None,
        credit: Credit | None = None,
        objective: Objective | None = None,
        stored: StoredRows | None = None,
    ) -> None:
        """Name the parts; a method that differs in one of them gives that one."""
        settings = config.algorithm
        assert isinstance(settings, GroupConfig)
        selection = selection or ProbabilityMask(settings.selection, config.rollout)
        super().__init__(
            config,
            rollouts=GroupRollouts(config, selection),
            selection=selection,
            credit=credit or GroupCredit(settings),
            objective=objective,
            stored=stored,
        )

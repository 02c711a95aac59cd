"""SPO-chain (arXiv 2505.23564 section 4): each segment of a response is worth what it changes the chances by.

    rollouts       G of each prompt
    borders        where a segment begins: every c-th token that the policy was not sure of (parts/chain.py)
    values         of each border: mean reward of N further rollouts that continue from it, as token ids
    advantages     of the tokens of a segment: value at its end less value at its beginning
    loss           GRPO's, over the tokens that the policy was not sure of

The rollouts of one step and all that continues them are sampled together: what continues a rollout starts the moment that is
complete. Equal borders of a prompt are sampled once.

VinePPO (2410.01679) is ``partition.kind: newlines`` without mask; naive segments are ``equal`` without mask.

Deviations from the released code: prefixes stay token ids; cut points and mask use one comparison; advantages are whitened
over the optimizer mini-batch, not over each micro-batch; no micro-batch is skipped for its ratio; a continuation that is cut at
the limit gets the reward that the task gives it. Naive segments have a value at the prompt as well, where the code has three
inner borders and no advantage before the first. KL is off; where it is on, it is a mean over the same tokens as the loss. The
code's is summed over the loss tokens of a response, so its 1e-4 is 1e-4 times their number here.
"""

from __future__ import annotations

from megatron_rl.algorithms.base import OnlineAlgorithm
from megatron_rl.algorithms.parts.chain import ChainRollouts
from megatron_rl.algorithms.parts.credit import SegmentCredit
from megatron_rl.algorithms.parts.selection import ProbabilityMask
from megatron_rl.config import Config
from megatron_rl.config.methods.spo import SPOChainConfig


class SPOChain(OnlineAlgorithm):
    """Monte-Carlo values at segment borders, whitened over an update."""

    def __init__(self, config: Config) -> None:
        assert isinstance(config.algorithm, SPOChainConfig)
        selection = ProbabilityMask(config.algorithm.selection, config.rollout, waits=False)
        rollouts, credit = ChainRollouts(config, selection), SegmentCredit(config.algorithm)
        super().__init__(config, rollouts=rollouts, credit=credit, selection=selection)

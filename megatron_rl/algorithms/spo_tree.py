"""SPO-tree (arXiv 2505.23564 section 5): a tree of rollouts for each prompt; what is trained on are its edges.

    tree           b_1 branches of M tokens from the prompt, b_2 from each of them, ...; the last level goes on to the end
    leaves         where a response ends, at whatever level: its value is its reward
    values         of an inner node: the mean of its children's
    rows           prompt and path as context, one node's tokens as response; advantage: its value less its parent's
    replay         a step trains on ``num_edges_per_step`` edges of its own trees and of those of the last steps. The ratio
                   of an old one is to the policy that grew it

Edges whose advantage is 0 are dropped. Every edge that waits gets its old log-probs in the step that grew its tree.

Deviations from the released code: advantages are whitened over the optimizer mini-batch, not over each micro-batch; the real
leave-one-out is there beside what the code calls so. KL is off; where it is on, it is a mean over the same tokens as the loss.
The code's is summed over the loss tokens of a response, so its 1e-4 is 1e-4 times their number here.
"""

from __future__ import annotations

from collections.abc import Sequence

from megatron_rl.algorithms.base import OnlineAlgorithm
from megatron_rl.algorithms.parts.credit import SegmentCredit
from megatron_rl.algorithms.parts.selection import ProbabilityMask
from megatron_rl.algorithms.parts.trees import TreeRollouts
from megatron_rl.config import Config
from megatron_rl.config.methods.spo import SPOTreeConfig
from megatron_rl.data.pack import full_batches
from megatron_rl.types import TrainingSample


class SPOTree(OnlineAlgorithm):
    """Node values averaged up from the leaves; edges are the rows."""

    def __init__(self, config: Config) -> None:
        assert isinstance(config.algorithm, SPOTreeConfig)
        selection = ProbabilityMask(config.algorithm.selection, config.rollout)
        self.trees = TreeRollouts(config, selection)
        credit = SegmentCredit(config.algorithm)
        super().__init__(config, rollouts=self.trees, credit=credit, selection=selection)

    def mini_batches(self, samples: Sequence[TrainingSample]) -> list[list[int]]:
        """Return the mini-batches of this step's edges; the edges that wait come after them in ``samples``."""
        return super().mini_batches(samples[: self.trees.num_used])

    def passes_ahead(self, samples: Sequence[TrainingSample]) -> list[list[int]]:
        """Return passes over all edges of this step's trees: those kept for later will need the log-probs of now."""
        missing = [row for row, sample in enumerate(samples) if sample.old_log_probs is None]
        return full_batches(missing, size=self.config.policy.train_global_batch_size, multiple=self.config.row_unit)

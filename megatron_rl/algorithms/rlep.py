"""RL with experience replay (RLEP, arXiv 2507.07451): each question's fresh rollouts, and verified successes of earlier ones.

A group has G fresh rollouts and up to M replayed successes, and advantages are against all of them: successes in the group make
failures count as failures even where no fresh rollout succeeds. The ratio of a replayed token is to the current policy of the
step's start, as if that had sampled it; nothing corrects for the policy that did.

    pool     phase 1 trains a policy; ``megatron-rl presample`` (presample.purpose replay) keeps its successes; phase 2, this
             one, starts from the same base again
    online   successes that the run itself has found in earlier steps

Deviations from the released code: a question with fewer than M successes gets fewer replays, where the code fills up with empty
responses that count as failures; a replayed response is whole, never cut.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from itertools import groupby

from torch import Tensor

from megatron_rl.algorithms.grpo import GRPO
from megatron_rl.config import Config, RLEPConfig
from megatron_rl.data.pool import Pool, PoolNeed
from megatron_rl.data.replay import FoundSuccesses, PooledSuccesses, Success
from megatron_rl.losses.terms import TokenTerms
from megatron_rl.types import MicroBatch, Prompt, RolloutGroup, RowKind, TrainingSample


class RLEP(GRPO):
    """GRPO on mixed groups."""

    def __init__(self, config: Config) -> None:
        super().__init__(config)
        assert isinstance(config.algorithm, RLEPConfig)
        self.replay = config.algorithm.replay
        self.found = FoundSuccesses(self.replay.max_stored_per_prompt)
        self.successes: FoundSuccesses | PooledSuccesses | None = self.found if self.replay.source == "online" else None

    @property
    def pool_need(self) -> PoolNeed | None:
        """The successes of phase 1: of any model, as long as its tokens are ours."""
        if self.replay.pool is None:
            return None
        return PoolNeed("algorithm.replay.pool", self.replay.pool, of_this_model=False, use=self.use_pool)

    def use_pool(self, pool: Pool, prompts: Sequence[Prompt]) -> str:
        """Replay these successes; see ``PoolNeed``."""
        self.successes = PooledSuccesses(pool, self.config, prompts)
        return self.successes.summary

    # ---- rows

    def samples(self, groups: Sequence[RolloutGroup], step: int) -> list[TrainingSample]:
        """The rollouts of each group, followed by its replays."""
        assert self.successes is not None, "use_pool comes first"
        rows: list[TrainingSample] = []
        num_replayed, num_without = 0, 0
        for index, fresh in groupby(super().samples(groups, step), key=lambda sample: sample.group_index):
            prompt = groups[index].prompt
            chosen = self.successes.draw(prompt, self.replay.num_per_prompt, seed=self.config.trainer.seed, step=step)
            rows += [*fresh, *(self._replayed(prompt, success, index) for success in chosen)]
            num_replayed, num_without = num_replayed + len(chosen), num_without + (not chosen)
        if self.successes is self.found:
            self.found.add(groups)
        self._metrics |= {
            "replay/rows_frac": num_replayed / len(rows),
            "replay/groups_without_frac": num_without / len(groups),
        }
        return rows

    def mini_batches(self, samples: Sequence[TrainingSample]) -> list[list[int]]:
        """Each with ``policy.train_global_batch_size`` rollouts, and the replays that follow them."""
        size, found = self.config.policy.train_global_batch_size, -1
        batches: list[list[int]] = []
        for row, sample in enumerate(samples):
            found += sample.kind is RowKind.RL
            if found // size == len(batches):
                batches.append([])
            batches[-1].append(row)
        return batches

    def _replayed(self, prompt: Prompt, success: Success, group_index: int) -> TrainingSample:
        return TrainingSample(
            prompt.prompt_ids,
            success.response_ids,
            RowKind.REPLAY,
            reward=self.shaped(success.reward, len(success.response_ids)),
            group_index=group_index,
        )

    # ---- loss

    def loss(self, log_probs: Tensor, entropy: Tensor, batch: MicroBatch) -> TokenTerms:
        """GRPO's, of all rows; what estimates something of the policy by its own samples is logged over those alone."""
        terms = super().loss(log_probs, entropy, batch)
        own = [name for name in terms.means if name.startswith(("entropy/", "kl/"))]
        return replace(terms, kinds=dict.fromkeys(own, frozenset({RowKind.RL})))

    # ---- state

    def state(self) -> dict[str, Tensor]:
        """Successes found so far; a pool is on disk anyway."""
        return self.found.state() if self.successes is self.found else {}

    def load_state(self, state: Mapping[str, Tensor]) -> None:
        """See ``Algorithm``."""
        if self.successes is self.found:
            self.found.load_state(state)

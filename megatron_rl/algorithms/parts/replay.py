"""ReplayedRows: verified successes of earlier rollouts, put into the groups of their questions."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace

from torch import Tensor

from megatron_rl.algorithms.parts.base import StoredRows
from megatron_rl.algorithms.parts.credit import groups_of
from megatron_rl.algorithms.parts.rows import RowMaker
from megatron_rl.config import Config
from megatron_rl.config.methods.rlep import ReplayConfig
from megatron_rl.data.pool import Pool, PoolNeed
from megatron_rl.data.replay import FoundSuccesses, PooledSuccesses, Success
from megatron_rl.losses.terms import TokenTerms
from megatron_rl.types import POLICY_GRADIENT_KINDS, MicroBatch, Prompt, RolloutGroup, RowKind, TrainingSample


class ReplayedRows(StoredRows):
    """Up to M successes of each question, judged with its fresh rollouts."""

    kind = RowKind.REPLAY
    shares_loss = True
    takes_selection = True

    def __init__(self, config: Config, settings: ReplayConfig) -> None:
        super().__init__()
        self.config, self.settings, self.make = config, settings, RowMaker(config)
        self.found = FoundSuccesses(settings.max_stored_per_prompt)
        self.successes: FoundSuccesses | PooledSuccesses | None = self.found if settings.source == "online" else None

    @property
    def pool_need(self) -> PoolNeed | None:
        """The successes of an earlier run: of any model that has our tokens."""
        if self.settings.pool is None:
            return None
        return PoolNeed("algorithm.replay.pool", self.settings.pool, of_this_model=False, use=self.use_pool)

    def use_pool(self, pool: Pool, prompts: Sequence[Prompt]) -> str:
        """Replay the successes of ``pool``; returns a line for the user."""
        self.successes = PooledSuccesses(pool, self.config, prompts)
        return self.successes.summary

    def add(self, rows: Sequence[TrainingSample], groups: Sequence[RolloutGroup], step: int) -> list[TrainingSample]:
        """Put the replays of each group after its rollouts."""
        assert self.successes is not None, "use_pool comes first"
        mixed: list[TrainingSample] = []
        num_replayed, num_without = 0, 0
        for fresh in groups_of(rows):
            index, settings = fresh[0].group_index, self.settings
            prompt = groups[index].prompt
            chosen = self.successes.draw(prompt, settings.num_per_prompt, seed=self.config.trainer.seed, step=step)
            mixed += [*fresh, *(self._row(prompt, success, index) for success in chosen)]
            num_replayed, num_without = num_replayed + len(chosen), num_without + (not chosen)
        if self.successes is self.found:
            self.found.add(groups)
        self.metrics = {
            "replay/rows_frac": num_replayed / len(mixed),
            "replay/groups_without_frac": num_without / len(groups),
        }
        return mixed

    def _row(self, prompt: Prompt, success: Success, group_index: int) -> TrainingSample:
        reward = self.make.shaped(success.reward, len(success.response_ids))
        return TrainingSample(
            prompt.prompt_ids, success.response_ids, self.kind, reward=reward, group_index=group_index
        )

    def loss(self, terms: TokenTerms, log_probs: Tensor, batch: MicroBatch) -> TokenTerms:
        """Log estimates that need the policy's own samples over those alone; the loss stays as it is."""
        own = [name for name in terms.means if name.startswith(("entropy/", "kl/"))]
        return replace(terms, kinds=dict.fromkeys(own, POLICY_GRADIENT_KINDS - {self.kind}))

    def state(self) -> dict[str, Tensor]:
        """Return the successes found so far; a pool is on disk anyway."""
        return self.found.state() if self.successes is self.found else {}

    def load_state(self, state: Mapping[str, Tensor]) -> None:
        """Go on with the successes found before."""
        if self.successes is self.found:
            self.found.load_state(state)

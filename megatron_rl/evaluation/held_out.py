"""All held-out sets of a run: each has an evaluator of its own, and what concerns all of them is here.

Inputs.held_out -> HeldOut.evaluate -> metrics of the step's row: ``eval/...``, or ``eval/<set>/...`` where sets have names
                                    -> HeldOut.save: eval/step_00000000.json
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from pathlib import Path

from megatron_rl.config import Config
from megatron_rl.evaluation.evaluator import EvalResults, Evaluator, save_results
from megatron_rl.parallel.agree import all_ranks_agree, broadcast_json
from megatron_rl.parallel.groups import Groups
from megatron_rl.rollout.collect import Collector
from megatron_rl.types import Prompt, RolloutGroup

EvaluatedGroups = tuple[list[RolloutGroup], list[RolloutGroup]]


class HeldOut:
    """The held-out sets of a run. Every method is a collective but for ``save``."""

    def __init__(
        self, prompts: Mapping[str, Sequence[Prompt]], config: Config, groups: Groups, say: Callable[[str], None]
    ) -> None:
        """Take the prompts of each set, and read ``eval.baseline``, so that a wrong file is found before training.

        Args:
            prompts: by name of the set; ``""`` is the name of a set without one.
            config: of the run.
            groups: process groups; rank 0 reads and writes files, which its own disk may hold.
            say: prints a line for the user.

        Raises:
            UserError: on all ranks, the baseline cannot be used.
        """
        self._directory, self._group, self._say = config.exp_manager.run_dir, groups.cpu_group, say
        self._is_first = groups.rank == 0
        self.sets = {
            name: Evaluator(of_set, config.eval, config.rollout.max_new_tokens, name)
            for name, of_set in prompts.items()
        }
        self._results: dict[str, EvalResults] = {}
        self._groups: dict[str, EvaluatedGroups] = {}
        with all_ranks_agree(self._group):
            self._baselines = {
                name: each.read_baseline() if self._is_first else None for name, each in self.sets.items()
            }

    def evaluate(self, collector: Collector, *, step: int, num_samples: int) -> dict[str, float]:
        """Evaluate on all sets; return the metrics, as ``Evaluator.evaluate`` describes them, with keep and explore rates.

        Args:
            collector: engine and scorer.
            step: number of steps trained.
            num_samples: per problem.
        """
        metrics: dict[str, float] = {}
        for name, evaluator in self.sets.items():
            found = evaluator.evaluate(collector, step=step, num_samples=num_samples, say=self._say)
            metrics |= found.metrics
            self._results[name], self._groups[name] = found.results, found.groups
        return metrics | broadcast_json(self._rates(self._directory) if self._is_first else {}, self._group)

    def save(self) -> None:
        """Write the results of the last evaluation, as the rank that writes.

        Raises:
            UserError: the file cannot be written.
        """
        if self._is_first:
            save_results(self._directory, self._results)

    def take_groups(self) -> dict[str, EvaluatedGroups]:
        """Return the groups of the last evaluation by set, sampled and greedy, and forget them."""
        groups, self._groups = self._groups, {}
        return groups

    def _rates(self, run_dir: Path) -> dict[str, float]:
        rates: dict[str, float] = {}
        for name, evaluator in self.sets.items():
            rates |= evaluator.rates(self._results[name], self._baselines[name], run_dir=run_dir, say=self._say)
        return rates

"""ChainRollouts: rollouts, the borders of their segments, and the value of each border by further rollouts from there.

The rollouts of one step and all that continues them are sampled together: what continues a rollout starts the moment that is
complete. Equal borders of a prompt are sampled once.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from megatron_rl.advantages.segment import (
    after_tokens,
    equal_segments,
    every_n_tokens,
    every_nth_cut_point,
    has_credit,
    segment_advantages,
)
from megatron_rl.algorithms.parts.base import Rollouts, TokenSelection
from megatron_rl.algorithms.parts.rows import RowMaker
from megatron_rl.config import Config
from megatron_rl.config.methods.spo import SPOChainConfig
from megatron_rl.data.stream import Stream
from megatron_rl.data.tokenizer import ids_with_newlines
from megatron_rl.report.tree_record import record_step
from megatron_rl.rollout.collect import Collector
from megatron_rl.rollout.growth import Branch, Key
from megatron_rl.types import Completion, Prompt, Rollout, RolloutGroup, SegmentStart, TrainingSample


class ChainRollouts(Rollouts):
    """G rollouts per prompt, cut into segments whose borders have values."""

    def __init__(self, config: Config, selection: TokenSelection) -> None:
        super().__init__()
        assert isinstance(config.algorithm, SPOChainConfig)
        self.config, self.settings, self.make = config, config.algorithm, RowMaker(config)
        self.selection = selection
        self.newline_ids = torch.empty(0, dtype=torch.int64)

    def use_tokenizer(self, tokenizer: Any) -> None:
        """Find the tokens that end a line, where lines are segments."""
        if self.settings.partition.kind == "newlines":
            self.newline_ids = ids_with_newlines(tokenizer)

    def collect(self, prompts: Stream[Prompt], collector: Collector, step: int) -> list[RolloutGroup]:
        """The rollouts, their borders, and the value of each."""
        chosen = prompts.take(self.settings.num_prompts_per_step)
        draw, limit, sampling = f"train/{step}", self.config.rollout.max_new_tokens, self.make.sampling()
        further = replace(sampling, record_experts=False)  # nothing is trained on those
        firsts = _first_equals(chosen)

        def continued(index: int, response_ids: Tensor, log_probs: Tensor) -> Iterator[Branch]:
            """Continue a rollout from each of its borders."""
            borders = self.borders(response_ids, log_probs)
            for border, state in zip(borders, _state_keys(firsts[index], response_ids, borders)):
                prefix = torch.cat([chosen[index].prompt_ids, response_ids[:border]])
                for number in range(self.settings.num_continuations):
                    key = (*state, number)
                    request = collector.request(prefix, further, limit - border, f"{draw}/{key}")
                    yield Branch(key, request, tokens_to_come=limit - border)

        def after_rollout(branch: Branch, rollout: Completion) -> Sequence[Branch]:
            is_rollout = len(branch.key) == 2
            return [*continued(branch.key[0], rollout.response_ids, rollout.log_probs)] if is_rollout else ()

        seeds = [
            Branch((i, g), collector.request(prompt.prompt_ids, sampling, limit, f"{draw}/{(i, g)}"), 2 * limit)
            for i, prompt in enumerate(chosen)
            for g in range(self.settings.num_generations_per_prompt)
        ]
        if self.settings.asks_policy(self.config.rollout):
            grown = collector.grow(seeds, lambda _branch, _completion: ())
            ids = [grown[seed.key].response_ids for seed in seeds]
            assert collector.policy_log_probs is not None
            log_probs = collector.policy_log_probs([chosen[seed.key[0]] for seed in seeds], ids)
            of_policy = {seed.key: values for seed, values in zip(seeds, log_probs)}
            branches = [b for s in seeds for b in continued(s.key[0], grown[s.key].response_ids, of_policy[s.key])]
            grown |= collector.grow(branches, lambda _branch, _completion: ())
        else:
            grown, of_policy = collector.grow(seeds, after_rollout), {}
        return self._groups(chosen, grown, of_policy, collector)

    def borders(self, response_ids: Tensor, log_probs: Tensor) -> list[int]:
        """Return the borders at which segments begin, in tokens; each is below the response's length.

        Args:
            response_ids: [R] int64.
            log_probs: [R] of the sampled tokens.
        """
        partition, num_tokens = self.settings.partition, len(response_ids)
        if partition.kind == "cut_points":
            return every_nth_cut_point(log_probs, partition.cut_threshold, partition.segment_size)
        if partition.kind == "tokens":
            return every_n_tokens(num_tokens, partition.segment_size)
        if partition.kind == "equal":
            return equal_segments(num_tokens, partition.segment_size)
        return after_tokens(response_ids, self.newline_ids)

    def _groups(
        self,
        prompts: Sequence[Prompt],
        grown: Mapping[Key, Completion],
        of_policy: Mapping[Key, Tensor],
        collector: Collector,
    ) -> list[RolloutGroup]:
        """Score everything, and put the values where they belong."""
        rollouts = {key: completion for key, completion in grown.items() if len(key) == 2}
        borders: dict[Key, list[int]] = {
            key: self.borders(rollout.response_ids, of_policy.get(key, rollout.log_probs))
            for key, rollout in rollouts.items()
        }
        firsts = _first_equals(prompts)
        states = {
            key: _state_keys(firsts[key[0]], rollout.response_ids, borders[key]) for key, rollout in rollouts.items()
        }
        scores = collector.score([prompts[key[0]] for key in rollouts], list(rollouts.values()))
        prefixes = {
            state: rollout.response_ids[:n]
            for key, rollout in rollouts.items()
            for n, state in zip(borders[key], states[key])
        }
        values = self._values(prompts, grown, prefixes, collector)
        groups = [RolloutGroup(prompt, []) for prompt in prompts]
        for (key, rollout), score in zip(rollouts.items(), scores):
            valued = tuple(SegmentStart(n, values[state]) for n, state in zip(borders[key], states[key]))
            groups[key[0]].rollouts.append(Rollout(rollout, score, valued, of_policy.get(key)))
        num_borders, num_tokens = sum(map(len, borders.values())), _num_tokens(grown.values())
        self.metrics = {
            "spo/borders_per_rollout": num_borders / len(rollouts),
            "spo/without_border_frac": sum(not found for found in borders.values()) / len(rollouts),
            "spo/shared_borders_frac": 1 - len(values) / num_borders if num_borders else 0.0,
            "spo/unjudged_borders": float(sum(value is None for value in values.values())),
            "spo/continued_tokens_frac": 1 - _num_tokens(rollouts.values()) / num_tokens,
        }
        return groups

    def _values(
        self,
        prompts: Sequence[Prompt],
        grown: Mapping[Key, Completion],
        prefixes: Mapping[Key, Tensor],
        collector: Collector,
    ) -> dict[Key, float | None]:
        """Return the value of each state: the mean reward of its continuations, or None if none could be judged."""
        # The scorer looks at the ids alone.
        whole = {
            key: replace(completion, response_ids=torch.cat([prefixes[key[:-1]], completion.response_ids]))
            for key, completion in grown.items()
            if len(key) > 2
        }
        rewards: dict[Key, list[float]] = {state: [] for state in prefixes}
        scores = collector.score([prompts[key[0]] for key in whole], list(whole.values()))
        for (key, completion), score in zip(whole.items(), scores):
            if not score.is_failure:
                rewards[key[:-1]].append(self.make.shaped(score.reward, len(completion.response_ids)))
        return {state: sum(found) / len(found) if found else None for state, found in rewards.items()}

    # ---- rows

    def rows(self, groups: Sequence[RolloutGroup], step: int) -> list[TrainingSample]:
        """Make one row per rollout, with its segments' advantages."""
        samples = []
        for index, group in enumerate(groups):
            for rollout in group.rollouts:
                completion = rollout.completion
                log_probs = completion.log_probs if rollout.policy_log_probs is None else rollout.policy_log_probs
                reward, length = self.make.shaped_reward(rollout), len(completion.response_ids)
                mask = self.selection.mask_of(log_probs)
                credited = has_credit(rollout.states, reward, length)
                if not bool(credited.all()):
                    mask = credited if mask is None else mask & credited
                samples.append(
                    self.make.of_rollout(
                        rollout,
                        group.prompt.prompt_ids,
                        index,
                        reward=rollout.score.reward,
                        advantages=segment_advantages(rollout.states, reward, length),
                        loss_mask=mask,
                    )
                )
        if any(sample.loss_mask is not None for sample in samples):
            num_tokens = sum(sample.num_response_tokens for sample in samples)
            self.metrics["spo/loss_tokens_frac"] = sum(sample.num_loss_tokens for sample in samples) / max(
                num_tokens, 1
            )
        return samples

    def keep(self, directory: Path, groups: Sequence[RolloutGroup], tokenizer: Any, *, step: int) -> None:
        """Write the chains of every n-th step, for ``megatron-rl view``."""
        record_step(directory, groups, tokenizer, self.settings, step=step, shaped=self.make.shaped)


def _first_equals(prompts: Sequence[Prompt]) -> list[int]:
    """Return for each prompt the place of the first equal one: a small data set may have one twice in a step."""
    places: dict[tuple[str, bytes], int] = {}
    return [
        places.setdefault((prompt.problem.problem_id, prompt.prompt_ids.numpy().tobytes()), place)
        for place, prompt in enumerate(prompts)
    ]


def _state_keys(prompt: int, response_ids: Tensor, borders: Sequence[int]) -> list[Key]:
    """Return the keys of places in a response, in rising order: equal for equal prompts and prefixes."""
    running, ids, start = hashlib.blake2b(digest_size=8), response_ids.long().numpy(), 0
    keys: list[Key] = []
    for border in borders:
        running.update(ids[start:border].tobytes())
        keys.append((prompt, border, int.from_bytes(running.digest(), "little")))
        start = border
    return keys


def _num_tokens(completions: Iterable[Completion]) -> int:
    return sum(len(completion.response_ids) for completion in completions)

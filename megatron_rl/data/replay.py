"""Verified successes by problem, for replay: of a pool, or found during the run."""

from __future__ import annotations

import hashlib
import random
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import TypeVar

import numpy as np
import torch
from torch import Tensor

from megatron_rl.config import Config
from megatron_rl.data.limits import row_limit
from megatron_rl.data.pool import Pool
from megatron_rl.errors import UserError
from megatron_rl.rewards.correct import is_correct
from megatron_rl.types import Prompt, RolloutGroup

FIELD = "algorithm.replay.pool"
T = TypeVar("T")


@dataclass(frozen=True)
class Success:
    """One verified response."""

    response_ids: Tensor
    """[R] int64."""
    reward: float


class PooledSuccesses:
    """Successes of a pool, read when drawn.

    Args:
        pool: of responses; those without a positive reward are left out.
        config: of the run.
        prompts: that the run trains on.

    Raises:
        UserError: no row can be replayed, or none answers one of these prompts.
    """

    def __init__(self, pool: Pool, config: Config, prompts: Sequence[Prompt]) -> None:
        self._pool = pool
        response_lengths, prompt_lengths = pool.response_lengths(), pool.prompt_lengths()
        is_wrong = pool.rewards() <= 0
        is_long = ~is_wrong & (
            (response_lengths > config.rollout.max_new_tokens) | (response_lengths + prompt_lengths > row_limit(config))
        )
        self.dropped = {"not a success": int(is_wrong.sum()), "too long": int(is_long.sum())}
        is_kept = ~(is_wrong | is_long)
        rows = pool.rows_of_problems()
        self._rows = {name: kept for name, numbers in rows.items() if (kept := [n for n in numbers if is_kept[n]])}
        if not self._rows:
            counts = ", ".join(f"{count} {reason}" for reason, count in self.dropped.items())
            raise UserError(
                FIELD,
                str(pool.directory),
                f"has no row to replay: {counts}",
                "raise rollout.max_new_tokens or policy.train_micro_batch_tokens, or collect successes first",
            )
        if count := int((pool.has_response_masks() & is_kept).sum()):
            rule = f"masks a part of the response in {count} rows, which replay cannot leave out"
            raise UserError(FIELD, str(pool.directory), rule, "leave such rows out (megatron-rl pool filter)")
        known = [prompt for prompt in prompts if prompt.problem.problem_id in self._rows]
        if not known:
            raise UserError(
                FIELD,
                str(pool.directory),
                f"knows none of the {len(prompts)} problems of data.train (it is of task {pool.provenance.task})",
                "collect successes on the problems that you train on, under the same data.task",
            )
        self._coverage = f"{len(known)} of {len(prompts)} training problems"
        for prompt in known:  # a glance at each: another template would show in every one
            self._checked(prompt, self._rows[prompt.problem.problem_id][0])

    @property
    def summary(self) -> str:
        """Return one line for the user."""
        count = sum(map(len, self._rows.values()))
        dropped = "".join(f", {count} left out: {reason}" for reason, count in self.dropped.items() if count)
        return f"replay: {count} successes of {self._pool.directory}, for {self._coverage}{dropped}"

    def draw(self, prompt: Prompt, count: int, *, seed: int, step: int) -> list[Success]:
        """Draw up to ``count`` successes of a problem, without replacement; a pure function of seed, problem and step.

        Raises:
            UserError: one answers another prompt than this one.
        """
        problem = prompt.problem.problem_id
        chosen = _choose(self._rows.get(problem, []), count, f"{seed}/{step}/{problem}")
        return [self._checked(prompt, number) for number in chosen]

    def _checked(self, prompt: Prompt, number: int) -> Success:
        row = self._pool[number]
        if not torch.equal(row.prompt_ids, prompt.prompt_ids):
            where = f"{self._pool.directory}, row {number}"
            rule, fix = "answers another prompt of the same problem", "use the template that the pool was sampled with"
            raise UserError(FIELD, where, rule, fix)
        return Success(row.response_ids, row.reward)


@dataclass
class FoundSuccesses:
    """Successes found during the run: the newest of each problem, in memory."""

    max_per_problem: int
    by_problem: dict[str, list[Success]] = field(default_factory=dict)

    def add(self, groups: Sequence[RolloutGroup]) -> None:
        """Keep the whole successes of these groups. One that was cut at the limit has no end to learn."""
        for group in groups:
            found = [
                Success(rollout.completion.response_ids, rollout.score.reward)
                for rollout in group.rollouts
                if is_correct(rollout.score) and rollout.completion.finish_reason == "stop"
            ]
            if found:
                problem = group.prompt.problem.problem_id
                self.by_problem[problem] = [*self.by_problem.get(problem, []), *found][-self.max_per_problem :]

    def draw(self, prompt: Prompt, count: int, *, seed: int, step: int) -> list[Success]:
        """Draw up to ``count`` successes of a problem, without replacement; a pure function of seed, problem and step."""
        problem = prompt.problem.problem_id
        return _choose(self.by_problem.get(problem, []), count, f"{seed}/{step}/{problem}")

    def state(self) -> dict[str, Tensor]:
        """Return all successes in few tensors."""
        successes = [success for found in self.by_problem.values() for success in found]
        ids = [success.response_ids for success in successes]
        names = "\n".join(self.by_problem).encode()
        return {
            "problem_ids": torch.from_numpy(np.frombuffer(names, dtype=np.uint8).copy()),
            "num_successes": torch.tensor([len(found) for found in self.by_problem.values()]),
            "num_tokens": torch.tensor([len(x) for x in ids]),
            "response_ids": torch.cat(ids).to(torch.int32) if ids else torch.zeros(0, dtype=torch.int32),
            "rewards": torch.tensor([success.reward for success in successes], dtype=torch.float64),
        }

    def load_state(self, state: Mapping[str, Tensor]) -> None:
        """Go on from a ``state``; without one, nothing has been found."""
        self.by_problem = {}
        if not state or not len(state["num_successes"]):
            return
        ids = iter(state["response_ids"].long().split(state["num_tokens"].tolist()))
        rewards = iter(state["rewards"].tolist())
        names = bytes(state["problem_ids"].tolist()).decode().split("\n")
        for name, count in zip(names, state["num_successes"].tolist(), strict=True):
            self.by_problem[name] = [Success(next(ids).clone(), next(rewards)) for _ in range(count)]


def _choose(items: Sequence[T], count: int, key: str) -> list[T]:
    """Choose without replacement, in the order of a generator that the key seeds."""
    seed = int.from_bytes(hashlib.blake2b(key.encode(), digest_size=8).digest(), "little")
    return random.Random(seed).sample(items, min(count, len(items)))

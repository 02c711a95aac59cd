"""Stored samples as training rows, in an order that follows from the seed alone."""

from __future__ import annotations

import numpy as np

from megatron_rl.config import Config
from megatron_rl.data.limits import row_limit
from megatron_rl.data.pool import Pool, Trajectory
from megatron_rl.data.stream import Stream
from megatron_rl.errors import UserError
from megatron_rl.types import Kind, TrainingSample

FIELD = "algorithm.rehearsal.pool"


class Rehearsal:
    """Endless rehearsal rows of a pool: every row once, shuffled, then again in another order.

    Args:
        pool: of the initial policy.
        config: of the run.

    Raises:
        UserError: the pool's log-probs are of another temperature, or no row is short enough.
    """

    def __init__(self, pool: Pool, config: Config) -> None:
        self._pool = pool
        temperature = pool.provenance.sampling.get("log_prob_temperature", config.rollout.temperature)
        if temperature != config.rollout.temperature:
            raise UserError(
                FIELD,
                str(pool.directory),
                f"has log-probs at temperature {temperature}, the run's are at {config.rollout.temperature}",
                f"set rollout.temperature={temperature}, or sample the pool again",
            )
        lengths, limit = pool.prompt_lengths() + pool.response_lengths(), row_limit(config)
        fitting = np.flatnonzero(lengths <= limit)
        self.num_too_long = len(pool) - len(fitting)
        if not len(fitting):
            raise UserError(
                FIELD,
                str(pool.directory),
                f"has no row of at most {limit} tokens",
                "raise policy.train_micro_batch_tokens, or sample a pool of shorter responses",
            )
        self._numbers = Stream(fitting.tolist(), config.trainer.seed, shuffle=True)
        self._num_rows = config.algorithm.num_stored_rows_per_update

    @property
    def summary(self) -> str:
        """One line for the user."""
        dropped = f", {self.num_too_long} left out as too long" if self.num_too_long else ""
        return f"rehearsal: {len(self._numbers.items)} rows of {self._pool.directory}{dropped}"

    def rows(self, *, update: int) -> list[TrainingSample]:
        """The rows of one update, counted from 0; a pure function of it."""
        self._numbers.cursor = update * self._num_rows
        numbers = self._numbers.take(self._num_rows)
        return [rehearsal_row(self._pool, number, row) for number, row in zip(numbers, self._pool.take(numbers))]


def rehearsal_row(pool: Pool, number: int, trajectory: Trajectory, *, field: str = FIELD) -> TrainingSample:
    """A training row with the reference's log-probs; ``field`` is the config key of the pool.

    Raises:
        UserError: it has none, or only a part of its response may be trained on.
    """
    for is_wrong, rule in (
        (trajectory.ref_log_probs is None, "has no log-probs of the reference"),
        (trajectory.response_mask is not None, "masks a part of its response, which rehearsal cannot leave out"),
    ):
        if is_wrong:
            raise UserError(
                field, f"{pool.directory}, row {number}", rule, "use a pool that megatron-rl presample has made"
            )
    return TrainingSample(
        trajectory.prompt_ids,
        trajectory.response_ids,
        Kind.REHEARSAL,
        reward=trajectory.reward,
        has_reward=False,
        ref_log_probs=trajectory.ref_log_probs,
    )

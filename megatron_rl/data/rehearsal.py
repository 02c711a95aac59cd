"""Stored samples as training rows, in an order that follows from the seed alone."""

from __future__ import annotations

import numpy as np

from megatron_rl.config import Config
from megatron_rl.data.limits import row_limit
from megatron_rl.data.pool import Pool, Trajectory
from megatron_rl.data.stream import Stream
from megatron_rl.errors import UserError
from megatron_rl.types import RowKind, TrainingSample

FIELD = "algorithm.rehearsal.pool"
PROBE_FIELD = "eval.pool"


class Rehearsal:
    """Endless rehearsal rows of a pool: every row once, shuffled, then again in another order.

    Args:
        pool: of the initial policy.
        config: of the run.

    Raises:
        UserError: no row is short enough, or one of those that are cannot be compared with the policy.
    """

    def __init__(self, pool: Pool, config: Config) -> None:
        self._pool = pool
        lengths, limit = pool.prompt_lengths() + pool.response_lengths(), row_limit(config)
        is_fitting = lengths <= limit
        fitting = np.flatnonzero(is_fitting)
        self.num_too_long = len(pool) - len(fitting)
        if not len(fitting):
            raise UserError(
                FIELD,
                str(pool.directory),
                f"has no row of at most {limit} tokens",
                "raise policy.train_micro_batch_tokens, or sample a pool of shorter responses",
            )
        check_reference(pool, is_fitting, temperature=config.log_prob_temperature, field=FIELD)
        self._numbers = Stream(fitting.tolist(), config.trainer.seed, shuffle=True)
        self._num_rows = config.algorithm.num_stored_rows_per_update

    @property
    def summary(self) -> str:
        """Return one line for the user."""
        dropped = f", {self.num_too_long} left out as too long" if self.num_too_long else ""
        return f"rehearsal: {len(self._numbers.items)} rows of {self._pool.directory}{dropped}"

    def rows(self, *, update: int) -> list[TrainingSample]:
        """Return the rows of one update, counted from 0; a pure function of its number."""
        self._numbers.cursor = update * self._num_rows
        numbers = self._numbers.take(self._num_rows)
        return [rehearsal_row(trajectory) for trajectory in self._pool.take(numbers)]


def check_reference(pool: Pool, rows: np.ndarray, *, temperature: float, field: str) -> None:
    """Check that the pool's log-probs can be compared with the policy's.

    Args:
        pool: of samples.
        rows: [N] bool, those that will be read.
        temperature: at which the policy computes log-probs.
        field: config key of the pool, for errors.

    Raises:
        UserError: some are of another temperature, or not there; or some rows mask a part of their response.
    """
    fix = "use a pool that megatron-rl presample has made"
    for provenance in pool.provenances():
        found = provenance.sampling.get("log_prob_temperature")
        if found != temperature:
            rule = f"has log-probs at temperature {found}, the run's are at {temperature}"
            raise UserError(
                field, str(pool.directory), rule, f"set rollout.temperature={found}, or sample the pool again"
            )
    for is_wrong, rule in (
        (~pool.has_ref_log_probs(), "have no log-probs of the reference"),
        (pool.has_response_masks(), "mask a part of their response, which cannot be left out"),
    ):
        if count := int((is_wrong & rows).sum()):
            raise UserError(field, str(pool.directory), f"{count} of {int(rows.sum())} rows {rule}", fix)


def rehearsal_row(trajectory: Trajectory) -> TrainingSample:
    """Make a training row with the reference's log-probs."""
    return TrainingSample(
        trajectory.prompt_ids,
        trajectory.response_ids,
        RowKind.REHEARSAL,
        reward=trajectory.reward,
        has_reward=False,
        ref_log_probs=trajectory.ref_log_probs,
    )


def probe_rows(pool: Pool, config: Config) -> list[TrainingSample]:
    """Return the first ``eval.num_pool_rows`` rows that are short enough.

    Raises:
        UserError: there is none, or one cannot be compared with the policy.
    """
    limit = row_limit(config)
    fits = (pool.prompt_lengths() + pool.response_lengths()) <= limit
    if not fits.any():
        raise UserError(PROBE_FIELD, str(pool.directory), f"has no row of at most {limit} tokens", "give another pool")
    check_reference(pool, fits, temperature=config.log_prob_temperature, field=PROBE_FIELD)
    return [rehearsal_row(trajectory) for trajectory in pool.take(fits.nonzero()[0][: config.eval.num_pool_rows])]

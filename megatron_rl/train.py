"""The training program, one process per rank: ``torchrun ... -m megatron_rl.train --config x.yaml section.field=value``.

The whole of training is the two loops below; ``run.py`` builds what they use. Nothing here imports torch at the top, so
that a wrong config is refused in the first second.
"""

from __future__ import annotations

import argparse
import sys
from typing import TYPE_CHECKING

from megatron_rl.config import Config, check_files, load_config
from megatron_rl.errors import UserError
from megatron_rl.lifetime import die_with_starter

if TYPE_CHECKING:
    from megatron_rl.run import Run
    from megatron_rl.runtime import Runtime


def run_online(run: Run) -> None:
    """Learn from the policy's own rollouts."""
    policy, algorithm = run.policy, run.online_algorithm
    for step in run.steps():
        groups = algorithm.collect(run.prompts, run.rollouts, step)
        run.rest_engine()
        samples = algorithm.samples(groups)
        mini_batches = split(len(samples), run.config.policy.train_global_batch_size)
        # The first update brings the old log-probs of its rows from its own pass, unless credit needs them sooner.
        ahead = mini_batches if algorithm.needs_old_log_probs else mini_batches[1:]
        policy.fill_log_probs(samples, ahead, "old_log_probs")
        if algorithm.needs_reference:
            with policy.weights_of(run.reference):
                policy.fill_log_probs(samples, mini_batches, "ref_log_probs")
        algorithm.assign_advantages(samples)
        if step == run.start_step:  # once a run, a pass of their own shows that both give the same bits
            policy.fill_log_probs(samples, mini_batches[:1], "old_log_probs")
        updates = []
        for rows in mini_batches * algorithm.num_epochs:
            mini_batch = [samples[row] for row in rows]
            algorithm.assign_weights(mini_batch)
            updates.append(policy.train_step(mini_batch, algorithm.loss))
        run.publish(version=step + 1)
        run.finish_step(step + 1, updates, samples, groups)


def run_offline(run: Run) -> None:
    """Learn from rows that exist already."""
    for step in run.steps():
        mini_batch = run.demonstrations.take(run.config.policy.train_global_batch_size)
        run.algorithm.assign_weights(mini_batch)
        update = run.policy.train_step(mini_batch, run.algorithm.loss)
        run.finish_step(step + 1, [update], mini_batch)


def split(num_rows: int, size: int) -> list[list[int]]:
    """Row indices of each optimizer mini-batch: consecutive, so that groups stay together where sizes allow."""
    return [list(range(start, start + size)) for start in range(0, num_rows, size)]


def main(argv: list[str] | None = None) -> int:
    """One rank, from its command line to its exit status: 0 done, 2 something the user can fix."""
    parser = argparse.ArgumentParser(prog="megatron_rl.train")
    parser.add_argument("--config", required=True)
    parser.add_argument("overrides", nargs="*", metavar="section.field=value")
    arguments = parser.parse_args(argv)
    try:
        config = load_config(arguments.config, arguments.overrides)
        check_files(config)
    except UserError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2

    from megatron_rl.runtime import run_rank  # from here on torch is loaded

    return run_rank(config, lambda runtime: train(config, runtime))


def train(config: Config, runtime: Runtime) -> None:
    """The whole run of one rank whose process group stands."""
    from megatron_rl.run import Run

    with Run(config, runtime) as run:
        run.evaluate_before()
        (run_online if config.trainer.stage == "rl" else run_offline)(run)
        run.finish()


if __name__ == "__main__":
    die_with_starter()  # now, not when torch is loaded: a launcher may be killed in between
    sys.exit(main())

"""The training program, one process per rank: ``torchrun ... -m megatron_rl.train --config x.yaml section.field=value``.

Training is the two loops below; ``run.py`` builds the parts they use. Nothing here imports torch at the top, so that a wrong
config is refused in the first second, and a launcher that is killed meanwhile leaves no rank.
"""

from __future__ import annotations

from dataclasses import replace
from typing import TYPE_CHECKING

from megatron_rl.process import lifetime

if TYPE_CHECKING:
    from megatron_rl.config import Config
    from megatron_rl.launch.rank import Runtime
    from megatron_rl.run import Run


def run_online(run: Run) -> None:
    """Learn from the policy's own rollouts."""
    policy, algorithm = run.policy, run.online_algorithm
    for step in run.steps():
        groups = algorithm.collect(run.inputs.prompts, run.rollouts, step)
        run.release_engine_memory()
        samples = run.samples(groups, step)
        del groups  # the rows have all that training needs
        run.fill(samples, algorithm.needs)
        algorithm.assign_advantages(samples)
        updates = []
        for rows in algorithm.updates(samples) * algorithm.num_epochs:
            mini_batch = [samples[row] for row in rows]
            algorithm.assign_weights(mini_batch)
            updates.append(policy.train_step(mini_batch, algorithm.loss))
        run.publish(version=step + 1)
        run.finish_step(step + 1, updates, samples)


def run_offline(run: Run) -> None:
    """Learn from rows that exist already."""
    policy, algorithm = run.policy, run.algorithm
    for step in run.steps():
        rows = run.inputs.demonstrations.take(run.config.policy.train_global_batch_size)
        mini_batch = [replace(row) for row in rows]  # they come again, and the policy is another by then
        run.fill(mini_batch, algorithm.needs)
        algorithm.assign_weights(mini_batch)
        update = policy.train_step(mini_batch, algorithm.loss)
        run.finish_step(step + 1, [update], mini_batch)


def main(argv: list[str] | None = None) -> int:
    """Run one rank from its command line; return its exit status: 0 done, 2 something the user can fix."""
    from megatron_rl.launch.program import run_program

    return run_program("megatron_rl.train", train, argv)


def train(config: Config, runtime: Runtime) -> None:
    """Do the whole run of one rank; its process group is initialised."""
    from megatron_rl.launch.finished import is_finished
    from megatron_rl.run import Run

    if is_finished(config, runtime):
        return
    with Run(config, runtime) as run:
        run.evaluate_before()
        (run_online if config.trainer.stage == "rl" else run_offline)(run)
        run.finish()


if __name__ == "__main__":
    lifetime.run(main)

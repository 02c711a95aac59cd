"""The sampling program, one process per rank: ``torchrun ... -m megatron_rl.commands.presample --config FILE [KEY=VALUE ...]``.

Stage 1 of DPH-RL (arXiv 2509.07430): which problems does the model solve reliably, and one sample of each that was not drawn to
find that out (a sample chosen for being right would be a biased one of its own split). Phase 1 of RLEP (arXiv 2507.07451): the
verified successes of a trained model.

The config is the one of the training that follows: its model, engine, layout and task; its algorithm has no part in this.
"""

from __future__ import annotations

from dataclasses import asdict, replace
from itertools import islice
from pathlib import Path
from typing import TYPE_CHECKING, Any

from megatron_rl.commands.sampling import without_training
from megatron_rl.config import Config, PresampleConfig
from megatron_rl.errors import UserError
from megatron_rl.launch.program import run_program
from megatron_rl.process import lifetime

if TYPE_CHECKING:
    from megatron_rl.data.pool import Provenance, Trajectory
    from megatron_rl.data.presampled import PresampledFolder, Verdict
    from megatron_rl.launch.rank import Runtime
    from megatron_rl.run import Run
    from megatron_rl.types import Completion, Prompt, RolloutGroup

FOLDER = "presample"


def presample(config: Config, runtime: Runtime) -> None:
    """Sample chunk by chunk, from where an earlier start stopped."""
    from megatron_rl.metrics import progress
    from megatron_rl.parallel.agree import all_ranks_agree, broadcast_json
    from megatron_rl.run import Run

    with Run(config, runtime, is_trained=False) as run:
        group = run.groups.cpu_group
        usable = (prompt for prompt in run.inputs.prompts.items if prompt is not None)
        prompts = list(islice(usable, config.presample.num_problems))
        provenance = _provenance(run)
        with all_ranks_agree(group):
            folder = _open(run, prompts, provenance) if run.is_first else None
            num_done = folder.num_done() if folder is not None else 0
        num_done = broadcast_json(num_done, group)
        size = config.presample.chunk_size
        starts = range(0, len(prompts), size)
        if num_done:
            run.say(f"{num_done} of {len(starts)} chunks are sampled already")
        for chunk in progress(range(num_done, len(starts)), "chunks"):
            verdicts, kept = sample_chunk(run, prompts[starts[chunk] : starts[chunk] + size], chunk)
            with all_ranks_agree(group):
                if folder is not None:
                    folder.keep(chunk, verdicts, kept)
        with all_ranks_agree(group):
            if folder is not None:
                _sum_up(folder, prompts, config)


def sample_chunk(run: Run, prompts: list[Prompt], chunk: int) -> tuple[list[Verdict], list[Trajectory]]:
    """Sample some problems; return the fate of each and the samples to keep. A collective."""
    from megatron_rl.data.presampled import KEPT, Verdict
    from megatron_rl.rollout.collect import Sampling

    settings = run.config.presample
    sampling = Sampling(settings.temperature, settings.top_p, 0, run.config.rollout.max_new_tokens)
    groups = run.rollouts.collect(
        prompts, num_generations=settings.num_samples, sampling=sampling, purpose=f"presample/{chunk}"
    )
    # Replay takes the samples themselves, so there must be enough of those that it can take.
    count = _num_correct if settings.purpose == "rehearsal" else _num_successes
    sources = [group for group in groups if count(group) >= settings.min_correct]
    if settings.purpose == "rehearsal":
        sources = run.rollouts.collect(
            [group.prompt for group in sources],
            num_generations=1,
            sampling=sampling,
            purpose=f"presample/{chunk}/extra",
        )
    fates = {g.prompt.problem.problem_id: KEPT if _successes(g) else _fate_without_sample(g) for g in sources}
    verdicts = []
    for group in groups:
        problem = group.prompt.problem.problem_id
        fate = fates.get(problem) or _fate_of_the_unsolved(group, settings)
        verdicts.append(Verdict(problem, _num_correct(group), fate))
    chosen = [(group.prompt, success) for group in sources for success in _successes(group)]
    return verdicts, _trajectories(run, chosen)


def _trajectories(run: Run, chosen: list[tuple[Prompt, tuple[Completion, float]]]) -> list[Trajectory]:
    """Return the samples as trajectories; for rehearsal, with the model's log-probs from the training engine."""
    from megatron_rl.data.pool import Trajectory
    from megatron_rl.types import RowKind, TrainingSample

    rows = [
        TrainingSample(prompt.prompt_ids, completion.response_ids, RowKind.REHEARSAL, reward=reward)
        for prompt, (completion, reward) in chosen
    ]
    if rows and run.config.presample.purpose == "rehearsal":
        run.release_engine_memory()
        unit = run.config.policy.train_global_batch_size
        filled = rows + [replace(rows[-1]) for _ in range(-len(rows) % unit)]  # each rank gets equally many
        run.policy.fill_log_probs(filled, [range(len(filled))], "ref_log_probs")
        run.publish(version=0)
    return [
        Trajectory(
            prompt.problem.problem_id, row.prompt_ids, row.response_ids, row.reward, ref_log_probs=row.ref_log_probs
        )
        for (prompt, _), row in zip(chosen, rows)
    ]


def _successes(group: RolloutGroup) -> list[tuple[Completion, float]]:
    """Return the completions that are right and not cut: a response without its end teaches no end."""
    from megatron_rl.rewards.correct import is_correct

    return [
        (rollout.completion, rollout.score.reward)
        for rollout in group.rollouts
        if is_correct(rollout.score) and not rollout.score.is_failure and rollout.completion.finish_reason == "stop"
    ]


def _fate_without_sample(group: RolloutGroup) -> str:
    """Return the fate of a problem whose further sample cannot be kept. If that was wrong, it is not solved so reliably."""
    from megatron_rl.data.presampled import EXPLORATION

    if _num_correct(group):
        return "dropped: right, but cut at the limit"
    is_judged = not any(rollout.score.is_failure for rollout in group.rollouts)
    return EXPLORATION if is_judged else "dropped: the further sample could not be judged"


def _fate_of_the_unsolved(group: RolloutGroup, settings: PresampleConfig) -> str:
    from megatron_rl.data.presampled import EXPLORATION

    if settings.purpose == "replay":
        return f"dropped: fewer than {settings.min_correct} right and whole samples"
    num_judged = sum(not rollout.score.is_failure for rollout in group.rollouts)
    if num_judged < len(group.rollouts) and _num_correct(group) == num_judged:
        return "dropped: not every sample could be judged"
    return EXPLORATION


def _num_correct(group: RolloutGroup) -> int:
    from megatron_rl.rewards.correct import is_correct

    return sum(is_correct(rollout.score) and not rollout.score.is_failure for rollout in group.rollouts)


def _num_successes(group: RolloutGroup) -> int:
    return len(_successes(group))


# ------------------------------------------------------------------------------------------------------ around it


def adapt(config: Config) -> Config:
    """Change the training's config for sampling: nothing is resumed, saved, logged or evaluated, and no update has to fit."""
    return without_training(
        config,
        exp_dir=str(config.exp_manager.run_dir),
        name=FOLDER,
        train=config.presample.problems or config.data.train,
        evaluation=replace(config.eval, before=False, after=False, every_n_steps=0),
        start=None,
    )


def _provenance(run: Run) -> Provenance:
    from megatron_rl.data.origin import tokenizer_digest
    from megatron_rl.data.pool import Provenance

    config = run.config
    sampling = {
        "temperature": config.presample.temperature,
        "top_p": config.presample.top_p,
        "max_new_tokens": float(config.rollout.max_new_tokens),
        "log_prob_temperature": config.rollout.temperature,
    }
    return Provenance(config.data.task, run.inputs.model_digest(), tokenizer_digest(run.inputs.tokenizer), sampling)


def _open(run: Run, prompts: list[Prompt], provenance: Provenance) -> PresampledFolder:
    from megatron_rl.data.chunked import prompts_digest
    from megatron_rl.data.presampled import PresampledFolder
    from megatron_rl.plugins import file_digest

    settings: dict[str, Any] = asdict(run.config.presample) | asdict(provenance)
    settings |= {"seed": run.config.trainer.seed, "prompts": prompts_digest(prompts)}
    settings["reward_file"] = file_digest(run.config.data.reward)
    return PresampledFolder(run.directory, settings, provenance)


def _sum_up(folder: PresampledFolder, prompts: list[Prompt], config: Config) -> None:
    """Print the split.

    Raises:
        UserError: there is nothing to train on in it; what was sampled stays.
    """
    from rich.console import Console
    from rich.table import Table

    from megatron_rl.data.presampled import EXPLORATION, KEPT

    settings = config.presample
    summary = folder.finish([prompt.problem for prompt in prompts], config.data.train or [], settings.num_samples)
    table = Table(title=f"{summary['num_problems']} problems, {settings.num_samples} samples each")
    table.add_column("")
    table.add_column("problems", justify="right")
    for fate, count in summary["fates"].items():
        table.add_row(fate, str(count))
    Console().print(table)
    counts = summary["problems_by_num_correct"]
    print("problems by right samples: " + ", ".join(f"{n}: {count}" for n, count in enumerate(counts) if count))
    if not summary["fates"].get(KEPT):
        raise _empty_pool(settings, sum(counts[settings.min_correct :]), summary["num_problems"], folder.directory)
    print(f"pool: {folder.pool}")
    if settings.purpose == "rehearsal":
        if not summary["fates"].get(EXPLORATION):
            raise UserError(
                "presample.min_correct",
                settings.min_correct,
                "leaves nothing to explore: every problem was solved so often",
                "raise it, or give harder problems",
            )
        print(f"still to be learned: {folder.exploration}")


def _empty_pool(settings: PresampleConfig, num_reliable: int, num_problems: int, folder: Path) -> UserError:
    """Return the error of a pool without a sample."""
    rule = f"leaves the pool empty: {num_reliable} of {num_problems} problems were solved so often"
    if num_reliable and settings.purpose == "replay":
        rule += ", but none with so many whole responses"
    elif num_reliable:
        rule += ", and the further sample of each was wrong or cut"
    lower = "" if settings.min_correct == 1 else f"lower it ({folder / 'summary.json'} has the counts), "
    fix = f"{lower}sample more problems or easier ones, or start from a stronger model"
    return UserError("presample.min_correct", settings.min_correct, rule, fix)


def main(argv: list[str] | None = None) -> int:
    """Run one rank, from its command line to its exit status."""
    return run_program("megatron_rl.commands.presample", presample, argv, adapt=adapt)


if __name__ == "__main__":
    lifetime.run(main)

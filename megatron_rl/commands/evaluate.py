"""The evaluation program, one process per rank: ``torchrun ... -m megatron_rl.commands.evaluate --config FILE ...``.

``megatron-rl eval`` writes the file (``evaluated.py``). Samples are drawn in chunks and kept as they come; the figures follow
from what is on disk alone, so a start that goes on after a kill gives those of an uninterrupted one.
"""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from megatron_rl.commands.sampling import without_training
from megatron_rl.config import Config
from megatron_rl.errors import UserError
from megatron_rl.launch.program import run_program
from megatron_rl.process import lifetime

if TYPE_CHECKING:
    from megatron_rl.evaluation.samples import SampleFolder, SampleRow
    from megatron_rl.launch.rank import Runtime
    from megatron_rl.run import Run
    from megatron_rl.types import Prompt


def evaluate(config: Config, runtime: Runtime) -> None:
    """Sample what is missing of all sets, then write and print the figures. A collective."""
    from megatron_rl.evaluation.samples import SampleFolder, check_columns, set_results
    from megatron_rl.evaluation.table import print_results
    from megatron_rl.parallel.agree import all_ranks_agree
    from megatron_rl.run import Run

    with Run(config, runtime, is_trained=False) as run:
        settings = _settings(run)
        with all_ranks_agree(run.groups.cpu_group):
            if config.eval.by:
                problems = [prompt.problem for prompts in run.inputs.held_out.values() for prompt in prompts]
                check_columns(problems, config.eval.by)
            folder = SampleFolder(run.directory, settings) if run.is_first else None
        sets = named(run.inputs.held_out)
        found = {name: sample_set(run, folder, name, prompts) for name, prompts in sets.items()}
        with all_ranks_agree(run.groups.cpu_group):
            if folder is not None:
                options: dict[str, Any] = {"k_values": config.eval.k_values, "by": config.eval.by}
                figures = {
                    name: set_results(rows, sets[name], seed=config.trainer.seed, **options)
                    for name, rows in found.items()
                }
                results = {"model": _model(config), "sampling": settings["sampling"], "sets": figures}
                path = folder.write_results(results)
                print_results(results)
                print(f"{path}; samples: {folder.directory / 'samples'}")


def named(sets: dict[str, list[Prompt]]) -> dict[str, list[Prompt]]:
    """Return the sets, with a name for one that has none."""
    from megatron_rl.evaluation.samples import UNNAMED

    return {name or UNNAMED: prompts for name, prompts in sets.items()}


def sample_set(run: Run, folder: SampleFolder | None, name: str, prompts: list[Prompt]) -> list[SampleRow]:
    """Sample what is missing of one set; return its rows, on the rank that has the folder. A collective."""
    from megatron_rl.metrics import progress
    from megatron_rl.parallel.agree import all_ranks_agree, broadcast_json

    group, size = run.groups.cpu_group, run.config.eval.chunk_size
    num_chunks = -(-len(prompts) // size)
    with all_ranks_agree(group):
        num_done = folder.num_done(name, num_chunks) if folder is not None else 0
    num_done = broadcast_json(num_done, group)
    if num_done:
        run.say(f"{name}: {num_done} of {num_chunks} chunks are sampled already")
    for chunk in progress(range(num_done, num_chunks), name):
        rows = _sample(run, name, prompts[chunk * size : (chunk + 1) * size], chunk)
        with all_ranks_agree(group):
            if folder is not None:
                folder.keep(name, chunk, rows)
    with all_ranks_agree(group):
        return folder.finish(name, num_chunks) if folder is not None else []


def _sample(run: Run, name: str, prompts: list[Prompt], chunk: int) -> list[SampleRow]:
    from megatron_rl.evaluation.samples import sample_rows
    from megatron_rl.rollout.collect import Sampling

    settings, limit = run.config.eval, run.config.rollout.max_new_tokens
    draws = {"sample": (settings.num_samples, Sampling(settings.temperature, settings.top_p, 0, limit))}
    if settings.greedy:
        draws["greedy"] = (1, Sampling(0.0, 1.0, 0, limit))
    rows = []
    for kind, (count, sampling) in draws.items():
        groups = run.rollouts.collect(
            prompts, num_generations=count, sampling=sampling, purpose=f"evaluate/{name}/{chunk}/{kind}"
        )
        rows += sample_rows(groups, kind, run.inputs.tokenizer) if run.is_first else []
    return rows


def adapt(config: Config) -> Config:
    """Change a config for evaluation alone, of ``data.validation``.

    Raises:
        UserError: there are no problems, or the folder for the results is that of a run.
    """
    manager = config.exp_manager
    metrics = manager.run_dir / "metrics.jsonl"
    if (metrics.is_file() and metrics.stat().st_size) or any(manager.run_dir.glob("checkpoints/step_*")):
        rule = "is the folder of a run, whose config and metrics would be replaced"
        raise UserError("--out", str(manager.run_dir), rule, "name another folder, or leave it out")
    if config.data.validation is None:
        fix = "give --data FILE, or --data NAME=FILE for each set"
        raise UserError("data.validation", None, "there must be problems to evaluate on", fix)
    return without_training(
        config,
        exp_dir=manager.exp_dir,
        name=manager.name,
        train=None,
        evaluation=replace(config.eval, before=True, baseline=None, pool=None),
        start=manager.resume_from_checkpoint,
    )


def _settings(run: Run) -> dict[str, Any]:
    """Return what the samples depend on. A collective."""
    from megatron_rl.data.chunked import prompts_digest
    from megatron_rl.data.origin import tokenizer_digest
    from megatron_rl.files import content_digest
    from megatron_rl.plugins import file_digest

    config, checkpoint = run.config, run.config.exp_manager.resume_from_checkpoint
    settings = config.eval
    if checkpoint is None:
        weights = run.inputs.model_digest()
    else:  # its manifest has the digests of its files
        weights = content_digest(Path(checkpoint) / "manifest.json")
    return {
        "weights": weights,
        "tokenizer": tokenizer_digest(run.inputs.tokenizer),
        "sets": {name: prompts_digest(prompts) for name, prompts in named(run.inputs.held_out).items()},
        "sampling": {
            "num_samples": settings.num_samples,
            "temperature": settings.temperature,
            "top_p": settings.top_p,
            "max_new_tokens": config.rollout.max_new_tokens,
            "greedy": settings.greedy,
        },
        "task": config.data.task,
        "reward": config.data.reward,
        "reward_file": file_digest(config.data.reward),
        "reward_kwargs": config.data.reward_kwargs,
        "engine": config.rollout.engine,
        "precision": config.trainer.precision,
        "seed": config.trainer.seed,
        "chunk_size": settings.chunk_size,
    }


def _model(config: Config) -> str:
    return config.exp_manager.resume_from_checkpoint or config.policy.model_path


def main(argv: list[str] | None = None) -> int:
    """Run one rank, from its command line to its exit status."""
    return run_program("megatron_rl.commands.evaluate", evaluate, argv, adapt=adapt, is_trained=False)


if __name__ == "__main__":
    lifetime.run(main)

"""The commands of sample pools, for ``megatron-rl pool`` and ``tools/sample_pool.py``, around ``megatron_rl.data.pool``."""

from __future__ import annotations

import hashlib
from collections import Counter
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from megatron_rl.errors import UserError

if TYPE_CHECKING:  # annotations only: each command imports what it needs, because torch takes seconds to load
    import numpy as np

    from megatron_rl.config import Config
    from megatron_rl.data.pool import Pool, Provenance, Trajectory
    from megatron_rl.types import Prompt, Rollout, RolloutGroup

PoolArgument = Annotated[str, typer.Argument(help="pool directory", metavar="POOL")]
TargetArgument = Annotated[str, typer.Argument(help="new pool directory", metavar="TARGET")]

app = typer.Typer(
    add_completion=False,
    no_args_is_help=True,
    pretty_exceptions_enable=False,
    help="Pools of stored samples, for rehearsal and replay: look into them, check them, put them together.",
)


@app.command()
def inspect(pool: PoolArgument) -> None:
    """Show what a pool holds: sizes, lengths, rewards, problems, where it comes from. Trajectories are not checked."""
    from rich.console import Console
    from rich.markup import escape
    from rich.table import Table

    from megatron_rl.data.pool import Pool

    opened = Pool(pool)
    table = Table("", "", title=escape(str(opened.directory)), show_header=False)
    for name, value in _facts(opened):
        table.add_row(name, escape(value))
    Console().print(table)


@app.command()
def verify(pool: PoolArgument) -> None:
    """Read every trajectory and compare its checksum. Names the first that is damaged, with status 2."""
    from megatron_rl.data.pool import Pool
    from megatron_rl.metrics import progress

    opened = Pool(pool)
    with progress(len(opened), "verify") as bar:
        for _ in opened.verify():
            bar.advance()
    print(f"{pool}: {len(opened)} trajectories, each as it was written")


@app.command()
def merge(
    sources: Annotated[list[str], typer.Argument(help="pools of one model and tokenizer", metavar="POOL...")],
    target: Annotated[str, typer.Option(help="New pool directory.")],
) -> None:
    """Merge several pools into one, in their order."""
    from megatron_rl.data import pool as pools
    from megatron_rl.metrics import progress

    with progress(sum(len(pools.Pool(source)) for source in sources), "merge") as bar:
        count = pools.merge(sources, target, advance=bar.advance)
    print(f"{target}: {count} trajectories of {len(sources)} pools")


@app.command("filter")
def filter_(
    source: PoolArgument,
    target: TargetArgument,
    min_reward: Annotated[float | None, typer.Option(help="Keep rewards of at least this.")] = None,
    max_response_tokens: Annotated[int | None, typer.Option(help="Keep responses of at most this length.")] = None,
    problems: Annotated[
        str | None, typer.Option(help="Keep the problems of this .jsonl file of the pool's task.", metavar="FILE")
    ] = None,
) -> None:
    """Write a new pool of the trajectories that meet every condition, and say how many each condition drops."""
    from megatron_rl.data.pool import Pool, filter_pool
    from megatron_rl.metrics import progress

    opened = Pool(source)
    wanted = None if problems is None else _ids_of(problems, opened.provenance.task)
    with progress(len(opened), "filter") as bar:
        found = filter_pool(
            source, target, min_reward=min_reward, max_response_tokens=max_response_tokens, problems=wanted,
            advance=bar.advance,
        )  # fmt: skip
    print(f"{target}: {found.kept} trajectories; dropped: {_listed(found.dropped)}")


@app.command()
def build(
    target: TargetArgument,
    from_rollouts: Annotated[
        str,
        typer.Option(
            help="rollouts/ of a run with rollout.record=true; config.yaml and metrics.jsonl lie beside it. If the config has "
            "relative paths, give the command in the folder in which the run was started.",
            metavar="RUN/rollouts",
        ),
    ],
    model: Annotated[
        str | None,
        typer.Option(help="Directory with config.json and tokenizer; left out: the run's own.", metavar="DIR"),
    ] = None,
    min_reward: Annotated[
        float | None, typer.Option(help="Keep rewards of at least this; left out: right answers.")
    ] = None,
    first_step: Annotated[int, typer.Option(help="Leave out the steps before this one, counted from 1.", min=1)] = 1,
) -> None:
    """Build a pool of a run's own training rollouts that ended with a good reward.

    Rewards are not recorded, so responses are scored again, and the run's steps are gone through from the first one: which
    prompts a step gets follows from those before.
    """
    from megatron_rl.data.pool import PoolWriter, new_pool
    from megatron_rl.metrics import progress

    config, last_step = _recorded_run(Path(from_rollouts).parent, model)
    kept = 0
    dropped: Counter[str] = Counter()
    with new_pool(target), _replay(config, Path(from_rollouts)) as (groups_of, provenance):
        with PoolWriter(target, provenance) as writer:
            for step in progress(range(1, last_step + 1), "steps"):
                groups = groups_of(step)
                if step < first_step:
                    continue
                for prompt, rollout in ((group.prompt, rollout) for group in groups for rollout in group.rollouts):
                    if reason := _reason_to_drop(rollout, min_reward):
                        dropped[reason] += 1
                    else:
                        writer.add(_trajectory(prompt, rollout))
                        kept += 1
        if not kept:
            rule = (
                f"would be empty: no rollout of steps {first_step} to {last_step} is good enough ({_listed(dropped)})"
            )
            raise UserError(target, None, rule, "lower --min-reward or --first-step, or take another run")
    print(f"{target}: {kept} trajectories; dropped: {_listed(dropped)}")


# -------------------------------------------------------------------------------------------------------------- inspect


def _facts(pool: Pool) -> Iterator[tuple[str, str]]:
    """Return the rows of the table: name and amount."""
    yield "trajectories", f"{len(pool):,} in {pool.num_shards:,} shards, {pool.num_bytes / 1e6:,.1f} MB"
    for name, lengths in (("prompt", pool.prompt_lengths()), ("response", pool.response_lengths())):
        yield f"{name} tokens", f"mean {lengths.mean():.1f}, at most {lengths.max():,}"
    for i, (label, count) in enumerate(_histogram(pool.rewards())):
        yield "" if i else "rewards", f"{label}: {count:,} ({count / len(pool):.1%})"
    sizes = [len(rows) for rows in pool.rows_of_problems().values()]
    yield "problems", f"{len(sizes):,}"
    yield "trajectories of a problem", f"{min(sizes):,} to {max(sizes):,}, mean {len(pool) / len(sizes):.1f}"
    yield "with reference log-probs", f"{pool.has_ref_log_probs().mean():.1%}"
    for origin in pool.provenances():
        yield "task", origin.task
        yield "model, tokenizer", f"{origin.model_digest}, {origin.tokenizer_digest}"
        yield "sampling", ", ".join(f"{name} {value:g}" for name, value in origin.sampling.items()) or "unknown"


def _histogram(rewards: np.ndarray) -> Iterator[tuple[str, int]]:
    """Count each reward if there are few different ones; else count tenths of their range."""
    import numpy as np

    values, counts = np.unique(rewards, return_counts=True)
    if len(values) <= 10:
        yield from ((f"{value:g}", int(count)) for value, count in zip(values, counts))
        return
    counts, edges = np.histogram(rewards, bins=10)
    yield from ((f"{low:.3g} to {high:.3g}", int(n)) for low, high, n in zip(edges, edges[1:], counts))


# --------------------------------------------------------------------------------------------------------------- filter


def _ids_of(path: str, task: str) -> set[str]:
    """Return the problem ids of a task's file."""
    from megatron_rl.tasks.problems import load_problems

    return {problem.problem_id for problem in load_problems(task, path)}


def _listed(counts: Mapping[str, int]) -> str:
    return ", ".join(f"{reason} {count}" for reason, count in counts.items()) or "none"


# ---------------------------------------------------------------------------------------------------------------- build


def _recorded_run(run_dir: Path, model: str | None) -> tuple[Config, int]:
    """Return the config of a run and the number of steps it has done."""
    from megatron_rl.config import load_config
    from megatron_rl.metrics import read_metrics

    config = load_config(run_dir / "config.yaml")
    if config.trainer.stage != "rl":
        raise UserError(str(run_dir), config.trainer.stage, "is no run with rollouts", "name a run of trainer.stage rl")
    if model is not None:
        config = replace(config, policy=replace(config.policy, model_path=model, tokenizer_path=None))
    metrics = run_dir / "metrics.jsonl"
    steps = max((int(row["step"]) for row in read_metrics(metrics)), default=0) if metrics.is_file() else 0
    if not steps:
        raise UserError(str(metrics), None, "has no finished step", "name rollouts/ of a run that has done some")
    return config, steps


@contextmanager
def _replay(config: Config, rollouts: Path) -> Iterator[tuple[Callable[[int], list[RolloutGroup]], Provenance]]:
    """Return a function from step (from 1, in order, without gaps) to its groups, and their provenance."""
    import torch.distributed as dist

    from megatron_rl.algorithms import build_algorithm
    from megatron_rl.algorithms.base import OnlineAlgorithm
    from megatron_rl.data.origin import tokenizer_digest
    from megatron_rl.data.stream import Stream
    from megatron_rl.metrics import PhaseTimer
    from megatron_rl.rollout.collect import Collector
    from megatron_rl.rollout.recorded import RecordedEngine
    from megatron_rl.scoring.scorer import Scorer

    algorithm, tokenizer, data = build_algorithm(config), _tokenizer(config), config.data
    assert isinstance(algorithm, OnlineAlgorithm)
    if config.algorithm.asks_policy(config.rollout):
        raise UserError(
            "algorithm.name",
            config.algorithm.name,
            "asked the trainer during the rollouts; without it nobody can tell which rollouts continue which",
            "build the pool from a run with algorithm.selection.probabilities=rollout",
        )
    algorithm.use_tokenizer(tokenizer)
    prompts = Stream(_prompts(config, tokenizer), config.trainer.seed, data.shuffle)
    dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    assert dist.group.WORLD is not None
    try:
        scorer = Scorer(
            [data.task], tokenizer, num_workers=data.num_scoring_workers, timeout_s=data.scoring_timeout_s,
            cpu_group=dist.group.WORLD, reward=data.reward, reward_kwargs=data.reward_kwargs,
        )  # fmt: skip
        try:
            collector = Collector(RecordedEngine(rollouts), scorer, config.trainer.seed, PhaseTimer())
            origin = _provenance(config, tokenizer_digest(tokenizer))
            yield lambda step: algorithm.collect(prompts, collector, step - 1), origin
        finally:
            scorer.close()
    finally:
        dist.destroy_process_group()


def _tokenizer(config: Config) -> Any:
    from megatron_rl.convert.architecture.shape import read_shape
    from megatron_rl.data.tokenizer import load_tokenizer

    policy = config.policy
    return load_tokenizer(policy.tokenizer_dir, read_shape(policy.model_dir))


def _prompts(config: Config, tokenizer: Any) -> list[Prompt]:
    from megatron_rl.convert.architecture.shape import read_shape
    from megatron_rl.data.prompts import PromptMaker, tokenize_prompts
    from megatron_rl.tasks.problems import load_problems

    data = config.data
    problems = load_problems(data.task, *(data.train or ()), template=data.template, fields=data.fields)
    context = read_shape(config.policy.model_dir).max_position_embeddings
    maker = PromptMaker(tokenizer, data, context_length=context, max_new_tokens=config.rollout.max_new_tokens)
    prompts, _ = tokenize_prompts(problems, maker)
    return prompts


def _provenance(config: Config, tokenizer: str) -> Provenance:
    """Return the provenance; weights changed each step, so the run's config, which is no model, gives the model digest."""
    from megatron_rl.data.pool import Provenance

    run = hashlib.blake2b(f"rollouts of {config!r}".encode(), digest_size=8).hexdigest()
    names = ("temperature", "top_p", "top_k", "max_new_tokens")
    return Provenance(config.data.task, run, tokenizer, {name: getattr(config.rollout, name) for name in names})


def _reason_to_drop(rollout: Rollout, min_reward: float | None) -> str | None:
    from megatron_rl.rewards.correct import is_correct

    if rollout.score.is_failure:
        return "score_failure"
    if rollout.completion.finish_reason != "stop":
        return "unfinished"
    if min_reward is None:
        return None if is_correct(rollout.score) else "wrong"
    return None if rollout.score.reward >= min_reward else "reward"


def _trajectory(prompt: Prompt, rollout: Rollout) -> Trajectory:
    from megatron_rl.data.pool import Trajectory

    ids = rollout.completion.response_ids
    return Trajectory(prompt.problem.problem_id, prompt.prompt_ids, ids, rollout.score.reward)

"""Held-out problems: unbiased pass@k and avg@k from samples, greedy accuracy, and how diverse the samples are.

prompts -> Evaluator.evaluate -> Evaluation -- metrics --> the row of the step
                                            -- results --> eval/step_00000000.json, problem by problem
results of step 0, or of another run (``eval.baseline``)  --> keep_and_explore_rates of later steps
"""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

from pydantic import TypeAdapter, ValidationError

from megatron_rl.config.data import EvalConfig
from megatron_rl.errors import UserError
from megatron_rl.evaluation.diversity import answer_metrics, keep_and_explore, style_metrics
from megatron_rl.evaluation.pass_at_k import pass_at_k
from megatron_rl.files import SAME_COMMAND, disk_errors, write_atomic
from megatron_rl.metrics.rows import EVAL_PREFIX
from megatron_rl.rewards.correct import is_correct
from megatron_rl.rollout.collect import Collector, Sampling
from megatron_rl.types import Prompt, RolloutGroup


@dataclass(frozen=True)
class ProblemResult:
    """The result of one problem."""

    problem_id: str
    num_correct: int
    """Number of right samples."""
    is_greedy_correct: bool | None
    """None if nothing was decoded greedily."""


@dataclass(frozen=True)
class EvalResults:
    """An evaluation, problem by problem, with its sampling settings."""

    step: int
    num_samples: int
    """Number of samples of each problem."""
    temperature: float
    top_p: float
    problems: list[ProblemResult]

    @property
    def solved_by_any(self) -> dict[str, bool]:
        """Return problem id -> True if at least one sample is right."""
        return {problem.problem_id: problem.num_correct > 0 for problem in self.problems}

    @property
    def solved_greedily(self) -> dict[str, bool]:
        """Return problem id -> True if greedy decoding solved it; empty if nothing was decoded greedily."""
        return {p.problem_id: p.is_greedy_correct for p in self.problems if p.is_greedy_correct is not None}


@dataclass(frozen=True)
class Evaluation:
    """Metrics and results of one evaluation."""

    metrics: dict[str, float]
    """``eval/...``, for the row of the step."""
    results: EvalResults


@dataclass(frozen=True)
class Evaluator:
    """The held-out prompts and the settings for sampling on them."""

    prompts: Sequence[Prompt]
    config: EvalConfig
    max_new_tokens: int

    def evaluate(self, collector: Collector, *, step: int, num_samples: int) -> Evaluation:
        """Sample, score, count. A collective.

        Args:
            collector: engine and scorer.
            step: number of steps trained; it names the draw.
            num_samples: per problem; values of k above it are left out.

        Returns:
            Metrics ``eval/greedy``, ``eval/pass@k`` for each k, ``eval/avg@n``, shares in [0, 1]; ``eval/response_length``;
            and those of ``answer_metrics`` and ``style_metrics``. Results of each problem in the order of the prompts.
        """
        config = self.config
        sampled = collector.collect(
            self.prompts,
            num_generations=num_samples,
            sampling=Sampling(config.temperature, config.top_p, 0, self.max_new_tokens),
            purpose=f"eval/{step}",
        )
        correct = [sum(is_correct(r.score) for r in group.rollouts) for group in sampled]
        metrics = {
            f"pass@{k}": _mean([pass_at_k(num_samples, c, k) for c in correct]) for k in self._k_up_to(num_samples)
        }
        metrics[f"avg@{num_samples}"] = _mean([c / num_samples for c in correct])
        metrics["response_length"] = _mean([float(n) for n in _response_lengths(sampled)])
        greedy = self._decode_greedily(collector, step) if config.greedy else {}
        if greedy:
            metrics["greedy"] = _mean(list(greedy.values()))
        metrics |= answer_metrics([[r.score.answer for r in group.rollouts] for group in sampled])
        metrics |= style_metrics([[r.score.style for r in group.rollouts] for group in sampled])
        problems = [
            ProblemResult(problem_id, num_correct, greedy.get(problem_id))
            for problem_id, num_correct in zip(map(_problem_id, sampled), correct)
        ]
        results = EvalResults(step, num_samples, config.temperature, config.top_p, problems)
        return Evaluation(_with_prefix(metrics), results)

    def read_results(self, path: Path, *, field: str) -> EvalResults:
        """Read the results of another evaluation of the same problems.

        Args:
            path: written by ``save_results``.
            field: config key that an error names.

        Raises:
            UserError: the file does not exist, has another format, or is about other problems.
        """
        results = _read(path, field)
        mine = {prompt.problem.problem_id for prompt in self.prompts}
        theirs = {problem.problem_id for problem in results.problems}
        if mine != theirs:
            raise UserError(
                field,
                str(path),
                f"is about other problems: {len(mine - theirs)} of the {len(mine)} evaluated here are not in it, and "
                f"{len(theirs - mine)} of its {len(theirs)} are not evaluated here",
                "evaluate on the same problems (data.validation, eval.num_problems), or measure the baseline again",
            )
        return results

    def rates(
        self, results: EvalResults, baseline: EvalResults | None, *, run_dir: Path, say: Callable[[str], None]
    ) -> dict[str, float]:
        """Return keep and explore rates against a baseline, else against the run's own step 0; nothing without either.

        Args:
            results: of now.
            baseline: of ``eval.baseline``.
            run_dir: holds the run's evaluations.
            say: is told why step 0 cannot be read.
        """
        own = results_path(run_dir, 0)
        if baseline is None and own.is_file():
            try:
                baseline = self.read_results(own, field="eval")
            except UserError as error:  # no reason to end a run that was resumed with other problems
                say(f"no keep and explore rates: {error}")
        return {} if baseline is None else keep_and_explore_rates(baseline, results)

    def read_baseline(self) -> EvalResults | None:
        """Read the results that ``eval.baseline`` names, with the errors of ``read_results``; None if it names none."""
        path = self.config.baseline
        return None if path is None else self.read_results(Path(path), field="eval.baseline")

    def _k_up_to(self, num_samples: int) -> list[int]:
        return [k for k in self.config.k_values if k <= num_samples]

    def _decode_greedily(self, collector: Collector, step: int) -> dict[str, bool]:
        """Return problem id -> True if the most likely response is right."""
        groups = collector.collect(
            self.prompts,
            num_generations=1,
            sampling=Sampling(0.0, 1.0, 0, self.max_new_tokens),
            purpose=f"eval/{step}/greedy",
        )
        return {_problem_id(group): is_correct(group.rollouts[0].score) for group in groups}


def keep_and_explore_rates(before: EvalResults, after: EvalResults) -> dict[str, float]:
    """Return ``keep_and_explore`` for both meanings of "solved": ``eval/keep_rate_greedy``, ``eval/explore_rate_any``, ...

    ``_greedy`` where both evaluations decoded greedily. ``_any`` (at least one of n samples is right) where both drew as many
    samples at the same temperature and top_p: else the rates would tell of the sampling and not of the weights.
    """
    rates: dict[str, float] = {}
    if before.solved_greedily and after.solved_greedily:
        greedy = keep_and_explore(before.solved_greedily, after.solved_greedily)
        rates |= {f"{name}_greedy": rate for name, rate in greedy.items()}
    if _sampling(before) == _sampling(after):
        of_any = keep_and_explore(before.solved_by_any, after.solved_by_any)
        rates |= {f"{name}_any": rate for name, rate in of_any.items()}
    return _with_prefix(rates)


def results_path(run_dir: Path, step: int) -> Path:
    """Return ``<run_dir>/eval/step_00000000.json``."""
    return run_dir / "eval" / f"step_{step:08d}.json"


def save_results(run_dir: Path, results: EvalResults) -> None:
    """Write the results into the run's folder atomically, in place of an earlier evaluation of the step.

    Raises:
        UserError: the file cannot be written.
    """
    path = results_path(run_dir, results.step)
    with disk_errors(path, field="exp_manager.exp_dir", fix=f"{SAME_COMMAND}: the run resumes"):
        write_atomic(path, json.dumps(asdict(results), indent=1) + "\n")


def _read(path: Path, field: str) -> EvalResults:
    fix = "give the eval/step_<number>.json of a run"
    try:
        return TypeAdapter(EvalResults).validate_json(path.read_bytes())
    except OSError as error:
        raise UserError(field, str(path), f"cannot be read ({error.strerror})", fix) from error
    except ValidationError as error:
        first = error.errors(include_url=False)[0]
        where = ".".join(map(str, first["loc"]))
        rule = f"holds no results of an evaluation ({where + ': ' if where else ''}{first['msg']})"
        raise UserError(field, str(path), rule, fix) from error


def _sampling(results: EvalResults) -> tuple[int, float, float]:
    return results.num_samples, results.temperature, results.top_p


def _with_prefix(metrics: Mapping[str, float]) -> dict[str, float]:
    return {EVAL_PREFIX + name: value for name, value in metrics.items()}


def _problem_id(group: RolloutGroup) -> str:
    return group.prompt.problem.problem_id


def _response_lengths(groups: Sequence[RolloutGroup]) -> list[int]:
    """Count the response tokens of every rollout."""
    return [len(rollout.completion.response_ids) for group in groups for rollout in group.rollouts]


def _mean(values: Sequence[float]) -> float:
    """Return the arithmetic mean; 0.0 of no values."""
    return sum(values) / len(values) if values else 0.0

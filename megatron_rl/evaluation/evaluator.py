"""Held-out problems: unbiased pass@k and avg@k from samples, greedy accuracy, and how diverse the samples are.

What the scorer could not judge is neither right nor wrong: it is in no mean, and counted as ``eval/dropped/score_<reason>``.

prompts -> Evaluator.evaluate -> Evaluation -- metrics --> the row of the step
                                            -- results --> eval/step_00000000.json, problem by problem
results of step 0, or of another run (``eval.baseline``)  --> keep_and_explore_rates of later steps
"""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Annotated, Any

from pydantic import BeforeValidator, TypeAdapter, ValidationError

from megatron_rl.config.data import EvalConfig
from megatron_rl.errors import UserError
from megatron_rl.evaluation.diversity import answer_metrics, keep_and_explore, style_metrics
from megatron_rl.evaluation.pass_at_k import pass_at_k
from megatron_rl.files import SAME_COMMAND, disk_errors, write_atomic
from megatron_rl.metrics.rows import EVAL_PREFIX
from megatron_rl.metrics.step import dropped_scores
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
    """None if nothing was decoded greedily, or what was could not be judged."""
    num_samples: int
    """Number of samples that could be judged."""


@dataclass(frozen=True)
class EvalResults:
    """An evaluation, problem by problem, with its sampling settings."""

    step: int
    num_samples: int
    """Number of samples drawn of each problem."""
    temperature: float
    top_p: float
    problems: list[ProblemResult]

    @property
    def solved_by_any(self) -> dict[str, bool]:
        """Return problem id -> True if at least one sample is right; for problems whose every sample could be judged.

        The others had fewer chances to be solved.
        """
        return {p.problem_id: p.num_correct > 0 for p in self.problems if p.num_samples == self.num_samples}

    @property
    def solved_greedily(self) -> dict[str, bool]:
        """Return problem id -> True if greedy decoding solved it; for problems where that could be judged."""
        return {p.problem_id: p.is_greedy_correct for p in self.problems if p.is_greedy_correct is not None}


@dataclass(frozen=True)
class Evaluation:
    """Metrics and results of one evaluation."""

    metrics: dict[str, float]
    """``eval/...``, for the row of the step."""
    results: EvalResults
    groups: tuple[list[RolloutGroup], list[RolloutGroup]] = ([], [])
    """The sampled groups, and those of one greedy response each."""


@dataclass(frozen=True)
class Evaluator:
    """The prompts of one held-out set and the settings for sampling on them."""

    prompts: Sequence[Prompt]
    config: EvalConfig
    max_new_tokens: int
    name: str = ""
    """Name of the set, which its metrics have in front: ``eval/<name>/greedy``. ``""``: it has none, ``eval/greedy``."""

    @property
    def prefix(self) -> str:
        """First part of the names of the metrics."""
        return f"{EVAL_PREFIX}{self.name}/" if self.name else EVAL_PREFIX

    def _purpose(self, step: int) -> str:
        return f"{self.prefix}{step}"

    def evaluate(self, collector: Collector, *, step: int, num_samples: int, say: Callable[[str], None]) -> Evaluation:
        """Sample, score, count. A collective.

        Args:
            collector: engine and scorer.
            step: number of steps trained; it names the draw.
            num_samples: per problem; values of k above it are left out.
            say: is told once if something could not be judged.

        Returns:
            Metrics ``eval/greedy``, ``eval/pass@k`` for each k, ``eval/avg@n``, shares in [0, 1], means over the problems of
            which enough could be judged: the greedy response, k samples, one sample. ``eval/dropped/<name>`` is the number of
            problems that are left out of such a mean, ``eval/dropped/score_<reason>`` that of scores that failed.
            ``eval/response_length`` is over all samples, ``answer_metrics`` and ``style_metrics`` over those that could be
            judged. What would be a mean over nothing, or a count of 0, is absent. Results of each problem are in the order of
            the prompts.
        """
        config = self.config
        sampled = collector.collect(
            self.prompts,
            num_generations=num_samples,
            sampling=Sampling(config.temperature, config.top_p, 0, self.max_new_tokens),
            purpose=self._purpose(step),
        )
        decoded = self._decode_greedily(collector, step) if config.greedy else []
        judged = [[r.score for r in group.rollouts if not r.score.is_failure] for group in sampled]
        counts = [(len(scores), sum(map(is_correct, scores))) for scores in judged]
        greedy = {_problem_id(group): _greedy_verdict(group) for group in decoded}
        accuracies = {
            f"pass@{k}": [pass_at_k(n, c, k) for n, c in counts if n >= k] for k in self._k_up_to(num_samples)
        }
        accuracies[f"avg@{num_samples}"] = [c / n for n, c in counts if n]
        if decoded:
            accuracies["greedy"] = [float(verdict) for verdict in greedy.values() if verdict is not None]
        metrics = {name: _mean(values) for name, values in accuracies.items() if values}
        metrics["response_length"] = _mean([float(n) for n in _response_lengths(sampled)])
        metrics |= answer_metrics([[score.answer for score in scores] for scores in judged])
        metrics |= style_metrics([[score.style for score in scores] for scores in judged])
        if failures := dropped_scores([*sampled, *decoded]):
            metrics |= failures
            left_out = {name: len(counts) - len(values) for name, values in accuracies.items()}
            metrics |= {f"dropped/{name}": float(count) for name, count in left_out.items() if count}
            say(
                _warning(
                    step, self.name, failures, num_scores=sum(len(group.rollouts) for group in [*sampled, *decoded])
                )
            )
        problems = [
            ProblemResult(problem_id, num_correct, greedy.get(problem_id), num_judged)
            for problem_id, (num_judged, num_correct) in zip(map(_problem_id, sampled), counts)
        ]
        results = EvalResults(step, num_samples, config.temperature, config.top_p, problems)
        prefixed = {self.prefix + name: value for name, value in metrics.items()}
        return Evaluation(prefixed, results, (sampled, decoded))

    def read_results(self, path: Path, *, field: str) -> EvalResults:
        """Read the results of another evaluation of the same problems.

        Args:
            path: written by ``save_results``.
            field: config key that an error names.

        Raises:
            UserError: the file does not exist, has another format, or is about other sets or problems.
        """
        results = self._of_this_set(_read(path, field), path, field)
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

    def _of_this_set(self, sets: Mapping[str, EvalResults], path: Path, field: str) -> EvalResults:
        """Choose among the sets of a file by name. A set alone needs none on one of the two sides."""
        if self.name in sets:
            return sets[self.name]
        if len(sets) == 1 and "" in (self.name, *sets):
            return next(iter(sets.values()))
        rule = f"has no results of {self.name or 'a set without a name'}; it has {', '.join(sets)}"
        raise UserError(field, str(path), rule, "give the sets of data.validation the names that they had there")

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
        return {} if baseline is None else keep_and_explore_rates(baseline, results, prefix=self.prefix)

    def read_baseline(self) -> EvalResults | None:
        """Read the results that ``eval.baseline`` names, with the errors of ``read_results``; None if it names none."""
        path = self.config.baseline
        return None if path is None else self.read_results(Path(path), field="eval.baseline")

    def _k_up_to(self, num_samples: int) -> list[int]:
        return [k for k in self.config.k_values if k <= num_samples]

    def _decode_greedily(self, collector: Collector, step: int) -> list[RolloutGroup]:
        """Return the most likely response to each prompt, scored."""
        return collector.collect(
            self.prompts,
            num_generations=1,
            sampling=Sampling(0.0, 1.0, 0, self.max_new_tokens),
            purpose=f"{self._purpose(step)}/greedy",
        )


def keep_and_explore_rates(before: EvalResults, after: EvalResults, *, prefix: str = EVAL_PREFIX) -> dict[str, float]:
    """Return ``keep_and_explore`` for both meanings of "solved": ``eval/keep_rate_greedy``, ``eval/explore_rate_any``, ...

    ``_greedy`` where both evaluations decoded greedily. ``_any`` (at least one of n samples is right) where both drew as many
    samples at the same temperature and top_p: else the rates would tell of the sampling and not of the weights. Both are over
    the problems that both evaluations could judge, by every sample that they drew.
    """
    rates = _rates_of_both(before.solved_greedily, after.solved_greedily, "greedy")
    if _sampling(before) == _sampling(after):
        rates |= _rates_of_both(before.solved_by_any, after.solved_by_any, "any")
    return {prefix + name: rate for name, rate in rates.items()}


def _rates_of_both(before: Mapping[str, bool], after: Mapping[str, bool], meaning: str) -> dict[str, float]:
    """Return the rates over the problems that are in both."""
    both = [problem_id for problem_id in before if problem_id in after]
    found = keep_and_explore({name: before[name] for name in both}, {name: after[name] for name in both})
    return {f"{name}_{meaning}": rate for name, rate in found.items()}


def results_path(run_dir: Path, step: int) -> Path:
    """Return ``<run_dir>/eval/step_00000000.json``."""
    return run_dir / "eval" / f"step_{step:08d}.json"


def save_results(run_dir: Path, results: Mapping[str, EvalResults]) -> None:
    """Write the results of one step into the run's folder atomically, in place of an earlier evaluation of it.

    Args:
        run_dir: folder of the run.
        results: by name of the set. One without a name stands in the file as it is, others as ``{"step": ..., "sets": {...}}``.

    Raises:
        UserError: the file cannot be written.
    """
    step = next(iter(results.values())).step
    sets = {name: asdict(of_set) for name, of_set in results.items()}
    content = sets.get("", {"step": step, "sets": sets})
    path = results_path(run_dir, step)
    with disk_errors(path, field="exp_manager.exp_dir", fix=f"{SAME_COMMAND}: the run resumes"):
        write_atomic(path, json.dumps(content, indent=1) + "\n")


def _by_set(content: Any) -> Any:
    """Return the results in a file by set."""
    sets = content["sets"] if isinstance(content, dict) and "sets" in content else {"": content}
    return {name: _count_all_samples(of_set) for name, of_set in sets.items()} if isinstance(sets, dict) else sets


def _count_all_samples(results: Any) -> Any:
    """Add ``num_samples`` to the problems of a file that lacks it: there, all samples counted, judged or not."""
    if isinstance(results, dict) and isinstance(problems := results.get("problems"), list):
        for problem in problems:
            if isinstance(problem, dict):
                problem.setdefault("num_samples", results.get("num_samples"))
    return results


def _read(path: Path, field: str) -> dict[str, EvalResults]:
    fix = "give the eval/step_<number>.json of a run"
    adapter: TypeAdapter[dict[str, EvalResults]] = TypeAdapter(
        Annotated[dict[str, EvalResults], BeforeValidator(_by_set)]
    )
    try:
        return adapter.validate_json(path.read_bytes())
    except OSError as error:
        raise UserError(field, str(path), f"cannot be read ({error.strerror})", fix) from error
    except ValidationError as error:
        first = error.errors(include_url=False)[0]
        where = ".".join(str(part) for part in first["loc"] if part != "")
        rule = f"holds no results of an evaluation ({where + ': ' if where else ''}{first['msg']})"
        raise UserError(field, str(path), rule, fix) from error


def _sampling(results: EvalResults) -> tuple[int, float, float]:
    return results.num_samples, results.temperature, results.top_p


def _problem_id(group: RolloutGroup) -> str:
    return group.prompt.problem.problem_id


def _greedy_verdict(group: RolloutGroup) -> bool | None:
    """Tell whether the one response of a group is right; None where it could not be judged."""
    score = group.rollouts[0].score
    return None if score.is_failure else is_correct(score)


def _warning(step: int, name: str, failures: Mapping[str, float], *, num_scores: int) -> str:
    total = sum(failures.values())
    reasons = ", ".join(f"{key.removeprefix('dropped/score_')} {count:.0f}" for key, count in failures.items())
    which = f"evaluation of {name}" if name else "evaluation"
    return (
        f"{which} after step {step}: {total:.0f} of {num_scores} responses could not be judged ({reasons}); they are left "
        "out. See data.scoring_timeout_s and data.num_scoring_workers"
    )


def _response_lengths(groups: Sequence[RolloutGroup]) -> list[int]:
    """Count the response tokens of every rollout."""
    return [len(rollout.completion.response_ids) for group in groups for rollout in group.rollouts]


def _mean(values: Sequence[float]) -> float:
    """Return the arithmetic mean; 0.0 of no values."""
    return sum(values) / len(values) if values else 0.0

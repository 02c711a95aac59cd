"""The folder of ``megatron-rl eval``: samples as they come, and the figures, which follow from them alone.

settings.json               weights, problems and sampling; another start with others is refused
chunks/<set>/000000.jsonl   samples of some problems, complete or absent
samples/<set>.jsonl         all samples of a set that is done, a line each, in place of its chunks
results.json                the figures
"""

from __future__ import annotations

import json
import shutil
from collections import Counter
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from megatron_rl.data.chunked import begin, count_chunks, has_begun, write_json
from megatron_rl.errors import UserError
from megatron_rl.evaluation.figures import Outcomes, figures
from megatron_rl.files import SAME_COMMAND, atomic_file, disk_errors
from megatron_rl.metrics.rows import json_safe
from megatron_rl.rewards.correct import is_correct
from megatron_rl.tasks.rows.layouts import find
from megatron_rl.types import Problem, Prompt, RolloutGroup

UNNAMED = "validation"
"""Name of a set that has none."""
SampleRow = dict[str, Any]


class SampleFolder:
    """The folder as the one process that writes there uses it.

    Args:
        directory: the folder, made if there is none.
        settings: what the samples depend on, as JSON.

    Raises:
        UserError: it was begun with other settings; from every method, it cannot be read or written.
    """

    def __init__(self, directory: Path, settings: Mapping[str, Any]) -> None:
        self.directory = directory
        fix = "give the model and settings as they were, or another --out, or remove the folder"
        if not has_begun(directory, settings, field="--out", fix=fix):
            begin(directory, settings)

    def num_done(self, name: str, num_chunks: int) -> int:
        """Return how many chunks of a set are done."""
        return num_chunks if self.samples(name).is_file() else count_chunks(lambda number: self._chunk(name, number))

    def keep(self, name: str, number: int, rows: Sequence[SampleRow]) -> None:
        """Write a chunk of a set."""
        path = self._chunk(name, number)
        with disk_errors(path, fix=SAME_COMMAND), atomic_file(path) as temporary:
            temporary.write_text("".join(json.dumps(json_safe(row)) + "\n" for row in rows), encoding="utf-8")

    def finish(self, name: str, num_chunks: int) -> list[SampleRow]:
        """Join the chunks of a set, if that is not done yet; return its rows."""
        path = self.samples(name)
        with disk_errors(path, fix=SAME_COMMAND):
            if not path.is_file():
                with atomic_file(path) as temporary, temporary.open("wb") as joined:
                    for number in range(num_chunks):
                        with self._chunk(name, number).open("rb") as chunk:
                            shutil.copyfileobj(chunk, joined)
            shutil.rmtree(self.directory / "chunks" / name, ignore_errors=True)
            with path.open(encoding="utf-8") as lines:
                return [json.loads(line) for line in lines]

    def write_results(self, results: Mapping[str, Any]) -> Path:
        """Write ``results.json``; return its path."""
        path = self.directory / "results.json"
        write_json(path, json_safe(results))
        return path

    def samples(self, name: str) -> Path:
        """Return the file of a set's samples."""
        return self.directory / "samples" / f"{name}.jsonl"

    def _chunk(self, name: str, number: int) -> Path:
        return self.directory / "chunks" / name / f"{number:06d}.jsonl"


def sample_rows(groups: Sequence[RolloutGroup], kind: str, tokenizer: Any) -> list[SampleRow]:
    """Return a row for each rollout, as it goes to disk.

    Args:
        groups: of some prompts.
        kind: ``sample`` or ``greedy``.
        tokenizer: decodes: the prompt as the model reads it, the response without special tokens, as the scorer gets it.
    """
    rows = []
    for group in groups:
        problem, prompt = group.prompt.problem, tokenizer.decode(group.prompt.prompt_ids.tolist())
        texts = tokenizer.batch_decode(
            [rollout.completion.response_ids.tolist() for rollout in group.rollouts], skip_special_tokens=True
        )
        for index, (rollout, text) in enumerate(zip(group.rollouts, texts)):
            score, completion = rollout.score, rollout.completion
            rows.append(
                {
                    "problem": problem.problem_id,
                    "source": problem.source,
                    "kind": kind,
                    "index": index,
                    "prompt": prompt,
                    "response": text,
                    "answer": score.answer,
                    "reference": problem.answer,
                    "reward": score.reward,
                    "correct": None if score.is_failure else is_correct(score),
                    "parts": score.parts,
                    "reason": score.reason,
                    "finish": completion.finish_reason,
                    "prompt_tokens": len(group.prompt.prompt_ids),
                    "response_tokens": len(completion.response_ids),
                }
            )
    return rows


def outcomes_of(rows: Sequence[SampleRow], sources: Sequence[str]) -> Outcomes:
    """Return the outcomes of a set's samples, in the order of the problems' sources: a set may hold a problem twice."""
    by_problem: dict[str, list[SampleRow]] = {source: [] for source in sources}
    greedy = dict.fromkeys(sources, np.nan)
    for row in rows:
        if row["kind"] == "greedy":
            greedy[row["source"]] = _verdict(row)
        else:
            by_problem[row["source"]].append(row)
    votes = []
    for samples in by_problem.values():
        numbers: dict[str, int] = {}
        votes.append([numbers.setdefault(row["answer"], len(numbers)) if row["answer"] else -1 for row in samples])
    of_all = list(by_problem.values())
    return Outcomes(
        np.array([[_verdict(row) for row in samples] for samples in of_all]),
        np.array(votes),
        np.array([[float(row["response_tokens"]) for row in samples] for samples in of_all]),
        np.array([[float(row["finish"] == "length") for row in samples] for samples in of_all]),
        np.array(list(greedy.values())),
    )


def set_results(
    rows: Sequence[SampleRow], prompts: Sequence[Prompt], *, k_values: Sequence[int], by: Sequence[str], seed: int
) -> dict[str, Any]:
    """Return the results of one set, as they stand in ``results.json``.

    Args:
        rows: of its samples.
        prompts: its prompts, in order.
        k_values: of pass@k.
        by: columns of metadata; figures of each of their values are given too, where a problem of the set has the column.
        seed: of intervals.

    Returns:
        ``figures``; ``dropped``: how many problems are left out of which figure, and how many scores failed for what reason;
        ``by``: column -> value -> figures.
    """
    outcomes = outcomes_of(rows, [prompt.problem.source for prompt in prompts])
    found = figures(outcomes, k_values, seed=seed)
    dropped = {name: len(prompts) - figure["num_problems"] for name, figure in found.items()}
    failures = Counter(f"score_{row['reason'].split(':')[0]}" for row in rows if row["correct"] is None)
    domains = {}
    for column in by:
        values = _domains(prompts, column)
        of_column = {
            value: np.array([i for i, each in enumerate(values) if each == value]) for value in sorted({*values})
        }
        if [*of_column] == [""]:
            continue
        domains[column] = {value: figures(outcomes.of(at), k_values, seed=seed) for value, at in of_column.items()}
    return {
        "num_problems": len(prompts),
        "num_samples": outcomes.correct.shape[1],
        "figures": found,
        "dropped": {name: count for name, count in dropped.items() if count} | dict(sorted(failures.items())),
        "by": domains,
    }


def check_columns(problems: Sequence[Problem], by: Sequence[str]) -> None:
    """Check that each column of ``eval.by`` is one of a problem's metadata, before anything is sampled.

    Raises:
        UserError: one is not.
    """
    for column in by:
        if any(find(problem.metadata, column) is not None for problem in problems):
            continue
        columns = ", ".join(sorted({key for problem in problems for key in problem.metadata})) or "none"
        rule = f"is no column of the problems' metadata, which has {columns}"
        raise UserError("eval.by", column, rule, "name one of those, or leave it out")


def _domains(prompts: Sequence[Prompt], column: str) -> list[str]:
    values = [find(prompt.problem.metadata, column) for prompt in prompts]
    return ["" if value is None else str(value) for value in values]


def _verdict(row: SampleRow) -> float:
    return np.nan if row["correct"] is None else float(row["correct"])

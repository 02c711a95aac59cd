"""Sections ``data``, ``eval`` and ``presample``: problems, held-out accuracy, and samples for later runs."""

from __future__ import annotations

import os
from typing import Literal

from pydantic import Field, NonNegativeInt, PositiveInt

from megatron_rl.config.section import PathText, PerMachine, Seconds, Temperature, section
from megatron_rl.errors import UserError


@section
class DataConfig:
    """Source of problems, and how responses are scored."""

    task: str
    """A name from megatron_rl.tasks (gsm8k, word_problems), or ``package.module:NAME`` of a task of your own."""
    reward: str | None = None
    """``package.module:FUNCTION`` of a reward of your own; null takes the task's ``score``.

    A plain function f(problem, response) -> float or Score, run in the scoring workers: ``problem`` has question, answer and
    metadata (types.py), ``response`` is the decoded text. A float r counts as correct, for pass@k and for the pools of samples,
    where r >= 1; return a Score to say otherwise. A rollout whose reward raises, is no finite number or takes longer
    than ``scoring_timeout_s`` gets no advantage and is counted as dropped/score_crash or dropped/score_timeout."""
    train: PathText
    """Problem file (.jsonl or .jsonl.gz) to train on."""
    validation: PathText | None = None
    """Problem file to evaluate on; required by ``eval``."""
    template: str | None = None
    """Prompt template with ``{question}``; null takes the task's own."""
    apply_chat_template: bool = False
    """Wrap the prompt as a user message with the tokenizer's chat template."""
    shuffle: bool = True
    max_prompt_tokens: PositiveInt | None = None
    overlong_prompts: Literal["error", "drop"] = "error"
    """A prompt that leaves no room for ``max_new_tokens`` stops the run, or is left out and counted."""
    num_scoring_workers: PerMachine = 2
    scoring_timeout_s: Seconds = 10.0
    """Deadline of one score; the worker is killed and the row counted as dropped/score_timeout."""

    def __post_init__(self) -> None:
        if self.validation is not None and os.path.realpath(self.validation) == os.path.realpath(self.train):
            raise UserError(
                "data.validation",
                self.validation,
                "is data.train: accuracy on the problems that are trained on is not that on others",
                "give other problems, or a copy under another name if this is what you want to see",
            )


@section
class EvalConfig:
    """Accuracy on ``data.validation``: pass@k from samples at ``temperature``, and greedy."""

    before: bool = False
    after: bool = False
    every_n_steps: NonNegativeInt = 0
    """0: never during training."""
    num_problems: PositiveInt | None = None
    """Evaluate on this many problems of ``data.validation``, from the first on; null takes all."""
    num_samples: PositiveInt = 8
    """Samples per problem before and after training."""
    num_samples_during: PositiveInt = 1
    k_values: list[PositiveInt] = Field(default_factory=lambda: [1, 8])
    greedy: bool = True
    temperature: Temperature = 1.0
    top_p: float = Field(default=1.0, gt=0, le=1)
    baseline: PathText | None = None
    """An ``eval/step_00000000.json`` of another run on the same problems: keep and explore rates compare with it. null: with
    this run's own evaluation before training, where there is one."""
    pool: PathText | None = None
    """A pool of samples with log-probs of their model: each evaluation adds how far the policy has gone from that."""
    num_pool_rows: PositiveInt = 256
    """The first rows of ``pool`` that are read."""

    @property
    def is_used(self) -> bool:
        """The run evaluates at some time."""
        return self.before or self.after or self.every_n_steps > 0

    def __post_init__(self) -> None:
        if not self.k_values:
            raise UserError("eval.k_values", [], "must name at least one k", "use [1], or [1, 8]")
        if max(self.k_values) > self.num_samples:
            raise UserError(
                "eval.k_values",
                self.k_values,
                f"pass@k needs k <= num_samples = {self.num_samples}",
                "raise eval.num_samples or drop the larger k",
            )
        if len(set(self.k_values)) < len(self.k_values):
            raise UserError("eval.k_values", self.k_values, "has a value twice", "leave one of them out")


@section
class PresampleConfig:
    """``megatron-rl presample``: samples of a model that later runs train on, in ``<run>/presample/``."""

    purpose: Literal["rehearsal", "replay"] = "rehearsal"
    """``rehearsal`` (DPH-RL): of each problem solved ``min_correct`` times or more, one further sample if that is right too,
    with its log-probs; the other problems are ``exploration.jsonl``. ``replay`` (RLEP): of such problems, all right samples."""
    problems: PathText | None = None
    """Problem file to sample on; null takes ``data.train``."""
    num_problems: PositiveInt | None = None
    """Sample on this many problems of the file, from the first on; null takes all."""
    num_samples: PositiveInt = 8
    min_correct: PositiveInt = 8
    temperature: Temperature = 1.0
    top_p: float = Field(default=0.95, gt=0, le=1)
    """Log-probs are at ``rollout.temperature`` and without top_p, whatever these are."""
    chunk_size: PositiveInt = 512
    """Problems from one write to the next: what a kill can cost."""

    def __post_init__(self) -> None:
        if self.min_correct > self.num_samples:
            raise UserError(
                "presample.min_correct",
                self.min_correct,
                f"must not exceed presample.num_samples = {self.num_samples}",
                "lower it, or draw more samples",
            )

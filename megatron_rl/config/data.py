"""Sections ``data``, ``eval`` and ``presample``: problems, held-out accuracy, and samples for later runs."""

from __future__ import annotations

import os
from typing import Any, Literal

from pydantic import Field, NonNegativeInt, PositiveInt

from megatron_rl.config.section import PathSets, PathText, PathTexts, PerMachine, Seconds, Temperature, section
from megatron_rl.errors import UserError
from megatron_rl.tasks.rows.row import Fields


@section
class FieldsConfig(Fields):
    """Columns of problem files whose layout is not recognised, as a section of a config."""

    def __post_init__(self) -> None:
        if self.prompt is not None and self.question is not None:
            given, rule = f"{self.prompt}, {self.question}", "only one of prompt and question can be named"
        elif self and self.prompt is None and self.question is None:
            given, rule = self.described(), "one of prompt and question has to be named"
        else:
            return
        raise UserError("data.fields", given, rule, "name the column that the model reads")


def validation_key(name: str) -> str:
    """Return the config key of a held-out set; ``""`` is the one without a name."""
    return f"data.validation.{name}" if name else "data.validation"


@section
class DataConfig:
    """Source of problems, and how responses are scored."""

    task: str = "math"
    """A name from megatron_rl.tasks (math, gsm8k, word_problems), or ``package.module:NAME`` of a task of your own. math takes
    problem files of every layout that is known, and those that ``fields`` maps; it compares final answers."""
    fields: FieldsConfig = Field(default_factory=FieldsConfig)
    """Columns by what they hold (megatron_rl/tasks/rows/row.py), where the layout is none that is recognised."""
    reward: str | None = None
    """``my_rewards.py:FUNCTION`` or ``package.module:FUNCTION``, a reward of your own; null takes the task's ``score``.

    It runs in the scoring workers, and takes what it names of: prompt, response, answer, metadata, question, problem,
    finish_reason, and any column of the metadata; as responses, prompts, answers it takes many at once. It may be async. It
    returns a number, a dict of named parts with ``reward`` in it, or a Score. A number r counts as correct, for pass@k and for
    pools of samples, where r >= 1; a part ``correct`` says otherwise. A rollout whose reward raises, is no finite
    number or takes longer than ``scoring_timeout_s`` gets no advantage and is counted as dropped/score_crash or
    dropped/score_timeout."""
    reward_kwargs: dict[str, Any] = Field(default_factory=dict)
    """Further arguments of the reward, or of the task's ``score``: math and gsm8k take ``lenient: true``, which also accepts an
    answer that is not marked, or of a response that was cut."""
    train: PathTexts | None
    """Problem files to train on: .jsonl, .jsonl.gz, .json, .parquet, a folder that ``datasets`` reads, or an id on the Hugging
    Face hub as ORGANISATION/NAME:SUBSET:SPLIT. One or a list; ``[a:b]`` behind one takes a slice of its rows. null: none, for
    ``megatron-rl eval``."""
    validation: PathSets | None = None
    """Problem files to evaluate on; required by ``eval``. A path or a list of paths is one set, whose metrics are
    ``eval/...``; a mapping is several, ``{gsm8k: FILE, aime: [FILE, FILE]}``, with metrics ``eval/gsm8k/...``. On the command
    line a mapping adds to one of the file, and anything else replaces it."""
    template: str | None = None
    """Prompt template with ``{question}``; null takes the task's own. Whole prompts and chat messages take none."""
    apply_chat_template: bool | None = None
    """Wrap the prompt as a user message with the tokenizer's chat template. null: chat messages alone."""
    system_prompt: str | None = None
    """First message of every chat that has no system message of its own."""
    chat_template_kwargs: dict[str, Any] = Field(default_factory=dict)
    """Arguments of the chat template: ``enable_thinking: false``."""
    shuffle: bool = True
    max_prompt_tokens: PositiveInt | None = None
    overlong_prompts: Literal["error", "drop"] = "error"
    """A prompt that leaves no room for ``max_new_tokens`` stops the run, or is left out and counted."""
    num_scoring_workers: PerMachine = 2
    scoring_timeout_s: Seconds = 10.0
    """Deadline of one score; the worker is killed and the row counted as dropped/score_timeout."""

    @property
    def held_out(self) -> dict[str, list[str]]:
        """Files of each held-out set by its name; ``""`` is the name of a set without one."""
        if self.validation is None:
            return {}
        return dict(self.validation) if isinstance(self.validation, dict) else {"": self.validation}

    def __post_init__(self) -> None:
        trained = set(map(os.path.realpath, self.train or ()))
        validation = [path for files in self.held_out.values() for path in files]
        if repeated := [path for path in validation if os.path.realpath(path) in trained]:
            raise UserError(
                "data.validation",
                repeated[0],
                "is data.train: accuracy on the problems that are trained on is not that on others",
                "give other problems, or a copy under another name if this is what you want to see",
            )
        real = list(map(os.path.realpath, validation))
        if repeated := [path for n, path in enumerate(validation) if real[n] in real[:n]]:
            rule = "stands in data.validation twice: its problems would count twice"
            raise UserError("data.validation", repeated[0], rule, "leave one of them out")
        if self.apply_chat_template is False and (self.system_prompt or self.chat_template_kwargs):
            name = "system_prompt" if self.system_prompt else "chat_template_kwargs"
            rule = "needs a chat template, and data.apply_chat_template is false"
            raise UserError(
                f"data.{name}", getattr(self, name), rule, "set data.apply_chat_template=true, or leave it out"
            )


@section
class EvalConfig:
    """Accuracy on ``data.validation``: pass@k from samples at ``temperature``, and greedy."""

    before: bool = False
    after: bool = False
    every_n_steps: NonNegativeInt = 0
    """0: never during training."""
    num_problems: PositiveInt | None = None
    """Evaluate on this many problems of each set of ``data.validation``, from the first on; null takes all."""
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
    by: list[str] = Field(default_factory=list)
    """Columns of the problems' metadata by whose values ``megatron-rl eval`` gives figures too; a dot leads into one."""
    chunk_size: PositiveInt = 64
    """Problems from one write of ``megatron-rl eval`` to the next: what a kill can cost."""
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
    with its log-probs; the other problems are ``exploration.jsonl``. ``replay`` (RLEP): of such problems, all samples that are
    right and whole."""
    problems: PathTexts | None = None
    """Problem files to sample on; null takes ``data.train``."""
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

"""Calls of the code that judges: a task's ``score``, or the function of ``data.reward``, given what it names."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

from megatron_rl import plugins
from megatron_rl.errors import UserError
from megatron_rl.tasks import get_task
from megatron_rl.types import FinishReason, Problem

FIELD = "data.reward"


class Attempt(NamedTuple):
    """A response to a problem."""

    problem: Problem
    response: str
    """Decoded, without special tokens."""
    finish_reason: FinishReason = "stop"
    """``length``: cut at the limit."""


def _as_turn(attempt: Attempt) -> list[dict[str, str]]:
    return [{"role": "assistant", "content": attempt.response}]


OFFERED: dict[str, Callable[[Attempt], Any]] = {
    "problem": lambda attempt: attempt.problem,
    "prompt": lambda attempt: list(attempt.problem.messages or ()) or attempt.problem.prompt,
    "question": lambda attempt: attempt.problem.question,
    "response": lambda attempt: attempt.response,
    "completion": lambda attempt: _as_turn(attempt) if attempt.problem.messages is not None else attempt.response,
    "answer": lambda attempt: attempt.problem.answer,
    "metadata": lambda attempt: dict(attempt.problem.metadata),
    "finish_reason": lambda attempt: attempt.finish_reason,
}
"""Arguments by name, besides the columns of the metadata."""
PLURALS = {
    "problems": "problem", "prompts": "prompt", "questions": "question", "responses": "response", "answers": "answer",
    "completions": "completion", "finish_reasons": "finish_reason",
}  # fmt: skip
"""Arguments of a function that judges many at once; ``metadata`` and columns come as lists then."""
ALIASES = {"solution_str": "response", "ground_truth": "answer"}
"""Names that verl's rewards give their arguments. TRL's take ``completions``: messages where the prompts are."""
_TAKERS = OFFERED | {name: OFFERED[single] for name, single in {**PLURALS, **ALIASES}.items()}
RESPONSES = frozenset({"response", "completion", "problem", "responses", "completions"})


@dataclass(frozen=True)
class Verifier:
    """A function that judges, and how it is called."""

    function: Callable[..., Any]
    names: tuple[str, ...]
    """Arguments that it takes, all by name."""
    takes_all: bool
    """True for one with ``**kwargs``."""
    takes_many: bool
    """True for one that judges several responses in a call."""
    is_async: bool
    kwargs: Mapping[str, Any]
    """Further arguments, of ``data.reward_kwargs``."""
    required: frozenset[str] = frozenset()
    """Arguments that must be columns of the metadata."""
    path: str = ""
    """Names the function in errors."""

    @property
    def judges_together(self) -> bool:
        """Several responses are judged at the same time."""
        return self.takes_many or self.is_async

    def call(self, attempts: Sequence[Attempt]) -> Any:
        """Call the function: for one attempt, unless it ``takes_many``."""
        columns = attempts[0].problem.metadata
        names: Iterable[str] = self.names
        if self.takes_all:
            names = dict.fromkeys((*names, *(PLURALS if self.takes_many else OFFERED), "metadata", *columns))
        given = {name: self._value(name, attempts) for name in names if name in _TAKERS or name in columns}
        return self.function(**given, **self.kwargs)

    def _value(self, name: str, attempts: Sequence[Attempt]) -> Any:
        take = _TAKERS.get(name)
        if not self.takes_many:
            return attempts[0].problem.metadata[name] if take is None else take(attempts[0])
        if take is None:
            return [attempt.problem.metadata.get(name) for attempt in attempts]
        return [take(attempt) for attempt in attempts]

    def check_columns(self, problem: Problem) -> None:
        """Check that the columns that the function asks for are there.

        Raises:
            UserError: one is not.
        """
        if missing := sorted(self.required - set(problem.metadata)):
            there = ", ".join(problem.metadata) or "none"
            raise UserError(
                FIELD,
                self.path,
                f"takes {missing[0]!r}, which is neither offered ({', '.join(OFFERED)}) nor a column of {problem.source}, "
                f"whose other columns are: {there}",
                f"rename this argument, give it a default, or set data.reward_kwargs.{missing[0]}",
            )


def as_verifier(function: Callable[..., Any], path: str, kwargs: Mapping[str, Any]) -> Verifier:
    """Look at the arguments of a function.

    Args:
        function: judges.
        path: names it in errors.
        kwargs: of ``data.reward_kwargs``.

    Raises:
        UserError: it cannot be called by name, takes no response, or does not take the further arguments.
    """
    parameters = inspect.signature(function).parameters
    kinds = inspect.Parameter
    by_name = [p for p in parameters.values() if p.kind in (kinds.POSITIONAL_OR_KEYWORD, kinds.KEYWORD_ONLY)]
    takes_all = any(p.kind is kinds.VAR_KEYWORD for p in parameters.values())
    if any(p.kind is kinds.POSITIONAL_ONLY for p in parameters.values()):
        raise UserError(FIELD, path, "has arguments without a name", "leave out the / in its signature")
    names = tuple(p.name for p in by_name if p.name not in kwargs)
    known = {ALIASES.get(name, name) for name in names}
    takes_many = bool(known & set(PLURALS))
    if not known & RESPONSES and not takes_all:
        raise UserError(
            FIELD,
            path,
            f"takes {', '.join(names) or 'nothing'}, none of which is a response",
            f"name its arguments as what they are to be: {', '.join(OFFERED)}; or responses, for many at once",
        )
    if not takes_all and (unknown := [name for name in kwargs if name not in parameters]):
        raise UserError(
            "data.reward_kwargs", unknown[0], f"is no argument of {path}", f"it takes {', '.join(parameters)}"
        )
    mixed = known & set(OFFERED) - {"metadata"} if takes_many else set()
    if mixed:
        rule = f"takes {', '.join(sorted(mixed))} of one response, and others of many"
        raise UserError(FIELD, path, rule, f"name them {', '.join(f'{name}s' for name in sorted(mixed))}")
    required = {p.name for p in by_name if p.default is kinds.empty and p.name in names}
    required -= {name for name in required if ALIASES.get(name, name) in {*OFFERED, *PLURALS}}
    return Verifier(
        function, names, takes_all, takes_many, inspect.iscoroutinefunction(function), kwargs, frozenset(required), path
    )


def get_reward(path: str, kwargs: Mapping[str, Any] | None = None) -> Verifier:
    """Import the function of ``data.reward``.

    Raises:
        UserError: there is none, or it cannot be called with what there is.
    """
    function = plugins.load(path, field=FIELD, what="a reward")
    if not callable(function) or isinstance(function, type):
        rule = f"is {plugins.kind_of(function)}, not a function"
        raise UserError(FIELD, path, rule, "name a function f(response, answer, ...) that returns a number")
    return as_verifier(function, path, kwargs or {})


def find_verifier(task_name: str, reward: str | None, kwargs: Mapping[str, Any]) -> Verifier:
    """Return what judges a task's problems: ``reward`` if there is one, else the task's ``score``.

    Raises:
        UserError: there is no such task, or no such function, or it does not take the arguments.
    """
    if reward is not None:
        return get_reward(reward, kwargs)
    return as_verifier(get_task(task_name).score, f"the score of task {task_name}", kwargs)

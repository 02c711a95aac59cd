"""Problems as token ids: prompts to sample on, and worked solutions to learn from; all at once, or each when its turn comes."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, Literal

import torch

from megatron_rl.config.data import DataConfig
from megatron_rl.errors import UserError, described
from megatron_rl.types import Problem, Prompt, RowKind, TrainingSample


class PromptMaker:
    """Makes prompts of problems: chat template, token ids, room for a response."""

    def __init__(self, tokenizer: Any, config: DataConfig, *, context_length: int, max_new_tokens: int) -> None:
        """Take what all prompts share.

        Args:
            tokenizer: a transformers tokenizer.
            config: chat template, ``max_prompt_tokens``, ``overlong_prompts``.
            context_length: tokens that the model can hold.
            max_new_tokens: tokens that a response may take.
        """
        self._tokenizer, self._config = tokenizer, config
        self._context_length, self._max_new_tokens = context_length, max_new_tokens
        limit = context_length - max_new_tokens
        self.limit = limit if config.max_prompt_tokens is None else min(limit, config.max_prompt_tokens)
        """Tokens of the longest prompt."""

    def make(self, problems: Sequence[Problem]) -> list[Prompt | None]:
        """Return a prompt of each problem; None for one that is left out, since it is too long.

        Raises:
            UserError: a prompt is empty, or is too long and ``overlong_prompts`` is ``error``; there is no chat template, or it
                fails.
        """
        return [self._checked(problem, ids) for problem, ids in zip(problems, self._encode(problems))]

    def _checked(self, problem: Problem, ids: list[int]) -> Prompt | None:
        if not ids:
            raise UserError(problem.source, problem.prompt, "becomes no token at all", "give the prompt some text")
        if len(ids) <= self.limit:
            return Prompt(problem, torch.tensor(ids, dtype=torch.int64))
        if self._config.overlong_prompts == "drop":
            return None
        raise UserError(
            problem.source,
            f"{len(ids)} prompt tokens",
            f"more than {self.limit}, so the prompt fills the context of {self._context_length} tokens with "
            f"{self._max_new_tokens} new ones",
            "shorten it, lower rollout.max_new_tokens, or set data.overlong_prompts=drop",
        )

    def _encode(self, problems: Sequence[Problem]) -> list[list[int]]:
        texts = [problem.prompt for problem in problems if not self._is_chat(problem)]
        encoded = iter(self._tokenizer(texts)["input_ids"] if texts else [])
        return [self._encode_chat(problem) if self._is_chat(problem) else next(encoded) for problem in problems]

    def _is_chat(self, problem: Problem) -> bool:
        asked = self._config.apply_chat_template
        if problem.messages is not None and asked is False:
            rule = f"is false, and {problem.source} has chat messages"
            raise UserError("data.apply_chat_template", False, rule, "leave it out, or give prompts as texts")
        return problem.messages is not None or bool(asked)

    def _encode_chat(self, problem: Problem) -> list[int]:
        config = self._config
        if self._tokenizer.chat_template is None:
            raise _no_template(problem)
        messages = list(problem.messages or ({"role": "user", "content": problem.prompt},))
        if config.system_prompt is not None and messages[0]["role"] != "system":
            messages.insert(0, {"role": "system", "content": config.system_prompt})
        try:
            return self._tokenizer.apply_chat_template(
                messages,
                tools=problem.tools,
                add_generation_prompt=True,
                tokenize=True,
                return_dict=False,
                **config.chat_template_kwargs,
            )
        except Exception as error:  # templates are programs of the model's authors, and raise what they like
            raise UserError(
                problem.source,
                [message["role"] for message in messages],
                f"the tokenizer's chat template refuses these messages ({described(error)})",
                "change the messages, data.system_prompt or data.chat_template_kwargs, or use another tokenizer",
            ) from error


def _no_template(problem: Problem) -> UserError:
    fix = "use the tokenizer of an instruct model (policy.tokenizer_path), or prompts as texts"
    if problem.messages is None:
        return UserError("data.apply_chat_template", True, "the tokenizer has no chat template", fix)
    return UserError(problem.source, None, "has chat messages, and the tokenizer has no chat template", fix)


def tokenize_prompts(
    problems: Sequence[Problem], maker: PromptMaker, *, field: str = "data.train"
) -> tuple[list[Prompt], int]:
    """Make the prompts of all problems at once.

    Args:
        problems: in file order.
        maker: makes them.
        field: config key of the files, for the error when no prompt is left.

    Returns:
        The prompts, and how many were dropped for their length.

    Raises:
        UserError: as ``PromptMaker.make``, or no prompt is left.
    """
    prompts = [prompt for prompt in maker.make(problems) if prompt is not None]
    if not prompts:
        raise UserError(field, None, "no prompt is left after dropping long ones", "raise the limits")
    return prompts, len(problems) - len(prompts)


class LazyPrompts(Sequence[Prompt | None]):
    """Prompts of more problems than are kept: each is made when it is asked for, None where it is left out."""

    def __init__(self, problems: Sequence[Problem], maker: PromptMaker, check: Callable[[Problem], None]) -> None:
        """Take the problems; ``check`` raises for one that cannot be used."""
        self._problems, self.maker, self._check = problems, maker, check

    def __len__(self) -> int:
        return len(self._problems)

    def __getitem__(self, index: Any) -> Any:
        problem = self._problems[index]
        self._check(problem)
        return self.maker.make([problem])[0]


class SupervisedRowMaker:
    """Makes supervised rows: prompt, worked solution, end of sequence."""

    def __init__(
        self, tokenizer: Any, *, stop_id: int, context_length: int, overlong: Literal["error", "drop"] = "error"
    ) -> None:
        """Take what all rows share.

        Args:
            tokenizer: a transformers tokenizer.
            stop_id: token that ends a row.
            context_length: tokens that the model can hold.
            overlong: what becomes of a row that does not fit, as in ``data.overlong_prompts``.
        """
        self._tokenizer, self._stop_id = tokenizer, stop_id
        self._context_length, self._overlong = context_length, overlong

    def make(self, prompts: Sequence[Prompt]) -> list[TrainingSample | None]:
        """Return a row of each prompt; None for one that is left out, since it is too long.

        Raises:
            UserError: a problem has no solution, or a row does not fit and ``overlong`` is ``error``.
        """
        for prompt in prompts:
            if not prompt.problem.solution:
                raise UserError(
                    prompt.problem.source,
                    None,
                    "has no worked solution to learn from",
                    "use a file that has solutions, or name their column: data.fields.solution=COLUMN",
                )
        solutions = [prompt.problem.solution for prompt in prompts]
        encoded = self._tokenizer(solutions, add_special_tokens=False)["input_ids"] if prompts else []
        return [self._checked(prompt, ids) for prompt, ids in zip(prompts, encoded)]

    def _checked(self, prompt: Prompt, ids: list[int]) -> TrainingSample | None:
        length = len(prompt.prompt_ids) + len(ids) + 1
        if length <= self._context_length:
            return TrainingSample(prompt.prompt_ids, torch.tensor([*ids, self._stop_id]), RowKind.SFT)
        if self._overlong == "drop":
            return None
        raise UserError(
            prompt.problem.source,
            f"{length} tokens",
            f"prompt and solution exceed the context of {self._context_length} tokens",
            "remove or shorten the row, or set data.overlong_prompts=drop",
        )


def demonstrations(prompts: Sequence[Prompt], maker: SupervisedRowMaker) -> tuple[list[TrainingSample], int]:
    """Make the supervised rows of all prompts at once.

    Returns:
        The rows, and how many were dropped for their length.

    Raises:
        UserError: as ``SupervisedRowMaker.make``, or no row is left.
    """
    rows = [row for row in maker.make(prompts) if row is not None]
    if not rows:
        raise UserError("data.train", None, "no row is left after dropping long ones", "give problems that fit")
    return rows, len(prompts) - len(rows)


class LazyDemonstrations(Sequence[TrainingSample | None]):
    """Supervised rows of more prompts than are kept: each is made when it is asked for, None where it is left out."""

    def __init__(self, prompts: LazyPrompts, maker: SupervisedRowMaker) -> None:
        """Take the prompts."""
        self._prompts, self._maker = prompts, maker

    def __len__(self) -> int:
        return len(self._prompts)

    def __getitem__(self, index: Any) -> Any:
        prompt = self._prompts[index]
        return None if prompt is None else self._maker.make([prompt])[0]

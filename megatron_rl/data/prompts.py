"""Problems as token ids: prompts to sample on, and worked solutions to learn from."""

from __future__ import annotations

import logging
from collections.abc import Sequence
from typing import Any, Literal

import torch

from megatron_rl.config.data import DataConfig
from megatron_rl.errors import UserError
from megatron_rl.types import Problem, Prompt, RowKind, TrainingSample

logger = logging.getLogger(__name__)


def tokenize_prompts(
    problems: Sequence[Problem],
    tokenizer: Any,
    config: DataConfig,
    *,
    context_length: int,
    max_new_tokens: int,
    field: str = "data.train",
) -> tuple[list[Prompt], int]:
    """Turn problems into prompts that leave room for a response.

    Args:
        problems: in file order.
        tokenizer: a transformers tokenizer.
        config: ``apply_chat_template``, ``max_prompt_tokens``, ``overlong_prompts``.
        context_length: tokens that the model can hold.
        max_new_tokens: tokens that a response may take.
        field: config key of the file, for the error when no prompt is left.

    Returns:
        The prompts, and how many were dropped for their length.

    Raises:
        UserError: a prompt is empty, or is too long and ``overlong_prompts`` is ``error``.
    """
    limit = context_length - max_new_tokens
    if config.max_prompt_tokens is not None:
        limit = min(limit, config.max_prompt_tokens)
    prompts: list[Prompt] = []
    dropped = 0
    for problem, ids in zip(problems, _encode(problems, tokenizer, config.apply_chat_template)):
        if not ids:
            raise UserError(problem.source, problem.prompt, "becomes no token at all", "give the prompt some text")
        if len(ids) > limit:
            if config.overlong_prompts == "drop":
                dropped += 1
                continue
            raise UserError(
                problem.source,
                f"{len(ids)} prompt tokens",
                f"more than {limit}, so the prompt fills the context of {context_length} tokens with "
                f"{max_new_tokens} new ones",
                "shorten it, lower rollout.max_new_tokens, or set data.overlong_prompts=drop",
            )
        prompts.append(Prompt(problem, torch.tensor(ids, dtype=torch.int64)))
    if not prompts:
        raise UserError(field, None, "no prompt is left after dropping long ones", "raise the limits")
    return prompts, dropped


def demonstrations(
    prompts: Sequence[Prompt],
    tokenizer: Any,
    *,
    stop_id: int,
    context_length: int,
    overlong: Literal["error", "drop"] = "error",
) -> list[TrainingSample]:
    """Make supervised rows: prompt, worked solution, end of sequence.

    Args:
        prompts: with problems that have a solution.
        tokenizer: a transformers tokenizer.
        stop_id: token that ends a row.
        context_length: tokens that the model can hold.
        overlong: what becomes of a row that does not fit, as in ``data.overlong_prompts``; how many were dropped is logged.

    Raises:
        UserError: a problem has no solution; a row does not fit the context and ``overlong`` is ``error``; no row is left.
    """
    for prompt in prompts:
        if not prompt.problem.solution:
            source = prompt.problem.source
            raise UserError(source, None, "has no worked solution to learn from", "use a file that has solutions")
    encoded = tokenizer([prompt.problem.solution for prompt in prompts], add_special_tokens=False)["input_ids"]
    samples = []
    for prompt, ids in zip(prompts, encoded):
        length = len(prompt.prompt_ids) + len(ids) + 1
        if length > context_length and overlong == "drop":
            continue
        if length > context_length:
            raise UserError(
                prompt.problem.source,
                f"{length} tokens",
                f"prompt and solution exceed the context of {context_length} tokens",
                "remove or shorten the row, or set data.overlong_prompts=drop",
            )
        samples.append(TrainingSample(prompt.prompt_ids, torch.tensor([*ids, stop_id]), RowKind.SFT))
    if not samples:
        raise UserError("data.train", None, "no row is left after dropping long ones", "give problems that fit")
    if len(samples) < len(prompts):
        logger.warning(
            "%d of %d rows are left out, prompt and solution are too long", len(prompts) - len(samples), len(prompts)
        )
    return samples


def _encode(problems: Sequence[Problem], tokenizer: Any, apply_chat_template: bool) -> list[list[int]]:
    if apply_chat_template:
        if tokenizer.chat_template is None:
            raise UserError(
                "data.apply_chat_template",
                True,
                "the tokenizer has no chat template",
                "set it to false, or use another tokenizer",
            )
        return [
            tokenizer.apply_chat_template(
                [{"role": "user", "content": p.prompt}], add_generation_prompt=True, tokenize=True, return_dict=False
            )
            for p in problems
        ]
    return tokenizer([p.prompt for p in problems])["input_ids"]

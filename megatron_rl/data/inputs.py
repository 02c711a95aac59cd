"""Inputs: what a run reads before it builds anything (tokenizer, problems, their order, stored samples), checked to fit."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

from megatron_rl.config import Config
from megatron_rl.config.data import validation_key
from megatron_rl.convert.architecture.shape import read_shape
from megatron_rl.data.limits import row_limit
from megatron_rl.data.origin import digest_of_fingerprints, random_model_digest, tokenizer_digest, weight_fingerprints
from megatron_rl.data.pack import pack_layout, too_long
from megatron_rl.data.pool import Pool, PoolNeed
from megatron_rl.data.prompts import (
    LazyDemonstrations,
    LazyPrompts,
    PromptMaker,
    SupervisedRowMaker,
    demonstrations,
    tokenize_prompts,
)
from megatron_rl.data.rehearsal import probe_rows
from megatron_rl.data.stream import Stream
from megatron_rl.data.tokenizer import load_tokenizer, stop_ids
from megatron_rl.errors import UserError
from megatron_rl.parallel.agree import all_ranks_agree, gather_json
from megatron_rl.parallel.groups import Groups
from megatron_rl.tasks.problems import Problems, check_answer, open_problems
from megatron_rl.types import Prompt, TrainingSample

Say = Callable[[str], None]


class Inputs:
    """The same on every rank.

    Args:
        config: of the run.
        groups: process groups; where a rank cannot read something, all raise.
        say: prints a line for the user, on one rank.

    Raises:
        UserError: a file is wrong, or a row will not fit; on all ranks.
    """

    def __init__(self, config: Config, groups: Groups, say: Say) -> None:
        self._config, self._groups, self._say = config, groups, say
        policy = config.policy
        with all_ranks_agree(groups.cpu_group):
            self.shape = read_shape(policy.model_dir)
            self.tokenizer = load_tokenizer(policy.tokenizer_dir, self.shape)
            self._load_problems()
            if config.data.train is not None:
                self._check_budget()
        self.probes: list[TrainingSample] = []
        """Rows of ``eval.pool``."""
        self.pool_contents: dict[str, tuple[str, str]] = {}
        """Config key of a pool that is trained on -> its directory, and a digest of what is in it."""

    # ---- problems

    def _load_problems(self) -> None:
        config, data = self._config, self._config.data
        seed, new_tokens = config.trainer.seed, config.rollout.max_new_tokens
        self.prompts: Stream[Prompt] = Stream([], seed, data.shuffle)
        """Prompts that an online run samples on."""
        self.demonstrations: Stream[TrainingSample] = Stream([], seed, data.shuffle)
        """Rows that a supervised run learns from."""
        self.held_out: dict[str, list[Prompt]] = {}
        """Prompts of each held-out set, by its name; ``""`` is that of a set without one."""
        self._is_chat = False
        is_online = config.trainer.stage == "rl"
        prompts: Sequence[Prompt | None] = []
        if data.train is not None:
            prompts = self._prompts_of("data.train", data.train, new_tokens if is_online else 1, is_judged=is_online)
        for name, files in data.held_out.items() if config.eval.is_used else ():
            at_most = config.eval.num_problems
            found = self._prompts_of(validation_key(name), files, new_tokens, is_judged=True, at_most=at_most)
            self.held_out[name] = [prompt for prompt in found if prompt is not None]
        self.stop_ids = stop_ids(
            self.tokenizer, self.shape, config.policy.model_dir, is_chat=self._is_chat, say=self._say
        )
        """Token ids that end a response; demonstrations end with the first."""
        if is_online:
            self.prompts.items = prompts
        else:
            self.demonstrations.items = self._rows_of(prompts)

    def _prompts_of(
        self, field: str, files: Sequence[str], max_new_tokens: int, *, is_judged: bool, at_most: int | None = None
    ) -> Sequence[Prompt | None]:
        """Open problem files; many problems become ``LazyPrompts``, unless only ``at_most`` of them are wanted."""
        data = self._config.data
        needs_answer = is_judged and data.reward is None
        problems = open_problems(
            data.task,
            files,
            template=data.template,
            fields=data.fields,
            field=field,
            split="train" if field == "data.train" else "test",
            say=self._say,
        )
        is_chat = bool(data.apply_chat_template) or problems[0].messages is not None
        self._is_chat = self._is_chat or is_chat
        if data.apply_chat_template is None and not is_chat and self.tokenizer.chat_template is not None:
            self._say(
                f"{field}: prompts are texts, and the model reads them as they are. data.apply_chat_template=true wraps "
                "each in the tokenizer's chat template, as instruct models want it; with false this note is not said"
            )
        is_lazy = isinstance(problems, Problems) and at_most is None
        # Lengths of rows that are not read yet are unknown: what a micro-batch has no room for is too long then.
        context_length = row_limit(self._config) if is_lazy else self.shape.max_position_embeddings
        maker = PromptMaker(self.tokenizer, data, context_length=context_length, max_new_tokens=max_new_tokens)
        if is_lazy:
            self._say(f"{field}: {len(problems)} rows, each read when its turn comes")
            return LazyPrompts(problems, maker, check_answer if needs_answer else lambda _: None)
        wanted = [problems[index] for index in range(len(problems))[:at_most]]
        for problem in wanted if needs_answer else ():
            check_answer(problem)
        prompts, dropped = tokenize_prompts(wanted, maker, field=field)
        if dropped:
            self._say(f"{field}: {dropped} of {len(wanted)} problems left out, their prompts are too long")
        return prompts

    def _rows_of(self, prompts: Sequence[Prompt | None]) -> Sequence[TrainingSample | None]:
        """Make supervised rows."""
        is_lazy = isinstance(prompts, LazyPrompts)
        maker = SupervisedRowMaker(
            self.tokenizer,
            stop_id=self.stop_ids[0],
            context_length=row_limit(self._config) if is_lazy else self.shape.max_position_embeddings,
            overlong=self._config.data.overlong_prompts,
        )
        if isinstance(prompts, LazyPrompts):
            return LazyDemonstrations(prompts, maker)
        rows, dropped = demonstrations([prompt for prompt in prompts if prompt is not None], maker)
        if dropped:
            self._say(f"data.train: {dropped} of {len(prompts)} rows left out, prompt and solution are too long")
        return rows

    @property
    def stream(self) -> Stream[Any]:
        """The prompts or rows to train on, in order."""
        return self.prompts if self._config.trainer.stage == "rl" else self.demonstrations

    @property
    def longest_request(self) -> int:
        """Tokens of the longest prompt and response that an engine will be asked for."""
        longest = max(map(_longest_prompt, (self.prompts.items, *self.held_out.values())))
        return longest + self._config.rollout.max_new_tokens

    @property
    def longest_row(self) -> int:
        """Tokens of the longest row that is trained on."""
        if self._config.trainer.stage == "rl":
            return _longest_prompt(self.prompts.items) + self._config.rollout.max_new_tokens
        rows = self.demonstrations.items
        if isinstance(rows, LazyDemonstrations):
            return row_limit(self._config)
        return max(row.num_tokens for row in rows if row is not None)

    # ---- whether rows fit

    def _check_budget(self) -> None:
        """A row that no micro-batch has room for is found before anything is built."""
        policy = self._config.policy
        longest = pack_layout(policy).padded(self.longest_row)
        if longest > policy.train_micro_batch_tokens:
            raise too_long(longest, policy.train_micro_batch_tokens)
        # Groups get as many replays as there are, so a rank can have one row more than another: it shares a micro-batch.
        is_uneven = self._config.algorithm.has_uneven_groups and self._config.row_unit > 1
        if is_uneven and 2 * longest > policy.train_micro_batch_tokens:
            raise UserError(
                "policy.train_micro_batch_tokens",
                policy.train_micro_batch_tokens,
                f"must have room for two of the longest rows, of {longest} tokens each, since groups may "
                "have unequal numbers of rows",
                f"use {2 * longest} or more, or shorter prompts and responses",
            )

    # ---- stored samples

    def open_pools(self, need: PoolNeed | None) -> None:
        """Open the pool to train on and that of ``eval.pool``, where there are such. A collective.

        Raises:
            UserError: one is missing, damaged, or of another model or tokenizer; on all ranks.
        """
        probed = self._config.eval.pool if self._config.eval.is_used else None
        model = self.model_digest() if need is not None and need.of_this_model else None
        with all_ranks_agree(self._groups.cpu_group):
            if need is not None:
                pool = Pool(need.directory, model_digest=model, tokenizer_digest=tokenizer_digest(self.tokenizer))
                self._say(need.use(pool, [prompt for prompt in self.prompts.items if prompt is not None]))
                self.pool_contents[need.field] = (need.directory, pool.digest())
            if probed is not None:
                pool = Pool(probed, tokenizer_digest=tokenizer_digest(self.tokenizer))
                self.probes = probe_rows(pool, self._config)

    def model_digest(self) -> str:
        """Return a digest of the weights that the policy starts from. A collective: each rank reads a share."""
        policy, groups = self._config.policy, self._groups
        directory, is_random = policy.model_dir, policy.initialization == "random"
        with all_ranks_agree(groups.cpu_group):
            if is_random:
                return random_model_digest(directory, self._config.trainer.seed)
            mine = weight_fingerprints(directory, rank=groups.rank, num_ranks=groups.world_size)
        return digest_of_fingerprints(gather_json(mine, groups.cpu_group))


def _longest_prompt(prompts: Sequence[Prompt | None]) -> int:
    """Return the tokens of the longest prompt; where they are not kept, the limit."""
    if isinstance(prompts, LazyPrompts):
        return prompts.maker.limit
    return max((len(prompt.prompt_ids) for prompt in prompts if prompt is not None), default=0)

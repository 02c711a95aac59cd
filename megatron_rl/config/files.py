"""Checks of what a config points at: model directory, tokenizer, problem files. Still without torch."""

from __future__ import annotations

import os
from collections.abc import Callable
from pathlib import Path

from megatron_rl import plugins
from megatron_rl.config import upstream
from megatron_rl.config.data import validation_key
from megatron_rl.config.methods import settings_code
from megatron_rl.config.policy import PolicyConfig
from megatron_rl.config.schema import Config
from megatron_rl.convert.architecture.hub import fetch_small_files, fetch_weights, hub_name
from megatron_rl.convert.architecture.shape import ModelShape, read_shape
from megatron_rl.convert.architecture.weight_files import (
    WEIGHT_FILES,
    check_weight_files,
    is_lfs_pointer,
    refuse_gguf,
)
from megatron_rl.errors import UserError
from megatron_rl.tasks import get_task
from megatron_rl.tasks.problems import check_answer, layout_of, problem_of, takes_layouts
from megatron_rl.tasks.reward import find_verifier
from megatron_rl.tasks.rows.open import check_lines, first_row
from megatron_rl.tasks.rows.spec import parse_spec

MODEL, TOKENIZER = "policy.model_path", "policy.tokenizer_path"
_NUM_LINES = 10_000
"""Lines of a file that are parsed: some tenths of a second."""
_TOKENIZER_FILES = ("tokenizer.json", "tokenizer.model", "vocab.json")


def check_files(
    config: Config,
    *,
    fetches: bool = False,
    starts: bool = True,
    is_trained: bool = True,
    say: Callable[[str], None] = lambda _: None,
) -> None:
    """Open what the run will need and check that it fits the layout, so that a mistake costs a second and not a queue slot.

    Args:
        config: of the run.
        fetches: models that are named as on the Hugging Face hub are downloaded, weights after all other checks.
        starts: the run starts here and now. Else SGLang may be missing, and weights of the hub are not downloaded.
        is_trained: False for a program that needs no problems to train on.
        say: is told the layout of each problem file.

    Raises:
        UserError: naming the config key whose path or size is wrong.
    """
    policy = config.policy
    check_names(config)
    if is_trained and config.data.train is None:
        fix = "give data.train=FILE; megatron-rl eval MODEL evaluates without training"
        raise UserError("data.train", None, "there must be problems to train on", fix)
    if config.rollout.starts_servers and starts:
        upstream.check_sglang_is_here(is_colocated=config.rollout.is_colocated)
    _check_writable(config.exp_manager.run_dir)
    if fetches:
        fetch_small_files(policy.model_path, field=MODEL)
        if policy.tokenizer_path is not None:
            fetch_small_files(policy.tokenizer_path, field=TOKENIZER)
    read_model_shape(config)
    _check_tokenizer(policy)
    is_pretrained = policy.initialization == "pretrained"
    if is_pretrained and hub_name(policy.model_path) is None:
        _check_weights(policy)
    check_problem_files(config, say)
    baseline = config.eval.baseline if config.eval.is_used else None
    if baseline is not None and not Path(baseline).is_file():
        raise UserError("eval.baseline", baseline, "is not a file", "give the eval/step_*.json of a run")
    for key, pool in stored_pools(config).items():
        if not Path(pool).is_dir():
            raise UserError(key, pool, "is not a directory", "make the pool first: megatron-rl presample CONFIG")
    recorded = config.rollout.recorded_dir
    if recorded is not None and not Path(recorded).is_dir():
        raise UserError(
            "rollout.recorded_dir", recorded, "is not a directory", "give the rollouts/ folder of a recorded run"
        )
    if is_pretrained and starts and hub_name(policy.model_path) is not None:
        if fetches:
            fetch_weights(policy.model_path, field=MODEL)
        _check_weights(policy)


def _check_tokenizer(policy: PolicyConfig) -> None:
    """Check that there is a tokenizer which transformers loads without code from its folder."""
    folder = policy.tokenizer_dir
    key = TOKENIZER if policy.tokenizer_path else MODEL
    found = next((folder / name for name in _TOKENIZER_FILES if (folder / name).is_file()), None)
    fix = "point policy.tokenizer_path at a directory that has one"
    if found is None and any(folder.glob("*tiktoken*")):
        rule = "has a tokenizer of tiktoken with code of its own, which is not run"
        raise UserError(key, str(folder), rule, f"turn it into tokenizer.json once (docs/models.md), and {fix}")
    if found is None:
        raise UserError(key, str(folder), "holds no tokenizer", fix)
    if is_lfs_pointer(found):
        raise UserError(str(found), None, "is a git-lfs pointer, not the file", "download it again")


def _check_weights(policy: PolicyConfig) -> None:
    """Check that the files of the weights are there and whole."""
    folder = policy.model_dir
    if not any((folder / name).exists() for name in WEIGHT_FILES):
        refuse_gguf(folder, MODEL)
        raise UserError(
            MODEL,
            str(folder),
            "holds no weights, neither model.safetensors nor pytorch_model.bin nor an index of several files",
            "give a directory with weights, or set policy.initialization=random to start from nothing",
        )
    check_weight_files(folder)


def check_problem_files(config: Config, say: Callable[[str], None]) -> None:
    """Look at the first row of each problem file: it is there, its columns are what the config says or known ones, and it has
    an answer where the task compares with one.

    Of lines of JSON the first thousands are parsed. Folders and sets on the hub are opened later.

    Raises:
        UserError: naming the config key, or the file.
    """
    data = config.data
    task = get_task(data.task)
    verifier = find_verifier(data.task, data.reward, data.reward_kwargs)
    held_out = {validation_key(name): files for name, files in data.held_out.items()}
    for key, texts in {"data.train": data.train or [], **held_out}.items():
        specs = [parse_spec(text, key) for text in texts]
        rows = {text: row for text, spec in zip(texts, specs) if (row := first_row(spec)) is not None}
        if rows and not data.fields and takes_layouts(task):
            layout_of(list(rows.values()), list(rows), key, say)
        for text, spec in zip(texts, specs):
            if (row := rows.get(text)) is not None:
                problem = problem_of(row, task, data.template, data.fields)
                verifier.check_columns(problem)
                is_judged = config.trainer.stage == "rl" if key == "data.train" else config.eval.is_used
                if is_judged and data.reward is None:
                    check_answer(problem)
            check_lines(spec, at_most=_NUM_LINES)


def check_names(config: Config) -> None:
    """Check the code that a config names: task, reward and metric sinks.

    Modules of the task and the reward are imported. They are for workers without torch, so that costs little. A sink may need
    torch: its module is only read.

    Raises:
        UserError: naming the config key.
    """
    get_task(config.data.task)
    find_verifier(config.data.task, config.data.reward, config.data.reward_kwargs)
    for sink in config.exp_manager.sinks:
        plugins.check(sink, field="exp_manager.sinks", what="a metric sink")


def stored_pools(config: Config) -> dict[str, str]:
    """The pools of stored samples that a run reads, by config key."""
    probed = {"eval.pool": config.eval.pool} if config.eval.is_used and config.eval.pool is not None else {}
    with settings_code(config.algorithm.name):
        return probed | config.algorithm.stored_pools()


def read_model_shape(config: Config) -> ModelShape:
    """The model's shape, of which only config.json is needed.

    Raises:
        UserError: it is not there, not of a kind that we know, or does not fit the layout.
    """
    directory = config.policy.model_dir
    if not directory.is_dir():
        refuse_gguf(directory, MODEL)
        fix = "give a Hugging Face checkpoint directory, or the name of a model on the hub: ORGANISATION/NAME"
        raise UserError(MODEL, str(directory), "is not a directory", fix)
    if not (directory / "config.json").exists():
        refuse_gguf(directory, MODEL)
    shape = read_shape(directory)
    check_shape(config, shape)
    return shape


def _check_writable(run_dir: Path) -> None:
    """The run's folder can be made, or written where it exists; nothing is made yet."""
    folder = next(path for path in (run_dir.absolute(), *run_dir.absolute().parents) if path.exists())
    if not folder.is_dir():
        rule, fix = f"cannot hold a run: {folder} is a file", "choose another folder"
    elif not os.access(folder, os.W_OK | os.X_OK):
        rule, fix = f"cannot hold a run: {folder} is not writable for this user", "choose another folder or its rights"
    else:
        return
    raise UserError("exp_manager.exp_dir", str(run_dir), rule, fix)


def check_shape(config: Config, shape: ModelShape) -> None:
    """Raise ``UserError`` if a model of this shape does not fit the layout or the lengths of a config."""
    policy = config.policy
    for what, length in (
        ("num_attention_heads", shape.num_attention_heads),
        ("num_key_value_heads", shape.num_key_value_heads),
        (shape.width_field, getattr(shape, shape.width_field)),
    ):
        if length % policy.tensor_parallel_size:
            raise UserError(
                "policy.megatron_cfg.tensor_model_parallel_size",
                policy.tensor_parallel_size,
                f"must divide the model's {what} = {length}",
                f"choose a divisor of {length}",
            )
    if shape.mlp_bias and config.rollout.engine == "sglang" and config.trainer.stage == "rl":
        rule = "has no layer in SGLang for this model: mlp_bias is true in its config.json"
        raise UserError("rollout.engine", "sglang", rule, "use rollout.engine=transformers")
    _check_stages(policy, shape.num_layers)
    _check_experts(config, shape)
    if config.rollout.max_new_tokens >= shape.max_position_embeddings and config.trainer.stage == "rl":
        raise UserError(
            "rollout.max_new_tokens",
            config.rollout.max_new_tokens,
            f"leaves no room for a prompt in the model's context of {shape.max_position_embeddings} tokens",
            "lower it",
        )


def _check_stages(policy: PolicyConfig, num_layers: int) -> None:
    """Check that the layers can be dealt out to the pipeline stages, and those of a stage to its virtual ones."""
    given, section = policy.megatron_cfg, "policy.megatron_cfg"
    if any(given.get(name) for name in _OWN_SPLITS):  # Megatron's own checks follow
        return
    num_stages = policy.pipeline_parallel_size
    ends = [f"num_layers_in_{end}_pipeline_stage" for end in ("first", "last")]
    sizes = {name: int(given[name]) for name in ends if given.get(name) is not None}
    rest, others = num_layers - sum(sizes.values()), num_stages - len(sizes)
    if sizes and (others < 0 or min(sizes.values()) < 1 or rest < others or (others == 0 and rest)):
        name = next(iter(sizes))
        rule = f"leaves {rest} of the model's {num_layers} layers to {others} other stages"
        raise UserError(f"{section}.{name}", sizes[name], rule, "correct it, or leave it out")
    if others and rest % others:
        what = f"num_hidden_layers = {num_layers}" if not sizes else f"other {rest} layers, between {others} stages"
        raise UserError(
            f"{section}.pipeline_model_parallel_size",
            num_stages,
            f"must divide the model's {what}",
            "choose another size",
        )
    virtual = given.get("virtual_pipeline_model_parallel_size")
    for layers in {*sizes.values(), *([rest // others] if others else [])}:
        if virtual and layers % int(virtual):
            rule = f"must divide the {layers} layers of a pipeline stage"
            raise UserError(
                f"{section}.virtual_pipeline_model_parallel_size", virtual, rule, f"choose a divisor of {layers}"
            )


_OWN_SPLITS = (
    "pipeline_model_parallel_layout", "account_for_embedding_in_pipeline_split", "account_for_loss_in_pipeline_split",
)  # fmt: skip
"""Fields by which Megatron deals layers out in other ways."""


def _check_experts(config: Config, shape: ModelShape) -> None:
    policy = config.policy
    size, field = policy.expert_parallel_size, "policy.megatron_cfg.expert_model_parallel_size"
    if size > 1 and (shape.num_experts == 0 or shape.num_experts % size):
        rule = (
            f"must divide the model's number of experts = {shape.num_experts}" if shape.num_experts else "needs experts"
        )
        raise UserError(field, size, rule, "leave it out, or choose a divisor")
    if not shape.num_experts:
        if policy.router_replay:
            raise UserError("policy.router_replay", True, "needs a model with experts", "leave it out")
        return
    expert_tensor = policy.megatron_cfg.get("expert_tensor_parallel_size") or policy.tensor_parallel_size
    ranks = config.trainer.world_size // policy.pipeline_parallel_size
    if ranks % (size * expert_tensor):
        raise UserError(
            field,
            size,
            f"times the expert tensor-parallel size {expert_tensor} must divide the ranks of a pipeline stage = {ranks}",
            "use more ranks, or smaller sizes",
        )
    if policy.tensor_parallel_size > 1 and not policy.megatron_cfg.get("sequence_parallel"):
        raise UserError(
            "policy.megatron_cfg.sequence_parallel",
            False,
            "must be true where a model with experts is trained under tensor parallelism",
            "set it",
        )

"""Wrong inputs, a row each: one line that names the field, status 2, no traceback, no torch, and well under a second.

One process runs the whole table, because starting one takes longer than a row; a few rows run as commands of their own.
"""

from __future__ import annotations

import json
import subprocess
import sys
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal, get_args, get_origin

import pytest

from megatron_rl.config.methods import METHODS
from megatron_rl.config.schema import Config

ROOT = Path(__file__).parents[3]
TINY = ROOT / "tests/tiny.yaml"
RUNNER = """
import contextlib, io, json, os, sys, time, traceback
from pathlib import Path
import typer
from megatron_rl.commands import cli
from megatron_rl.commands.verbs import run_verb
from megatron_rl.config import load_config
from megatron_rl.errors import UserError
from megatron_rl.launch import command
from megatron_rl.tasks.problems import open_problems

def passes(*_, **__):
    sys.exit("the input was taken")

def load(path, *overrides):  # as each rank does
    config = load_config(path, overrides)
    try:
        open_problems(config.data.task, config.data.train, template=config.data.template)
    except UserError as error:
        print(f"error: {error}", file=sys.stderr)
        sys.exit(2)

command.start = passes
cli.app = typer.main.get_command(cli.app)  # which is built for each call otherwise
for row in json.load(sys.stdin):
    os.chdir(row["folder"])
    out, err, status, before = io.StringIO(), io.StringIO(), None, time.process_time()
    with contextlib.redirect_stdout(out), contextlib.redirect_stderr(err):
        try:
            if row["verb"] == "load":
                load(*row["arguments"])
            sys.argv = ["megatron-rl", row["verb"], *row["arguments"]]
            status = run_verb(cli.app)
        except SystemExit as error:
            status = error.code
        except BaseException:
            traceback.print_exc(file=err)
    seconds, has_torch = time.process_time() - before, "torch" in sys.modules
    print(json.dumps([status, out.getvalue(), err.getvalue(), seconds, has_torch]), flush=True)
"""
SGLANG = "rollout.engine=sglang"
NO_TENSORS = (2).to_bytes(8, "little") + b"{}"
"""A safetensors file."""
MODEL = {
    "model_type": "qwen3", "architectures": ["Qwen3ForCausalLM"], "num_hidden_layers": 2, "hidden_size": 64,
    "num_attention_heads": 4, "num_key_value_heads": 2, "head_dim": 16, "intermediate_size": 128, "vocab_size": 128,
    "max_position_embeddings": 512, "rms_norm_eps": 1e-6, "layer_types": ["full_attention"] * 2,
}  # fmt: skip


@dataclass(frozen=True)
class Row:
    """One wrong input."""

    named: str
    """What the line names first: a key, a file."""
    overrides: tuple[str, ...] = ()
    words: str = ""
    """A part of the line."""
    config: str | bytes | None = None
    """Text of the config file, in place of tests/tiny.yaml."""
    train: str | bytes = '{"question": "q", "answer": "#### 1"}\n'
    model: dict[str, Any] = field(default_factory=dict)
    """Changes of config.json."""
    verb: Literal["check", "train", "load"] = "check"


def overridden(*rows: tuple[str | Sequence[str], str]) -> list[Row]:
    """Rows of ``key=value`` (the last, where there are several) and a part of the line."""
    made = []
    for given, words in rows:
        overrides = (given,) if isinstance(given, str) else tuple(given)
        made.append(Row(overrides[-1].partition("=")[0], overrides, words))
    return made


# ---- each field of the schema, with values of other kinds

KINDS: dict[object, tuple[str, ...]] = {
    int: ("many", "true", "[1]", "{a: 1}", "1.5", "1e30", "'1:30'"),
    float: ("many", "true", "[1]", "{a: 1}", ".nan", ".inf", "1e300"),
    bool: ("maybe", "5", "[true]"),
    str: ("5", "true", "[a]", "{a: b}"),
    list: ("5", "{a: 1}", "text"),
    dict: ("5", "[1]", "text"),
    Literal: ("nonsense", "5", "[a]"),
}


TEXT_OR_LIST = {"data.train", "data.validation", "presample.problems"}


def kind_of(annotation: Any) -> object:
    """The kind of a field, ``None`` and bounds aside."""
    parts = [part for part in get_args(annotation) if part is not type(None)]
    if get_origin(annotation) in (list, dict, Literal):
        return get_origin(annotation)
    return kind_of(parts[0]) if parts else annotation


def fields_of(section: Any, key: str) -> Iterator[tuple[str, object]]:
    """All keys below one, with their kinds."""
    for name, info in section.__pydantic_fields__.items():
        inner, kind = f"{key}.{name}", kind_of(info.annotation)
        if hasattr(kind, "__pydantic_fields__"):
            yield inner, dict
            yield from fields_of(kind, inner)
        else:
            yield inner, kind


def rows_of_kinds() -> Iterator[Row]:
    """One wrong value for every field, in turn, so that each kind meets all of them."""
    fields = [
        pair
        for name, info in Config.__pydantic_fields__.items()
        if name != "algorithm"
        for pair in ((name, dict), *fields_of(info.annotation, name))
    ]
    fields += [pair for pair in fields_of(METHODS["grpo"], "algorithm") if pair[0] != "algorithm.name"]
    for number, (key, kind) in enumerate(fields):
        values = KINDS[list][:2] if key in TEXT_OR_LIST else KINDS[kind]
        yield Row(key, (f"{key}={values[number % len(values)]}",))


# ---- values out of bounds

BOUNDS = overridden(
    ("trainer.max_steps=0", "greater than 0"),
    ("trainer.max_steps=-1", "greater than 0"),
    ("trainer.max_steps=1e20", "maximum size"),
    ("trainer.max_steps=9223372036854775808", "64 bits"),
    ("trainer.seed=-1", "greater than or equal to 0"),
    ("trainer.seed=4294967296", "less than or equal to 4294967295"),
    ("trainer.seed=9223372036854775808", "less than or equal to"),
    ("trainer.seed=1e20", "maximum size"),
    ("trainer.devices=0", "greater than or equal to 1"),
    ("trainer.devices=100000", "less than or equal to 1024"),
    ("trainer.threads_per_rank=1000000", "less than or equal to 1024"),
    ("trainer.threads_per_rank=-1", "greater than or equal to 0"),
    ("trainer.num_nodes=0", "greater than 0"),
    ("trainer.timeout_s=1e30", "less than or equal to 2000000"),
    ("trainer.timeout_s=1e10", "less than or equal to 2000000"),
    ("trainer.timeout_s=1e-9", "greater than or equal to 1"),
    ("trainer.timeout_s=0", "greater than"),
    ("trainer.hang_timeout_s=1e-9", "greater than or equal to 0.001"),
    ("trainer.hang_timeout_s=1e10", "less than or equal to"),
    ("trainer.numerics.max_underflow_frac=1.5", "less than or equal to 1"),
    ("data.scoring_timeout_s=1e30", "less than or equal to"),
    ("data.scoring_timeout_s=-1", "greater than"),
    ("data.num_scoring_workers=1000000", "less than or equal to 1024"),
    ("rollout.servers.start_timeout_s=1e30", "less than or equal to"),
    ("rollout.servers.request_timeout_s=1e30", "less than or equal to"),
    ("rollout.servers.health_timeout_s=1e30", "less than or equal to"),
    ("rollout.servers.health_interval_s=0", "greater than"),
    ("rollout.servers.health_interval_s=40", "at most half"),
    ("rollout.servers.base_port=70000", "less than or equal to 65535"),
    ("rollout.servers.base_port=0", "greater than"),
    (["rollout.servers.num_per_node=2", "rollout.servers.base_port=65535"], "the last port would be 65536"),
    ("rollout.servers.num_per_node=100000", "less than or equal to 1024"),
    ("weight_sync.timeout_s=1e30", "less than or equal to"),
    ("weight_sync.bucket_bytes=0", "greater than 0"),
    ("policy.optim.lr=1e300", "float32"),
    ("policy.optim.lr=1e-300", "float32"),
    ("policy.optim.lr=0", "greater than 0"),
    ("policy.optim.lr=-1e-6", "greater than 0"),
    ("policy.optim.weight_decay=1e300", "float32"),
    ("policy.optim.adam_eps=1e-300", "float32"),
    ("policy.optim.adam_beta1=1", "less than 1"),
    ("policy.optim.min_lr=1", "must not exceed"),
    ("algorithm.kl.coef=1e300", "float32"),
    ("algorithm.ratio_clip_max=1e300", "float32"),
    ("algorithm.ratio_clip_min=1", "must stay above 0"),
    ("algorithm.overlong.penalty=1e300", "float32"),
    ("rollout.temperature=0", "between 0.001 and 1000"),
    ("rollout.temperature=1e-12", "between 0.001 and 1000"),
    ("rollout.temperature=1e300", "between 0.001 and 1000"),
    ("rollout.temperature=-1", "between 0.001 and 1000"),
    ("rollout.temperature=.nan", "finite number"),
    ("eval.temperature=0", "between 0.001 and 1000"),
    ("eval.temperature=1e-12", "between 0.001 and 1000"),
    ("presample.temperature=1e300", "between 0.001 and 1000"),
    ("rollout.top_p=0", "greater than 0"),
    ("rollout.top_p=1.1", "less than or equal to 1"),
    ("rollout.top_k=-1", "greater than or equal to 0"),
    ("rollout.over_sampling=0.5", "greater than or equal to 1"),
    ("rollout.max_new_tokens=0", "greater than 0"),
    ("rollout.max_new_tokens=99999999999999999999", "64 bits"),
    ("exp_manager.checkpoint_callback_params.keep_last=0", "greater than 0"),
)

# ---- texts that YAML reads otherwise than they look, or not at all

YAML = [
    *overridden(
        ("trainer.max_steps=1:30", "1:30 would not be the number that it looks like"),
        ("trainer.max_steps=010", "010 would not be the number that it looks like"),
        ("trainer.timeout_s=1:30.5", "1:30.5 would not be"),
        ("trainer.max_steps=true", "is no number"),
        ("trainer.devices=true", "is no number"),
        ("trainer.max_steps='٣٤'", "valid integer"),
        ("eval.k_values=[1,", "is not a valid YAML value"),
        ("eval.k_values=[1]]", "is not a valid YAML value"),
        ("eval.k_values={1", "is not a valid YAML value"),
        ("exp_manager.name=${", "is not a valid YAML value"),
        ("exp_manager.name=${x", "is not a valid YAML value"),
        ("exp_manager.name=a: b", "valid string"),
        ("exp_manager.name=a: b: c", "is not a valid YAML value"),
        ("exp_manager.name=!!python/object:os.system x", "is not a valid YAML value"),
        ("exp_manager.name=&a [*a]", "recursive aliases"),
        ("exp_manager.name=a\x00b", "is not a valid YAML value"),
        ("exp_manager.name=[", "is not a valid YAML value"),
        ("policy.tokenizer_path=${nowhere}", "cannot be resolved"),
        ("policy.tokenizer_path=${policy.tokenizer_path}", "cannot be resolved"),
        ("policy.tokenizer_path=${oc.env:MEGATRON_RL_UNSET}", "export the variable"),
        ("policy.tokenizer_path=${oc.nothing:1}", "cannot be resolved"),
        ("data.train=${data}", "cannot be resolved"),
        ("exp_manager.name=123", "put it into quotes of its own"),
        ("exp_manager.name=", "valid string"),
        ("trainer.max_steps=", "valid integer"),
    ),
    Row("trainer.5", ("trainer={5: 1}",), "not as a text"),
    Row("data.True", ("data={on: 1}",), "not as a text"),
    Row("eval.k_values.0", ("eval.k_values=[true]",), "is no number"),
    Row("eval.k_values.0", ("eval.k_values=[many]",), "valid integer"),
    Row("eval.k_values", ("eval.k_values.0=3",), "valid list"),
    Row("trainer.max_steps", ("trainer.max_steps.x=3",), "valid integer"),
    *(Row("override", (text,), "section.field=value") for text in ("trainer", "=5", ".a=5", "a.=5", "a..b=5", " a=5")),
    *(Row("override", (text,), "begins with Hydra's +") for text in ("+trainer.max_steps=5", "++data.train=x")),
    *(
        Row("config", config=text, words=words)
        for text, words in [
            ("", "is empty"),
            ("# nothing\n", "is empty"),
            ("5\n", "mapping of sections"),
            ("text\n", "mapping of sections"),
            ("- a\n- b\n", "mapping of sections"),
            ("trainer: [", "is not valid YAML (line"),
            ("trainer: {max_steps: ???}", "is not valid YAML"),
            ("a: b: c\n", "line 1, column 5: mapping values are not allowed in this context"),
            ('a: "${"\n', "no viable alternative"),
            ("a: 1\na: 2\n", "line 2, column 1: found duplicate key a"),
            ("a: !!python/name:os.system\n", "is not valid YAML"),
            ("a: 1\n---\nb: 2\n", "is not valid YAML"),
            ("a: &a [*a]\n", "recursive aliases"),
            ("trainer: {max_steps: 1:30}\n", "1:30 would not be the number"),
            ("a: " + "[" * 3000 + "]" * 3000, "is not valid YAML"),
            (b"a: \xff\n", "is not UTF-8 (byte 3"),
            ("a: b\n".encode("utf-16"), "is not UTF-8"),
            ("a: 1\n".encode("utf-32"), "is not UTF-8"),
            (b"a: \x00\n", "is not valid YAML"),
            (b"\x80\x04\x95", "is not UTF-8"),
        ]
    ),
    *(
        Row("defaults", config=f"defaults: {value}\n", words="must be the path of a YAML file")
        for value in ("5", "[5]", "[null]", "{a: b}", "true", "[[a.yaml]]", "0.5")
    ),
    Row("defaults", config="defaults: config.yaml\n", words="in a circle: config.yaml -> config.yaml"),
    Row("config", config="defaults: nowhere.yaml\n", words="cannot be read (No such file"),
    Row("config", config="defaults: ['${nowhere}']\n", words="cannot be read (No such file"),
    Row("config", config="defaults: .\n", words="cannot be read (Is a directory"),
    *(
        Row(
            "trainer",
            config=f"defaults: {TINY}\ntrainer: {value}\n",
            overrides=("trainer.max_steps=3",),
            words="is a section",
        )
        for value in ("5", "[1, 2]", "null", "text", "")
    ),
    *(
        Row("policy.optim", (f"policy.optim={value}", "policy.optim.lr=1e-4"), "is a section")
        for value in ("5", "[1]", "null")
    ),
    Row(
        "trainer",
        config=f'defaults: {TINY}\ntrainer: "${{data}}"\n',
        overrides=("trainer.max_steps=3",),
        words="is an interpolation",
    ),
    *(Row("trainer", (f"trainer={value}",), "is a section, not a value") for value in ("5", "[1,2]", "null", "")),
    *(Row("algorithm", (f"algorithm={value}",), "is a section, not a value") for value in ("5", "[1]", "grpo", "")),
    Row("5", config="5: 1\n", words="not as a text"),
    Row("trainer.True", config="trainer: {yes: 1}\n", words="not as a text"),
]

# ---- keys

KEYS = overridden(
    ("trainer.max_step=3", "did you mean max_steps"),
    ("trainr.max_steps=3", ""),
    ("trainer.numerics.every=3", "did you mean every_n_steps"),
    ("algorithm.kl.coeff=1", "did you mean coef"),
    ("algorithm.clip=1", "is not a known key"),
    ("algorithm.mask_threshold=0.9", "it is algorithm.selection.max_probability now"),
    ("rollout.servers.use_router=true", "is gone"),
    ("policy.optim.betas=[0.9]", "is not a known key"),
    ("exp_manager.dir=x", "is not a known key"),
    ("a[0]=1", "is not a known key"),
    ("algorithm.name=gpro", "did you mean grpo?"),
    ("algorithm.name=null", "is not a known method"),
    ("algorithm.name=[grpo]", "is not a known method"),
    ("data.task=chess", "gsm8k"),
    ("data.task=no_such_module:TASK", "there is no module"),
    ("data.reward=no_such_module:f", "there is no module"),
    ("data.reward=reward", "does not read package.module:NAME"),
    ("rollout.engine=vllm", "is not a known engine"),
    ("weight_sync.transport=smoke", "is not a known transport"),
)
KEYS[1] = Row("trainr", ("trainr.max_steps=3",), "did you mean trainer")

# ---- names and paths

NAME_VALUES = [
    "''",
    "' '",
    ".",
    "..",
    "../../x",
    "a/b",
    "/tmp/x",
    '"a\\nb"',
    '"a\\0b"',
    '"a\\tb"',
    '"\\x7f"',
    "n" * 300,
    "ü" * 150,
]
PATH_KEYS = [
    "exp_manager.exp_dir", "exp_manager.resume_from_checkpoint", "policy.model_path", "policy.tokenizer_path", "data.train",
    "data.validation", "eval.baseline", "eval.pool", "presample.problems", "rollout.recorded_dir", "weight_sync.directory",
]  # fmt: skip
PATHS = [
    *(Row("exp_manager.name", (f"exp_manager.name={value}",)) for value in NAME_VALUES),
    *(Row(key, (f'{key}="a\\0b"',), "does not belong into a path") for key in PATH_KEYS),
    *(Row(key, (f"{key}=''",), "is empty") for key in PATH_KEYS[:4]),
    *(
        Row(key, (f"{key}=~no_such_user/x",), "no home here")
        for key in ("exp_manager.exp_dir", "policy.model_path", "data.train")
    ),
    *(Row(key, (f"{key}={'x' * 300}",), "longer than a file system takes") for key in ("exp_manager.exp_dir", "data.train")),
    Row("data.train", (f"data.train={'x/' * 3000}",), "longer than a file system takes"),
    Row("data.validation", ("data.validation=train.jsonl",), "is data.train"),
    Row("data.validation", ("data.validation=./x/../train.jsonl",), "is data.train"),
    Row("policy.model_path", ("policy.model_path=/nowhere",), "is not a directory", verb="train"),
    Row("policy.model_path", ("policy.model_path=~/no/such/model",), "is not a directory", verb="train"),
    Row("policy.tokenizer_path", ("policy.tokenizer_path=.",), "holds no tokenizer", verb="train"),
    Row("data.train", ("data.train=/nowhere.jsonl",), "is no file or folder here", verb="train"),
    Row("data.validation", ("data.validation=/nowhere.jsonl",), "is no file or folder here", verb="train"),
    Row("data.validation.b", ("data.validation={b: /nowhere.jsonl}",), "is no file or folder here", verb="train"),
    Row("data.validation", ("data.validation={b: train.jsonl}",), "is data.train"),
    Row("data.validation", ("data.validation={a: x.jsonl, b: [y.jsonl, ./x.jsonl]}",), "stands in data.validation twice"),
    Row("data.validation", ("data.validation={a/b: x.jsonl}",), "has a set called 'a/b'"),
    Row("data.validation", ("data.validation={dropped: x.jsonl}",), "has a set called 'dropped'"),
    Row("data.validation", ("data.validation={a: 5}",), "has under 'a' neither a path nor a list"),
    Row("data.validation", ("data.validation={}",), "names no set"),
    Row("data.reward", ("data.reward=os.path:join",), "takes a, none of which is a response"),
    Row("exp_manager.exp_dir", ("exp_manager.exp_dir=train.jsonl",), "is a file", verb="train"),
    Row("exp_manager.exp_dir", ("exp_manager.exp_dir=/dev/null/x",), "is a file", verb="train"),
    *(
        Row("rollout.servers.urls", (SGLANG, f"rollout.servers.urls={urls}"), "")
        for urls in (
            '["http://"]', "[host]", "['']", "[]", "['ftp://h:1']", "['http://h:99999']", "['http://h:x']", "['http://h:0']",
            "['http://[::1']", '["http://h\\n:1"]', "['http://:3000']",
        )
    ),
]  # fmt: skip

# ---- pairs of settings

PAIRS = [
    *overridden(
        ("eval.k_values=[1,16]", "k <= num_samples"),
        ("eval.k_values=[]", "at least one"),
        ("eval.k_values=[1,1]", "has a value twice"),
        (["rollout.engine=transformers", "rollout.over_sampling=2"], "cannot stop early"),
        ("algorithm.num_generations_per_prompt=1", "at least 2"),
        ("algorithm.ratio_clip_c=1.1", "must exceed"),
        ("algorithm.overlong.buffer=99", "must not exceed"),
        ("policy.train_global_batch_size=6", "must divide"),
        (["trainer.devices=2", "policy.train_global_batch_size=1"], "multiple of"),
        (["trainer.devices=3", "policy.train_global_batch_size=8"], "multiple of"),
        ("presample.min_correct=9", "must not exceed presample.num_samples"),
        (["weight_sync.transport=auto", "weight_sync.quantization=fp8_tensor"], "is for servers"),
        ("weight_sync.transport=shards", "is for servers"),
        ([SGLANG, "weight_sync.directory=/shared"], "only then"),
        ([SGLANG, "weight_sync.transport=shards", "weight_sync.quantization=fp8_tensor"], "goes by whole tensors"),
        ([SGLANG, "weight_sync.full_every=0"], "greater than 0"),
        ([SGLANG, "rollout.servers.urls=['http://h:1']", "rollout.sglang_cfg={tp_size: 2}"], "has no effect"),
    ),
    Row("algorithm.name", ("trainer.stage=sft",), "belongs to trainer.stage rl"),
    Row("data.validation", ("eval.after=true",), "problems to evaluate on"),
    Row("rollout.recorded_dir", ("rollout.engine=recorded",), "exactly when"),
    Row("algorithm.kl.estimator", ("algorithm.kl.estimator=k1",), "no gradient"),
    Row("algorithm.kl.estimator", ("algorithm.kl.placement=reward",), "k1 only"),
    Row("weight_sync.directory", (SGLANG, "weight_sync.transport=disk"), "must be given"),
    Row("trainer.devices", ("trainer.devices=3", "policy.megatron_cfg.tensor_model_parallel_size=2"), "multiple of"),
    Row("trainer.max_steps", ("trainer.max_steps=0",), "megatron-rl eval MODEL"),
    Row("policy.optim.sched.decay_updates", ("policy.optim.sched.name=cosine",), "number of updates"),
    Row(
        "policy.optim.sched.warmup_fraction",
        ("policy.optim.sched={warmup_fraction: 0.1, warmup_updates: 5}",),
        "of the two",
    ),
    Row("policy.optim.sched.warmup_fraction", ("policy.optim.sched.warmup_fraction=0.1",), "share of decay_updates"),
    Row(
        "policy.optim.sched.warmup_updates",
        ("policy.optim.sched.name=linear", "policy.optim.sched.decay_updates=5", "policy.optim.sched.warmup_updates=5"),
        "must be below",
    ),
    Row(
        "policy.train_global_batch_size",
        (
            "policy.megatron_cfg.virtual_pipeline_model_parallel_size=2",
            "trainer.devices=4",
            "policy.megatron_cfg.pipeline_model_parallel_size=2",
            "policy.train_global_batch_size=2",
        ),
        "pipeline-parallel size = 4",
    ),
]

# ---- sections that are passed through

MEGATRON, DDP, OPTIMIZER, SERVER = (
    "policy.megatron_cfg",
    "policy.ddp_cfg",
    "policy.optim.optimizer_cfg",
    "rollout.sglang_cfg",
)
PASSED = [
    *overridden(
        *(
            (
                f"{MEGATRON}.{name}{'_parallel_size' if name == 'context' else '_model_parallel_size'}={value}",
                "a whole number",
            )
            for name in ("tensor", "pipeline", "context", "expert", "virtual_pipeline")
            for value in ("0", "-2", "two", "1.5", "true")
        ),
        (f"{MEGATRON}.tensor_parallel_size=2", "tensor_model_"),
        (f"{MEGATRON}.num_layers=2", "config.json"),
        (f"{MEGATRON}.bf16=true", "trainer.precision"),
        (f"{MEGATRON}.sequence_parallel=true", "above 1"),
        (f"{MEGATRON}.sequence_parallel=1", "true or false"),
        (f"{MEGATRON}.moe_aux_loss_coeff=abc", "must be a number, or a list, each a number"),
        (f"{MEGATRON}.moe_aux_loss_coeff=[0.1, x]", "must be a number"),
        (f"{MEGATRON}.moe_aux_loss_coeff=.nan", "must be a number"),
        (f"{MEGATRON}.moe_aux_loss_coeff=true", "must be a number"),
        (f"{MEGATRON}.moe_aux_loss_coeff='0.1'", "without quotes"),
        (f"{MEGATRON}.moe_aux_loss_coeff=1e300", "float32"),
        (f"{MEGATRON}.init_method_std=abc", "must be a number"),
        (f"{MEGATRON}.init_method=abc", "an object of Python"),
        (f"{MEGATRON}.attention_backend=flash", "an object of Python"),
        (f"{MEGATRON}.recompute_granularity=nonsense", "must be one of full, selective"),
        (f"{MEGATRON}.recompute_modules=5", "must be a list, each a text"),
        (f"{MEGATRON}.recompute_modules=mlp", "must be a list, each a text"),
        (f"{MEGATRON}.recompute_modules=[1]", "must be a list, each a text"),
        (f"{MEGATRON}.recompute_modules=[mlp]", "does nothing without recompute_granularity"),
        (f"{MEGATRON}.recompute_num_layers=one", "must be a whole number"),
        (f"{MEGATRON}.recompute_method=all", "must be one of uniform, block"),
        (f"{MEGATRON}.fp8=e5m2", "must be one of e4m3, hybrid"),
        ([f"{MEGATRON}.fp8=e4m3", f"{MEGATRON}.fp8_recipe=custom"], "must be one of delayed"),
        (f"{MEGATRON}.transformer_impl=flax", "must be one of"),
        (f"{MEGATRON}.window_size=[128, 0]", "comes from the model's config.json"),
        (f"{MEGATRON}.no_rope_freq=4", "comes from the model's config.json"),
        (f"{MEGATRON}.moe_router_score_function=sigmoid", "comes from the model's config.json"),
        (f"{MEGATRON}.bias_activation_fusion=maybe", "must be true or false"),
        (f"{MEGATRON}.cp_comm_type=5", "must be a text"),
        (f"{MEGATRON}.hidden_dropout=0.1", "different networks"),
        (f"{MEGATRON}.attention_dropout=0.0", "different networks"),
        (f"{MEGATRON}.moe_router_load_balancing_type=aux_loss", "share a micro-batch"),
        ([f"{MEGATRON}.moe_z_loss_coeff=0.1", f"{MEGATRON}.recompute_modules=[moe]"], "later micro-batch"),
        (["policy.router_replay=true", f"{MEGATRON}.moe_layer_recompute=true"], "later micro-batch"),
        (
            [f"{MEGATRON}.recompute_granularity=selective", f"{MEGATRON}.recompute_modules=[moe_act]"],
            "must be of core_attn, mlp",
        ),
        (f"{MEGATRON}.mtp_num_layers=1", "neither loaded nor trained"),
        (f"{MEGATRON}.softmax_type=learnable", "gradient norm"),
        (f"{MEGATRON}.experimental_attention_variant=gated_delta_net", "config.json"),
        (f"{MEGATRON}.hybrid_context_parallel=true", "fixed when the model is built"),
        (f"{MEGATRON}.perform_initialization=false", "gradient norm"),
        (f"{MEGATRON}.calculate_per_token_loss=false", "data-parallel layout"),
        (f"{DDP}.use_megatron_fsdp=true", "would be sharded"),
        (f"{MEGATRON}.virtual_pipeline_model_parallel_size=2", "needs pipeline_model_parallel_size above 1"),
        (f"{MEGATRON}.fine_grained_activation_offloading=true", "pinned memory"),
        (
            [
                f"{MEGATRON}.cpu_offloading_num_layers=1",
                f"{MEGATRON}.recompute_granularity=selective",
                f"{MEGATRON}.cpu_offloading=true",
            ],
            "without recompute_granularity",
        ),
        (f"{DDP}.average_in_collective=true", "layout"),
        (f"{DDP}.overlap_param_gather=true", "fixed at false"),
        (f"{DDP}.bucket_size=abc", "must be a whole number"),
        (f"{DDP}.bucket_size=1.5", "must be a whole number"),
        (f"{DDP}.overlap_grad_reduce=maybe", "must be true or false"),
        (f"{DDP}.bucket_sizes=5", "did you mean bucket_size"),
        (f"{OPTIMIZER}.lr=1", "has its own field"),
        (f"{OPTIMIZER}.overlap_param_gather=true", "fixed at false"),
        (f"{OPTIMIZER}.log_num_zeros_in_grad=maybe", "must be true or false"),
        (f"{OPTIMIZER}.optimizer_offload_fraction=half", "must be a number"),
        (f"{OPTIMIZER}.timers=x", "an object of Python"),
        (f"{OPTIMIZER}.optimizer_cpu_offload=true", "needs use_precision_aware_optimizer"),
        (
            [
                "trainer.precision=fp32",
                f"{OPTIMIZER}.use_precision_aware_optimizer=true",
                f"{OPTIMIZER}.optimizer_cpu_offload=true",
            ],
            "needs trainer.precision=bf16",
        ),
        (f"{OPTIMIZER}.exp_avg_dtype=bf16", "without use_precision_aware_optimizer"),
        (f"{OPTIMIZER}.main_params_dtype=bf16", "one of fp32, fp16"),
        (f"{SERVER}.tp_size=two", "must be a whole number"),
        (f"{SERVER}.tp_size=1.5", "must be a whole number"),
        (f"{SERVER}.tp_size='2'", "without quotes"),
        (f"{SERVER}.tp=2", "did you mean tp_size"),
        (f"{SERVER}.tensor_parallel_size=2", "did you mean tp_size"),
        (f"{SERVER}.mem_fraction_static=most", "must be a number"),
        (f"{SERVER}.disable_radix_cache=maybe", "must be true or false"),
        (f"{SERVER}.attention_backend=magic", "must be one of"),
        (f"{SERVER}.dtype=int4", "must be one of"),
        (f"{SERVER}.schedule_policy=5", "must be one of"),
        (f"{SERVER}.dp_size=2", "rollout.servers.num_per_node"),
        *(
            (f"{SERVER}.{name}={value}", "must be a whole number of at least 1")
            for name in ("tp_size", "ep_size", "pp_size")
            for value in ("0", "-1", "null")
        ),
        (f"{SERVER}.moe_dense_tp_size=0", "must be a whole number of at least 1"),
        (f"{SERVER}.enable_metrics=true", "open to everybody"),
        (f"{SERVER}.enable_dp_attention=true", "TCP ports without a key"),
        (f"{SERVER}.attn_dp_size=2", "TCP ports without a key"),
        (f"{SERVER}.grpc_mode=true", "asks for no key"),
        (f"{SERVER}.grpc_port=40000", "asks for no key"),
        (f"{SERVER}.kv_events_config='{{}}'", "asks for no key"),
        (f"{SERVER}.speculative_algorithm=EAGLE", "has none for a draft model"),
        (f"{SERVER}.tokenizer_worker_num=2", "does not start"),
        (f"{SERVER}.port=30000", "rollout.servers.base_port"),
        (f"{SERVER}.api_key=abc", "is drawn at random"),
        (f"{SERVER}.admin_api_key=abc", "is drawn at random"),
        (f"{SERVER}.ssl_keyfile_password=abc", "plain http"),
    ),
    Row(f"{MEGATRON}.cpu_offloading_num_layers", (f"{MEGATRON}.cpu_offloading=true",), "without a number of layers"),
]

# ---- secrets

CLEAR = "holds a secret in clear text"
SECRETS = overridden(
    *(
        (f"exp_manager.wandb_logger_kwargs.{name}=abc", CLEAR)
        for name in ("secret_key", "private_key", "auth", "pwd", "x-api-key", "session_token")
    ),
    *(
        (f"exp_manager.mlflow_logger_kwargs.tracking_uri=http://host/x?a=b&{name}=abc", CLEAR)
        for name in ("api_key", "token", "key", "X-Amz-Signature")
    ),
    ("exp_manager.wandb_logger_kwargs.notes=see http://me:abc@host", CLEAR),
    ("exp_manager.wandb_logger_kwargs.password=1234", CLEAR),
    ("exp_manager.wandb_logger_kwargs.api_key=abc", CLEAR),
    ("exp_manager.wandb_logger_kwargs.password=abc", CLEAR),
    ("exp_manager.mlflow_logger_kwargs.tags.auth_token=abc", CLEAR),
    ("exp_manager.mlflow_logger_kwargs.tracking_uri=http://me:abc@host/x", CLEAR),
)
SECRETS.append(
    Row("rollout.servers.urls.0", (SGLANG, "rollout.servers.urls=['http://me:abc@host:1']"), CLEAR),
)

# ---- the model's config.json and the problem files


def model(words: str, **changes: Any) -> Row:
    """A row of one change in config.json."""
    return Row(f"MODEL/config.json: {next(iter(changes))}", model=changes, words=words, verb="train")


MODELS = [
    model("at most 1048576", hidden_size=1_000_000_000),
    model("must be a positive integer", hidden_size=-1),
    model("must be a positive integer", hidden_size="64"),
    model("must be a positive integer", hidden_size=64.5),
    model("must be a positive integer", vocab_size=2**40),
    model("must be a positive integer", num_hidden_layers=None),
    model("has 2 entries for num_hidden_layers = 3", layer_types=["full_attention"] * 2, num_hidden_layers=3),
    model("every layer must be", layer_types=["sliding_attention"] * 2),
    model("must be one of", model_type="gpt2"),
    model("must be true or false", tie_word_embeddings="yes"),
    model("must divide", num_key_value_heads=3),
    Row(
        f"{MEGATRON}.tensor_model_parallel_size",
        (f"{MEGATRON}.tensor_model_parallel_size=3", "trainer.devices=3", "policy.train_global_batch_size=8"),
        "num_attention_heads = 4",
        verb="train",
    ),
    Row(
        f"{MEGATRON}.num_layers_in_first_pipeline_stage",
        (
            f"{MEGATRON}.pipeline_model_parallel_size=2",
            f"{MEGATRON}.num_layers_in_first_pipeline_stage=3",
            "trainer.devices=2",
        ),
        "leaves -1 of the model's 2 layers to 1 other stages",
        verb="train",
    ),
    Row(
        f"{MEGATRON}.virtual_pipeline_model_parallel_size",
        (
            f"{MEGATRON}.pipeline_model_parallel_size=2",
            f"{MEGATRON}.virtual_pipeline_model_parallel_size=2",
            "trainer.devices=2",
        ),
        "must divide the 3 layers of a pipeline stage",
        model={"num_hidden_layers": 6, "layer_types": ["full_attention"] * 6},
        verb="train",
    ),
    Row(
        f"{MEGATRON}.pipeline_model_parallel_size",
        (
            f"{MEGATRON}.pipeline_model_parallel_size=3",
            f"{MEGATRON}.num_layers_in_last_pipeline_stage=3",
            "trainer.devices=3",
        ),
        "must divide the model's other 3 layers, between 2 stages",
        model={"num_hidden_layers": 6, "layer_types": ["full_attention"] * 6},
        verb="train",
    ),
    Row("data.template", ("data.template={question}",), "put it into quotes of its own"),
    Row(
        f"{MEGATRON}.pipeline_model_parallel_size",
        (f"{MEGATRON}.pipeline_model_parallel_size=4", "trainer.devices=4"),
        "num_hidden_layers = 2",
        verb="train",
    ),
    Row("rollout.max_new_tokens", ("rollout.max_new_tokens=512",), "leaves no room", verb="train"),
    Row(
        "rollout.engine",
        (SGLANG,),
        "mlp_bias is true",
        model={"model_type": "llama", "architectures": ["LlamaForCausalLM"], "mlp_bias": True},
    ),
]


def problems(words: str, text: str | bytes, line: int | None = 1, *, task: str = "gsm8k") -> Row:
    """A row of one problem file."""
    named = "train.jsonl" if line is None else f"train.jsonl:{line}"
    return Row(named, (f"data.task={task}",), words, train=text, verb="load")


def problem(answer: object, **more: object) -> str:
    return json.dumps({"question": "q", "answer": answer, **more}, ensure_ascii=False) + "\n"


PROBLEMS = [
    problems("has no row", "", None),
    problems("has no row", "\n\n", None),
    problems("is an empty line", problem("#### 1") + "\n" + problem("#### 2"), 2),
    problems("is not JSON", "{\n"),
    problems("is not JSON", problem("#### 1") + '{"question": "b", "answer": \n', 2),
    problems("is not a JSON object", '["question"]\n'),
    problems("is not a JSON object", "5\n"),
    problems("is not a JSON object", "null\n"),
    problems("is not JSON", "[" * 100_000),
    problems("is not JSON", '{"question": ' + "1" * 5000 + "}\n"),
    problems("occurs twice", '{"question": "a", "question": "b", "answer": "#### 1"}\n'),
    problems("has no field 'answer'", '{"question": "a"}\n'),
    problems("has no field 'question'", '{"answer": "#### 1"}\n'),
    problems("must be a string", problem(5)),
    problems("must be a string", problem(None)),
    problems("is empty", problem(" ")),
    problems("half a surrogate pair", '{"question": "\\ud800", "answer": "#### 1"}\n'),
    problems("is not UTF-8", b'{"question": "\xff"}\n'),
    problems("is not UTF-8", problem("#### 1").encode("utf-16")),
    problems("must end in ####", problem("no mark")),
    problems("must end in ####", problem("####")),
    problems("must end in ####", problem("#### seven")),
    problems("must end in ####", problem("#### 1e5")),
    problems("must end in ####", problem("#### 1,2")),
    problems("in the digits 0 to 9", problem("#### ٣٤")),
    problems("in the digits 0 to 9", problem("#### 3\N{FULLWIDTH DIGIT FOUR}")),
    problems("must be an integer", problem("٣٤"), task="word_problems"),
    problems("must be an integer", problem("3.5"), task="word_problems"),
    problems("has the columns of no layout", '{"a": 1}\n', task="math"),
    Row("data.train", ("data.train=[]",), "must be a path, or a list of paths"),
    Row("data.train", ("data.train={a: b}",), "must be a path, or a list of paths"),
    Row("data.train", ("data.train=[train.jsonl, 3]",), "must be a path, or a list of paths"),
    Row("data.train", ("data.train=train.jsonl[5:9]",), "takes no row", verb="load"),
    Row("data.fields", ("data.fields.answer=a",), "one of prompt and question has to be named"),
    Row("data.fields", ("data.fields.prompt=a", "data.fields.question=b"), "only one of prompt and question"),
    Row("train.jsonl:1", ("data.task=math", "data.fields.question=query"), "has no field 'query'", verb="train"),
    Row("train.jsonl:1", ("data.task=math",), "has no reference answer", train='{"prompt": "q"}\n', verb="train"),
    Row("data.system_prompt", ("data.apply_chat_template=false", "data.system_prompt=be"), "needs a chat template"),
    Row("data.train", ("data.train=train.json",), "is no file or folder here", verb="train"),
]

TABLE = [*rows_of_kinds(), *BOUNDS, *YAML, *KEYS, *PATHS, *PAIRS, *PASSED, *SECRETS, *MODELS, *PROBLEMS]


def prepare(row: Row, folder: Path) -> list[str]:
    """Write a row's files; return the arguments of its command."""
    (folder / "MODEL").mkdir(parents=True)
    (folder / "MODEL/config.json").write_text(json.dumps(MODEL | row.model))
    (folder / "MODEL/tokenizer.json").touch()
    (folder / "MODEL/model.safetensors").write_bytes(NO_TENSORS)
    for name, text in (("train.jsonl", row.train), ("config.yaml", row.config)):
        if text is not None:
            (folder / name).write_bytes(text if isinstance(text, bytes) else text.encode())
    if row.config is not None:
        return ["config.yaml", *row.overrides]
    return [
        str(TINY), "policy.model_path=MODEL", "data.train=train.jsonl", "exp_manager.exp_dir=runs", *row.overrides,
    ]  # fmt: skip


def check_line(row: Row, status: object, out: str, err: str) -> None:
    """One line, which names the field."""
    assert (status, out) == (2, ""), (status, out, err)
    assert err.startswith(f"error: {row.named}") and err[len("error: " + row.named)] in " :", err
    assert err.count("\n") == 1 and "Fix: " in err and len(err) < 1200 and "Traceback" not in err, err
    assert row.words in err, err


@pytest.fixture(scope="module")
def results(tmp_path_factory: pytest.TempPathFactory) -> list[Any]:
    """What one process says to all rows."""
    folder = tmp_path_factory.mktemp("rows")
    rows = []
    for number, row in enumerate(TABLE):
        rows.append(
            {"verb": row.verb, "arguments": prepare(row, folder / str(number)), "folder": str(folder / str(number))}
        )
    done = subprocess.run(
        [sys.executable, "-c", RUNNER], input=json.dumps(rows), cwd=folder, capture_output=True, text=True, check=False
    )
    lines = done.stdout.splitlines()
    assert len(lines) == len(TABLE), (TABLE[len(lines)], done.stderr)
    return [json.loads(line) for line in lines]


@pytest.mark.parametrize("number", range(len(TABLE)), ids=lambda number: f"{number}-{TABLE[number].named}"[:60])
def test_a_wrong_input_is_one_line(results: list[Any], number: int) -> None:
    status, out, err, seconds, has_torch = results[number]
    check_line(TABLE[number], status, out, err)
    assert seconds < 1 and not has_torch


@pytest.mark.parametrize("row", [BOUNDS[0], PASSED[-2], PROBLEMS[-1]], ids=lambda row: row.named)
def test_a_command_refuses_within_seconds(row: Row, tmp_path: Path) -> None:
    arguments = prepare(row, tmp_path / "row")
    started = time.monotonic()
    done = subprocess.run(
        [sys.executable, "-m", "megatron_rl.commands.cli", row.verb, *arguments],
        cwd=tmp_path / "row", capture_output=True, text=True, check=False,
    )  # fmt: skip
    check_line(row, done.returncode, done.stdout, done.stderr)
    assert time.monotonic() - started < 10, "torch alone takes several seconds"


def test_the_table_is_long() -> None:
    assert len(TABLE) >= 235

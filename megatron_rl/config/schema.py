"""The sections of a config file: fields, defaults, and the rules between fields. A default lives here and nowhere else.

Section and field names are NeMo's where NeMo has one (``trainer``, ``exp_manager``, ``policy.megatron_cfg``, ...).
"""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any, Literal

from pydantic import Field, NonNegativeFloat, NonNegativeInt, PositiveFloat, PositiveInt

from megatron_rl.config import upstream
from megatron_rl.config.algorithms import STAGE_OF_ALGORITHM, AlgorithmConfig
from megatron_rl.config.section import section
from megatron_rl.errors import UserError


@section
class TrainerConfig:
    """How long, how wide, in which precision."""

    stage: Literal["rl", "sft"] = "rl"
    accelerator: Literal["auto", "cpu", "gpu"] = "auto"
    """``auto`` takes the GPU where torch sees one."""
    devices: PositiveInt = 1
    """Processes on each node: GPUs, or CPU ranks."""
    num_nodes: PositiveInt = 1
    threads_per_rank: NonNegativeInt = 0
    """CPU threads of each process; 0 shares the cores out."""
    precision: Literal["fp32", "bf16"] = "bf16"
    """``bf16`` keeps float32 main weights in the optimizer. CPUs without AMX or AVX-512-BF16 are far faster in fp32."""
    max_steps: PositiveInt = 1000
    seed: int = 1234
    timeout_s: PositiveFloat = 1800.0
    """A collective that takes longer ends the run."""
    hang_timeout_s: PositiveFloat | None = 900.0
    """When no rank has made progress for so long, or one gives no sign of life, the run ends with a message that says who
    waits for whom (docs/watchdog.md); null never does. Progress is a phase entered or left, or an item of a progress bar."""

    @property
    def world_size(self) -> int:
        """Processes of the run."""
        return self.devices * self.num_nodes

    @property
    def num_threads(self) -> int:
        """CPU threads of one process: as configured, else an equal share of this machine's cores."""
        return self.threads_per_rank or max(1, len(os.sched_getaffinity(0)) // self.devices)


@section
class CheckpointConfig:
    """``checkpoint_callback_params``: when to save, what to keep."""

    every_n_train_steps: PositiveInt = 50
    """The last step is always saved."""
    keep_last: PositiveInt = 2


@section
class ExpManagerConfig:
    """Where a run lives, how it resumes, where its metrics go."""

    exp_dir: str = "runs"
    name: str = "default"
    resume_if_exists: bool = True
    """Continue from the last complete checkpoint of this run, if there is one; the same command starts and resumes."""
    resume_from_checkpoint: str | None = None
    """One checkpoint directory to start from, until this run has a complete one that descends from it; an incomplete one is an
    error."""
    create_checkpoint_callback: bool = True
    checkpoint_callback_params: CheckpointConfig = Field(default_factory=CheckpointConfig)
    export_hf: bool = True
    """Write ``hf/``, a Hugging Face checkpoint, at the end."""
    create_tensorboard_logger: bool = False
    summary_writer_kwargs: dict[str, Any] = Field(default_factory=dict)
    create_wandb_logger: bool = False
    wandb_logger_kwargs: dict[str, Any] = Field(default_factory=dict)
    create_mlflow_logger: bool = False
    mlflow_logger_kwargs: dict[str, Any] = Field(default_factory=dict)

    @property
    def run_dir(self) -> Path:
        """Folder of the run."""
        return Path(self.exp_dir) / self.name


@section
class SchedConfig:
    """Learning-rate schedule, in optimizer updates (not steps: a step can hold several updates).

    Update i, counted from 1, runs at point i: with W = ``warmup_updates`` and N = ``decay_updates``, updates 1 to W run at
    lr * i / W, so the first one moves and update W is the first at ``lr``; from there the rate falls, and update N is the
    first at ``min_lr``, where it stays. With ``min_lr: 0`` update N changes nothing; N one larger, or a ``min_lr`` above 0,
    makes use of it. A resumed run follows the settings it is given, from its count of updates on.
    """

    name: Literal["constant", "linear", "cosine", "inverse-square-root"] = "constant"
    warmup_updates: NonNegativeInt = 0
    decay_updates: PositiveInt | None = None
    """Updates until ``min_lr``; required by linear and cosine."""

    def __post_init__(self) -> None:
        if self.name in ("linear", "cosine") and self.decay_updates is None:
            raise UserError(
                "policy.optim.sched.decay_updates",
                None,
                f"{self.name} needs the number of updates until min_lr",
                "set it, usually to trainer.max_steps times the updates of a step",
            )
        if self.decay_updates is not None and self.warmup_updates >= self.decay_updates:
            raise UserError(
                "policy.optim.sched.warmup_updates",
                self.warmup_updates,
                f"must be below decay_updates = {self.decay_updates}",
                "shorten the warm-up or lengthen the decay",
            )


@section
class OptimConfig:
    """Megatron's optimizer. Fields beyond these go to ``optimizer_cfg`` under Megatron's names."""

    name: Literal["adam", "sgd"] = "adam"
    lr: PositiveFloat = 1e-6
    min_lr: NonNegativeFloat = 0.0
    weight_decay: NonNegativeFloat = 0.0
    clip_grad: NonNegativeFloat = 1.0
    """Global gradient norm above which gradients are scaled down; 0 is off."""
    adam_beta1: float = Field(default=0.9, ge=0, lt=1)
    adam_beta2: float = Field(default=0.999, ge=0, lt=1)
    adam_eps: PositiveFloat = 1e-8
    sched: SchedConfig = Field(default_factory=SchedConfig)
    optimizer_cfg: dict[str, Any] = Field(default_factory=dict)

    def __post_init__(self) -> None:
        if self.min_lr > self.lr:
            raise UserError("policy.optim.min_lr", self.min_lr, f"must not exceed lr = {self.lr}", "lower it")
        upstream.check_names(
            "policy.optim.optimizer_cfg", self.optimizer_cfg, upstream.OPTIMIZER, owned=upstream.OPTIMIZER_OWNED
        )


_PARALLEL_SIZES = (
    "tensor_model_parallel_size",
    "pipeline_model_parallel_size",
    "context_parallel_size",
    "expert_model_parallel_size",
    "expert_tensor_parallel_size",
    "virtual_pipeline_model_parallel_size",
)


@section
class PolicyConfig:
    """The model that is trained."""

    model_path: str
    """Hugging Face directory: config.json, tokenizer, and weights unless ``initialization: random``."""
    tokenizer_path: str | None = None
    """Another directory for the tokenizer."""
    initialization: Literal["pretrained", "random"] = "pretrained"
    megatron_cfg: dict[str, Any] = Field(default_factory=dict)
    """Fields of Megatron's TransformerConfig under their own names: parallel sizes, recompute, fp8, ... The shape of the
    model is not among them: it comes from config.json."""
    ddp_cfg: dict[str, Any] = Field(default_factory=dict)
    """Fields of Megatron's DistributedDataParallelConfig."""
    router_replay: bool = False
    """In a model of experts: train through the experts that the rollout chose (R3, arXiv 2510.11370)."""
    optim: OptimConfig = Field(default_factory=OptimConfig)
    train_global_batch_size: PositiveInt = 512
    """Rows of one optimizer update, over all ranks."""
    train_micro_batch_tokens: PositiveInt = 16384
    """Tokens of one forward and backward of one copy of the model (context-parallel ranks share them). The longest prompt
    with ``rollout.max_new_tokens`` has to fit."""

    @property
    def tensor_parallel_size(self) -> int:
        """Ranks that share each layer."""
        return int(self.megatron_cfg.get("tensor_model_parallel_size", 1))

    @property
    def pipeline_parallel_size(self) -> int:
        """Ranks that share the layers out."""
        return int(self.megatron_cfg.get("pipeline_model_parallel_size", 1))

    @property
    def virtual_pipeline_size(self) -> int:
        """Chunks of layers on each pipeline rank."""
        return int(self.megatron_cfg.get("virtual_pipeline_model_parallel_size") or 1)

    @property
    def context_parallel_size(self) -> int:
        """Ranks that share each sequence."""
        return int(self.megatron_cfg.get("context_parallel_size", 1))

    @property
    def expert_parallel_size(self) -> int:
        """Ranks that share the experts of a layer out; of those that have the same other weights."""
        return int(self.megatron_cfg.get("expert_model_parallel_size", 1))

    @property
    def model_parallel_size(self) -> int:
        """Ranks of one copy of the model."""
        return self.tensor_parallel_size * self.pipeline_parallel_size * self.context_parallel_size

    def __post_init__(self) -> None:
        upstream.check_names(
            "policy.megatron_cfg", self.megatron_cfg, upstream.TRANSFORMER, owned=upstream.TRANSFORMER_OWNED
        )
        upstream.check_names("policy.ddp_cfg", self.ddp_cfg, upstream.DDP, owned=upstream.DDP_OWNED)
        for name in _PARALLEL_SIZES:
            value = self.megatron_cfg.get(name, 1)
            if value is None and name == "virtual_pipeline_model_parallel_size":  # Megatron's way of saying 1
                continue
            if not isinstance(value, int) or isinstance(value, bool) or value < 1:
                field, rule = f"policy.megatron_cfg.{name}", "must be a whole number of ranks, 1 or more"
                raise UserError(field, value, rule, "leave it out, or give a number")
        if self.virtual_pipeline_size > 1 and self.pipeline_parallel_size == 1:
            raise UserError(
                "policy.megatron_cfg.virtual_pipeline_model_parallel_size",
                self.virtual_pipeline_size,
                "needs pipeline_model_parallel_size above 1",
                "leave it out, or raise the pipeline-parallel size",
            )
        self._check_routing()
        if self.megatron_cfg.get("sequence_parallel") and self.tensor_parallel_size == 1:
            raise UserError(
                "policy.megatron_cfg.sequence_parallel",
                True,
                "needs tensor_model_parallel_size above 1",
                "leave it out, or raise the tensor-parallel size",
            )

    def _check_routing(self) -> None:
        kind = self.megatron_cfg.get("moe_router_load_balancing_type", "none")
        if kind not in ("none", "seq_aux_loss"):
            raise UserError(
                "policy.megatron_cfg.moe_router_load_balancing_type",
                kind,
                "would depend on which rows share a micro-batch",
                "use seq_aux_loss, which balances each sequence, or none",
            )
        reads_pack = kind != "none" or self.megatron_cfg.get("moe_z_loss_coeff") or self.router_replay
        for field, is_set in (
            ("recompute_modules", "moe" in (self.megatron_cfg.get("recompute_modules") or ())),
            ("moe_layer_recompute", self.megatron_cfg.get("moe_layer_recompute")),
        ):
            if reads_pack and is_set:
                raise UserError(
                    f"policy.megatron_cfg.{field}",
                    self.megatron_cfg[field],
                    "cannot compute expert layers again under an auxiliary loss or router_replay: their router would see "
                    "the pack of a later micro-batch",
                    "use recompute_granularity: full, or leave it out",
                )


@section
class ServersConfig:
    """SGLang servers: how many, where, and how long anything may take (``rollout.engine: sglang``)."""

    urls: list[str] | None = None
    """Servers that run already, each ``http://host:port``; null starts our own."""
    num_per_node: PositiveInt = 1
    """Servers started on each node."""
    placement: Literal["separate", "colocated"] = "separate"
    """``separate``: servers take the GPUs after the trainer's. ``colocated``: they share the trainer's, and give their
    memory back while it trains."""
    use_router: bool = True
    """Put ``sglang-router`` in front where there is more than one server."""
    base_port: PositiveInt | None = None
    """Port of a node's first server, the others count on; null takes free ones."""
    start_timeout_s: PositiveFloat = 600.0
    """From start, or from a failure, until a server must serve."""
    request_timeout_s: PositiveFloat = 1200.0
    """Deadline of one attempt at one request."""
    max_retries: NonNegativeInt = 5
    """Further attempts at a request before the run ends."""
    max_restarts: NonNegativeInt = 20
    """Restarts of one server before the run ends."""
    max_in_flight: PositiveInt = 512
    """Requests under way at one server; the others wait with us."""
    health_interval_s: PositiveFloat = 5.0
    health_timeout_s: PositiveFloat = 60.0
    """A server that gives no sign of life for so long is restarted (ours) or avoided until it answers (given by URL)."""

    def __post_init__(self) -> None:
        if self.urls == []:
            raise UserError("rollout.servers.urls", [], "is empty", "give http://host:port of each server, or null")
        for url in self.urls or []:
            if not url.startswith(("http://", "https://")):
                raise UserError("rollout.servers.urls", url, "must be http://host:port", "add the scheme")


@section
class RolloutConfig:
    """How responses are sampled in training."""

    engine: Literal["transformers", "sglang", "recorded"] = "transformers"
    """``transformers`` generates in process, each rank its share; ``sglang`` asks SGLang servers; ``recorded`` replays
    the files of ``record``."""
    servers: ServersConfig = Field(default_factory=ServersConfig)
    sglang_cfg: dict[str, Any] = Field(default_factory=dict)
    """Arguments of SGLang's server under its own names: tp_size, mem_fraction_static, max_total_tokens, ..."""
    temperature: float = 1.0
    top_p: float = Field(default=1.0, gt=0, le=1)
    top_k: NonNegativeInt = 0
    max_new_tokens: PositiveInt = 1024
    max_batch_size: PositiveInt = 256
    """Sequences that one rank generates at once (``transformers``)."""
    over_sampling: float = Field(default=1.0, ge=1)
    """Prompts started for each that a step needs (``sglang``). As soon as enough groups are whole the others are stopped,
    and their prompts come again in the next step. Above 1 nobody waits for the slowest response, and short responses are
    favoured a little."""
    record: bool = False
    """Keep every step's rollouts in ``<run>/rollouts/``."""
    recorded_dir: str | None = None
    """Where ``engine: recorded`` reads."""

    def __post_init__(self) -> None:
        if self.temperature <= 0:
            raise UserError(
                "rollout.temperature",
                self.temperature,
                "training samples, so it must be above 0",
                "use 1.0 (greedy decoding belongs to eval.greedy)",
            )
        if (self.engine == "recorded") != (self.recorded_dir is not None):
            raise UserError(
                "rollout.recorded_dir",
                self.recorded_dir,
                "is given exactly when rollout.engine is recorded",
                "set both or neither",
            )
        if self.engine == "transformers" and self.over_sampling > 1:
            raise UserError(
                "rollout.over_sampling",
                self.over_sampling,
                "rollout.engine transformers cannot stop early, so more prompts would only cost time",
                "set it to 1, or use rollout.engine=sglang",
            )
        if self.servers.urls is not None and self.sglang_cfg:
            raise UserError(
                "rollout.sglang_cfg",
                self.sglang_cfg,
                "has no effect on the servers of rollout.servers.urls, which run already",
                "remove one of the two",
            )
        upstream.check_sglang_names(self.sglang_cfg)

    @property
    def starts_servers(self) -> bool:
        """Whether SGLang servers are ours to start and stop."""
        return self.engine == "sglang" and self.servers.urls is None


@section
class DataConfig:
    """Where problems come from and how they are scored."""

    task: str
    """A name from megatron_rl.tasks: gsm8k, word_problems, five_styles."""
    train: str
    """Problem file (.jsonl or .jsonl.gz) to train on."""
    validation: str | None = None
    """Problem file to evaluate on; required by ``eval``."""
    template: str | None = None
    """Prompt template with ``{question}``; null takes the task's own."""
    apply_chat_template: bool = False
    """Wrap the prompt as a user message with the tokenizer's chat template."""
    shuffle: bool = True
    max_prompt_tokens: PositiveInt | None = None
    overlong_prompts: Literal["error", "drop"] = "error"
    """A prompt that leaves no room for ``max_new_tokens`` stops the run, or is left out and counted."""
    num_scoring_workers: PositiveInt = 2
    scoring_timeout_s: PositiveFloat = 10.0
    """Deadline of one score; the worker is killed and the row counted as dropped/score_timeout."""


@section
class EvalConfig:
    """Accuracy on ``data.validation``: pass@k from samples at ``temperature``, and greedy."""

    before: bool = False
    after: bool = False
    every_n_steps: NonNegativeInt = 0
    """0: never during training."""
    num_problems: PositiveInt | None = None
    """The first so many; null takes all."""
    num_samples: PositiveInt = 8
    """Samples per problem before and after training."""
    num_samples_during: PositiveInt = 1
    k_values: list[PositiveInt] = Field(default_factory=lambda: [1, 8])
    greedy: bool = True
    temperature: PositiveFloat = 1.0
    top_p: float = Field(default=1.0, gt=0, le=1)
    baseline: str | None = None
    """An ``eval/step_00000000.json`` of another run on the same problems: keep and explore rates compare with it. null: with
    this run's own evaluation before training, where there is one."""
    pool: str | None = None
    """A pool of samples with log-probs of their model: each evaluation adds how far the policy has gone from that."""
    num_pool_rows: PositiveInt = 256
    """Of ``pool``; the first so many."""

    @property
    def is_used(self) -> bool:
        """Whether the run evaluates at all."""
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


@section
class WeightSyncConfig:
    """How servers get new weights. The in-process engine copies."""

    transport: Literal["auto", "shards", "tensors", "disk"] = "auto"
    """``shards``: each trainer rank sends server ranks what they lack of its shards, and digests of both ends are compared
    before a server serves. ``tensors``: rank 0 gives each server whole tensors. ``disk``: rank 0 writes what has changed into
    ``directory``, and servers load the checkpoint that it makes there. ``auto``: shards to servers that can take them, whole
    tensors to others."""
    directory: str | None = None
    """For ``disk``: on a file system that the servers share."""
    full_every: PositiveInt = 20
    """For ``disk``: versions from one full copy to the next; between them only differences are written."""
    quantization: Literal["fp8_block", "fp8_tensor"] | None = None
    """Servers get their linear layers in eight bits: e4m3 with a scale for each block of 128 x 128, or for each layer. Sent as
    whole tensors."""
    power_of_two_scales: bool = False
    """Of ``quantization``: what e8m0 can hold."""
    pause_mode: Literal["abort", "retract", "in_place"] = "retract"
    """What happens to requests under way, under SGLang's names. ``retract``: they start again from their tokens so far,
    with a fresh cache. ``in_place``: they go on with the old cache, so their next tokens belong to neither version.
    ``abort``: they end and are asked again."""
    bucket_bytes: PositiveInt = 512 * 2**20
    """Whole tensors in one request, or small pieces of shards in one message."""
    timeout_s: PositiveFloat = 600.0
    """Deadline of each request of an update."""

    def __post_init__(self) -> None:
        if (self.transport == "disk") != (self.directory is not None):
            raise UserError(
                "weight_sync.directory",
                self.directory,
                "must be given if weight_sync.transport is disk, and only then",
                "name a directory that trainer and servers share, or use another transport",
            )
        if self.quantization is not None and self.transport in ("shards", "disk"):
            raise UserError(
                "weight_sync.quantization",
                self.quantization,
                f"goes by whole tensors; weight_sync.transport is {self.transport}",
                "set weight_sync.transport to auto or tensors",
            )


@section
class PresampleConfig:
    """``megatron-rl presample``: samples of a model that later runs train on, in ``<run>/presample/``."""

    purpose: Literal["rehearsal", "replay"] = "rehearsal"
    """``rehearsal`` (DPH-RL): of each problem solved ``min_correct`` times or more, one further sample if that is right too,
    with its log-probs; the other problems are ``exploration.jsonl``. ``replay`` (RLEP): of such problems, all right samples."""
    problems: str | None = None
    """Problem file to sample on; null takes ``data.train``."""
    num_problems: PositiveInt | None = None
    """The first so many; null takes all."""
    num_samples: PositiveInt = 8
    min_correct: PositiveInt = 8
    temperature: PositiveFloat = 1.0
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


@section
class Config:
    """One run."""

    trainer: TrainerConfig = Field(default_factory=TrainerConfig)
    exp_manager: ExpManagerConfig = Field(default_factory=ExpManagerConfig)
    policy: PolicyConfig
    rollout: RolloutConfig = Field(default_factory=RolloutConfig)
    algorithm: AlgorithmConfig
    data: DataConfig
    eval: EvalConfig = Field(default_factory=EvalConfig)
    weight_sync: WeightSyncConfig = Field(default_factory=WeightSyncConfig)
    presample: PresampleConfig = Field(default_factory=PresampleConfig)

    @property
    def data_parallel_size(self) -> int:
        """Copies of the model."""
        return self.trainer.world_size // self.policy.model_parallel_size

    @property
    def log_prob_temperature(self) -> float:
        """Temperature of the policy's log-probs: that of its rollouts, where it has some."""
        return self.rollout.temperature if self.trainer.stage == "rl" else 1.0

    @property
    def num_updates_per_step(self) -> int:
        """Optimizer updates in one step."""
        if self.algorithm.num_rows is None:
            return 1
        return self.algorithm.num_epochs * self.algorithm.num_rows // self.policy.train_global_batch_size

    def __post_init__(self) -> None:
        self._check_stage()
        self._check_batch_arithmetic()
        passed = self.weight_sync.quantization or {"disk": "disk", "shards": "shards"}.get(self.weight_sync.transport)
        if passed is not None and self.rollout.engine != "sglang":
            raise UserError(
                "weight_sync",
                passed,
                f"is for servers; rollout.engine is {self.rollout.engine}, which copies the weights in process",
                "set rollout.engine=sglang, or leave weight_sync as it is by default",
            )
        if self.eval.is_used and self.data.validation is None:
            raise UserError(
                "data.validation",
                None,
                "eval is on, so there must be problems to evaluate on",
                "give data.validation=FILE, or switch eval.before, eval.after and eval.every_n_steps off",
            )

    def _check_stage(self) -> None:
        stage = STAGE_OF_ALGORITHM[self.algorithm.name]
        if stage != self.trainer.stage:
            names = [name for name, of in STAGE_OF_ALGORITHM.items() if of == self.trainer.stage]
            raise UserError(
                "algorithm.name",
                self.algorithm.name,
                f"belongs to trainer.stage {stage}, not {self.trainer.stage}",
                f"set trainer.stage={stage}, or choose an algorithm of this stage: {', '.join(names)}",
            )

    def _check_batch_arithmetic(self) -> None:
        model_size = self.policy.model_parallel_size
        world_size = self.trainer.world_size
        if world_size % model_size:
            raise UserError(
                "trainer.devices",
                self.trainer.devices,
                f"devices * num_nodes = {world_size} must be a multiple of the tensor, pipeline and context parallel sizes' "
                f"product = {model_size}",
                f"use a multiple of {model_size}, or smaller parallel sizes in policy.megatron_cfg",
            )
        rows, batch = self.algorithm.num_rows, self.policy.train_global_batch_size
        if rows is not None and rows % batch:
            raise UserError(
                "policy.train_global_batch_size",
                batch,
                f"must divide the rows of a step: num_prompts_per_step * num_generations_per_prompt = {rows}",
                f"use a divisor of {rows}: {rows} makes one update a step",
            )
        # Ranks run equally many micro-batches, none of them empty: a remainder would have to share one with another row,
        # whatever their lengths, and exceed the token budget.
        stored = self.algorithm.num_stored_rows_per_update
        name = "policy.train_global_batch_size" + (" + algorithm.rehearsal.num_rows_per_update" if stored else "")
        if (batch + stored) % self.data_parallel_size:
            raise UserError(
                name,
                batch + stored,
                f"must be a multiple of the data-parallel size = {self.data_parallel_size}, so that ranks get equally "
                "many rows",
                f"use a multiple of {self.data_parallel_size}, or change trainer.devices",
            )
        unit = self.data_parallel_size * self.policy.pipeline_parallel_size
        if self.policy.virtual_pipeline_size > 1 and (batch + stored) % unit:
            raise UserError(
                name,
                batch + stored,
                f"must be a multiple of the data-parallel times the pipeline-parallel size = {unit} under virtual "
                "pipelining, whose schedule takes a micro-batch for every pipeline rank at a time",
                f"use a multiple of {unit}, or leave virtual_pipeline_model_parallel_size out",
            )
        overlong = getattr(self.algorithm, "overlong", None)
        if overlong is not None and overlong.buffer > self.rollout.max_new_tokens:
            raise UserError(
                "algorithm.overlong.buffer",
                overlong.buffer,
                f"must not exceed rollout.max_new_tokens = {self.rollout.max_new_tokens}",
                "shorten the buffer",
            )

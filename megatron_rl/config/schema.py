"""The sections of a config file together, and the rules between them. A default lives with its section and nowhere else.

Section and field names are NeMo's where NeMo has one (``trainer``, ``exp_manager``, ``policy.megatron_cfg``, ...).
"""

from __future__ import annotations

from pydantic import Field, InstanceOf

from megatron_rl import plugins
from megatron_rl.config.best import check_metric
from megatron_rl.config.data import DataConfig, EvalConfig, PresampleConfig
from megatron_rl.config.methods import MethodConfig, check_sizes, names_of_stage, settings_code
from megatron_rl.config.methods.base import OtherSections
from megatron_rl.config.policy import PolicyConfig
from megatron_rl.config.rollout import RolloutConfig, WeightSyncConfig
from megatron_rl.config.section import section
from megatron_rl.config.trainer import ExpManagerConfig, TrainerConfig
from megatron_rl.errors import UserError


@section
class Config:
    """One run."""

    trainer: TrainerConfig = Field(default_factory=TrainerConfig)
    exp_manager: ExpManagerConfig = Field(default_factory=ExpManagerConfig)
    policy: PolicyConfig
    rollout: RolloutConfig = Field(default_factory=RolloutConfig)
    algorithm: InstanceOf[MethodConfig]
    """The class is the one that ``algorithm.name`` names (``find_method``)."""
    data: DataConfig
    eval: EvalConfig = Field(default_factory=EvalConfig)
    weight_sync: WeightSyncConfig = Field(default_factory=WeightSyncConfig)
    presample: PresampleConfig = Field(default_factory=PresampleConfig)

    @property
    def data_parallel_size(self) -> int:
        """Copies of the model."""
        return self.trainer.world_size // self.policy.model_parallel_size

    @property
    def needs_engine(self) -> bool:
        """The run samples, for training or evaluation: a supervised run without evaluation builds no rollout engine."""
        return self.trainer.stage == "rl" or self.eval.is_used

    @property
    def row_unit(self) -> int:
        """Number of rows that gives every data-parallel rank as many micro-batches as its schedule takes at a time."""
        in_flight = self.policy.pipeline_parallel_size if self.policy.virtual_pipeline_size > 1 else 1
        return self.data_parallel_size * in_flight

    @property
    def log_prob_temperature(self) -> float:
        """Temperature of the policy's log-probs: that of its rollouts, where it has some."""
        return self.rollout.temperature if self.trainer.stage == "rl" else 1.0

    @property
    def num_updates_per_step(self) -> int:
        """Optimizer updates in one step."""
        return self.algorithm.num_updates(self.policy.train_global_batch_size)

    def __post_init__(self) -> None:
        self._check_stage()
        check_sizes(self.algorithm)
        self._check_batch_arithmetic()
        self._check_limits()
        self._check_large_servers()
        self._check_gpus()
        with settings_code(self.algorithm.name):
            self.algorithm.check(OtherSections(self.trainer, self.policy, self.rollout, self.data, self.eval))
        sync, is_ours = self.weight_sync, not plugins.is_path(self.rollout.engine)
        usual = {"quantization": (None,), "transport": ("auto", "tensors")}
        changed = {key: getattr(sync, key) for key, values in usual.items() if getattr(sync, key) not in values}
        if changed and is_ours and self.rollout.engine != "sglang":
            key, value = next(iter(changed.items()))
            raise UserError(
                f"weight_sync.{key}",
                value,
                f"is for servers; rollout.engine is {self.rollout.engine}, which copies the weights in process",
                f"set rollout.engine=sglang, or leave weight_sync.{key} out",
            )
        if self.policy.optim.optimizer_cfg.get("optimizer_cpu_offload") and self.trainer.precision != "bf16":
            raise UserError(
                "policy.optim.optimizer_cfg.optimizer_cpu_offload",
                True,
                "needs trainer.precision=bf16: in fp32 Megatron cannot resume from a checkpoint",
                "leave one out",
            )
        if self.eval.is_used and self.data.validation is None:
            raise UserError(
                "data.validation",
                None,
                "eval is on, so there must be problems to evaluate on",
                "give data.validation=FILE, or switch eval.before, eval.after and eval.every_n_steps off",
            )

        if (metric := self.exp_manager.checkpoint_callback_params.metric_name) is not None:
            check_metric(metric, self.eval, self.data.held_out)

    def _check_limits(self) -> None:
        """Check that a weight update ends by its own limit: after those of the ranks that wait for it, nobody could say why."""
        limit_s, trainer = self.weight_sync.timeout_s, self.trainer
        for name in ("timeout_s", "hang_timeout_s"):
            longer_s = getattr(trainer, name)
            if self.rollout.engine == "sglang" and longer_s is not None and limit_s >= longer_s:
                raise UserError(
                    "weight_sync.timeout_s",
                    limit_s,
                    f"must be below trainer.{name} = {longer_s:g}, because the ranks wait for each other in a weight update",
                    "lower it, or raise the other",
                )

    def _check_large_servers(self) -> None:
        """Check that servers over several nodes, and their ranks, come out even."""
        rollout, num_nodes = self.rollout, self.trainer.num_nodes
        size, field = rollout.servers.nodes_per_server, "rollout.servers.nodes_per_server"
        if num_nodes % size:
            rule = f"must divide trainer.num_nodes = {num_nodes}, whose nodes the servers share out"
            raise UserError(field, size, rule, f"set it to a divisor of {num_nodes}")
        if rollout.gpus_per_server % size:
            rule = f"must divide the {rollout.gpus_per_server} GPUs of a server, which its nodes share out"
            raise UserError(field, size, rule, "change it, or rollout.sglang_cfg.tp_size")

    def _check_gpus(self) -> None:
        """Check what holds on GPUs alone: who shares them, and what their attention can do."""
        rollout, policy, trainer = self.rollout, self.policy, self.trainer
        nodes = rollout.servers.nodes_per_server
        spread = f" over {nodes} nodes" if nodes > 1 else ""
        if rollout.is_colocated and trainer.accelerator != "cpu" and rollout.gpus_per_node != trainer.devices:
            raise UserError(
                "rollout.servers.num_per_node",
                rollout.servers.num_per_node,
                f"times the GPUs of a server, rollout.sglang_cfg.tp_size = {rollout.gpus_per_server}{spread}, must be "
                f"trainer.devices = {trainer.devices}, so that each of the trainer's GPUs is shared by one server",
                _fix_of_sharing(trainer.devices, rollout.gpus_per_server, nodes),
            )
        if trainer.accelerator == "gpu" and policy.megatron_cfg.get("transformer_impl") != "local":
            check_attention(trainer.precision, policy.context_parallel_size)

    def _check_stage(self) -> None:
        stage = self.algorithm.stage
        if stage != self.trainer.stage:
            raise UserError(
                "algorithm.name",
                self.algorithm.name,
                f"belongs to trainer.stage {stage}, not {self.trainer.stage}",
                f"set trainer.stage={stage}, or choose an algorithm of this stage: "
                f"{', '.join(names_of_stage(self.trainer.stage))}",
            )
        if stage == "sft" and self.trainer.max_generated_tokens is not None:
            raise UserError(
                "trainer.max_generated_tokens",
                self.trainer.max_generated_tokens,
                "counts sampled tokens; in trainer.stage sft nothing is sampled for training",
                "leave it out, and set trainer.max_steps",
            )

        if self.trainer.max_generated_tokens is not None and self.rollout.over_sampling > 1:
            raise UserError(
                "trainer.max_generated_tokens",
                self.trainer.max_generated_tokens,
                "cannot count what rollout.over_sampling stops under way",
                "set rollout.over_sampling=1, or limit the run by trainer.max_steps",
            )

    @property
    def offloads_during_rollouts(self) -> bool:
        """The trainer frees GPU memory for the rollout engine."""
        chosen = self.trainer.offload_during_rollouts
        return self.rollout.is_colocated if chosen is None else chosen

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
                f"must divide the rows of a step: {self.algorithm.num_rows_formula} = {rows}",
                f"use a divisor of {rows}: {rows} makes one update a step",
            )
        # Ranks run equally many micro-batches, none of them empty: a remainder would have to share one with another row,
        # whatever their lengths, and exceed the token budget.
        stored = self.algorithm.num_stored_rows_per_update
        name = "policy.train_global_batch_size" + (f" + {self.algorithm.stored_rows_formula}" if stored else "")
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


def _fix_of_sharing(devices: int, size: int, nodes: int) -> str:
    """Say how servers share a node's GPUs evenly."""
    if nodes > 1:
        return (
            f"set rollout.sglang_cfg.tp_size to {nodes} * {devices} = {nodes * devices}, or leave nodes_per_server out"
        )
    if devices % size == 0:
        return f"set it to {devices // size}, or rollout.servers.placement=separate with GPUs for servers alone"
    fix = f"set rollout.sglang_cfg.tp_size to a divisor of {devices}, and this to {devices} / tp_size"
    return f"{fix}, or rollout.servers.nodes_per_server to {size // devices}" if size % devices == 0 else fix


def check_attention(precision: str, context_parallel_size: int) -> None:
    """Raise ``UserError`` for what no attention of Transformer Engine computes: float32 over context-parallel ranks."""
    if precision == "fp32" and context_parallel_size > 1:
        raise UserError(
            "policy.megatron_cfg.context_parallel_size",
            context_parallel_size,
            "must be 1 with trainer.precision=fp32 on GPUs: Transformer Engine shares no float32 sequence out",
            "set trainer.precision=bf16, leave it out, or set policy.megatron_cfg.transformer_impl=local",
        )

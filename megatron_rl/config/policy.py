"""Section ``policy``: the model that is trained, its layout, and its optimizer."""

from __future__ import annotations

from pathlib import Path
from typing import Any, Literal

from pydantic import Field, NonNegativeFloat, NonNegativeInt, PositiveFloat, PositiveInt

from megatron_rl.config import upstream
from megatron_rl.config.section import PathText, section
from megatron_rl.convert.architecture.hub import local_folder
from megatron_rl.errors import UserError

DTYPE_BYTES = {"fp32": 4, "fp16": 2, "bf16": 2, "fp8": 1}
"""Types of an optimizer's numbers."""


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
    warmup_fraction: float = Field(default=0.0, ge=0, lt=1)
    """In place of ``warmup_updates``, for runs of any length: W is this share of ``decay_updates``, rounded down."""
    decay_updates: PositiveInt | None = None
    """Updates until ``min_lr``; required by linear and cosine, without effect on constant."""

    @property
    def num_warmup_updates(self) -> int:
        """W."""
        return self.warmup_updates or int(self.warmup_fraction * (self.decay_updates or 0))

    def __post_init__(self) -> None:
        field = "policy.optim.sched.warmup_fraction"
        if self.warmup_fraction and self.warmup_updates:
            raise UserError(field, self.warmup_fraction, "is for runs without warmup_updates", "give one of the two")
        if self.warmup_fraction and self.decay_updates is None:
            raise UserError(field, self.warmup_fraction, "is a share of decay_updates", "set that, or warmup_updates")
        if self.name == "constant":
            return
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
                "shorten the warm-up or lengthen the decay; warmup_fraction fits any length",
            )


@section
class OptimConfig:
    """Megatron's optimizer. Fields beyond these go to ``optimizer_cfg`` under Megatron's names."""

    name: Literal["adam"] = "adam"  # Megatron's distributed optimizer takes no other
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
        upstream.check_fields(
            "policy.optim.optimizer_cfg", self.optimizer_cfg, upstream.OPTIMIZER, owned=upstream.OPTIMIZER_OWNED
        )
        is_aware = self.optimizer_cfg.get("use_precision_aware_optimizer")
        for field, value in self.optimizer_cfg.items():
            allowed = ("fp32", "fp16") if field == "main_params_dtype" else tuple(DTYPE_BYTES)
            if field.endswith("_dtype") and value not in allowed:
                raise UserError(
                    f"policy.optim.optimizer_cfg.{field}",
                    value,
                    f"must be one of {', '.join(allowed)}",
                    "choose one",
                )
            if field.endswith("_dtype") and value != "fp32" and not is_aware:
                raise UserError(
                    f"policy.optim.optimizer_cfg.{field}", value, "must be fp32 without use_precision_aware_optimizer",
                    "set policy.optim.optimizer_cfg.use_precision_aware_optimizer=true, or leave this out",
                )  # fmt: skip
        if self.optimizer_cfg.get("optimizer_cpu_offload") and not is_aware:
            raise UserError(
                "policy.optim.optimizer_cfg.optimizer_cpu_offload", True,
                "needs use_precision_aware_optimizer: without it Megatron cannot resume from a checkpoint",
                "set policy.optim.optimizer_cfg.use_precision_aware_optimizer=true as well",
            )  # fmt: skip


_PARALLEL_SIZES = (
    "tensor_model_parallel_size",
    "pipeline_model_parallel_size",
    "context_parallel_size",
    "expert_model_parallel_size",
    "expert_tensor_parallel_size",
    "virtual_pipeline_model_parallel_size",
)
_RECOMPUTED = ("core_attn", "mlp", "moe", "shared_experts", "mla_up_proj", "layernorm")
"""Megatron's choices, without moe_act, which is for grouped experts."""
_KEPT_LAYERS = ("first_last_layers_bf16", "num_layers_at_start_in_bf16", "num_layers_at_end_in_bf16")
_OF_DELAYED = ("fp8_margin", "fp8_amax_history_len", "fp8_amax_compute_algo", "fp8_wgrad", "tp_only_amax_red")
"""Fields that Megatron takes, and ignores with any other recipe."""
_VALUES = {
    "transformer_impl": ("transformer_engine", "local"),
    "fp8_recipe": ("delayed", "tensorwise", "blockwise", "mxfp8"),
}
"""Values of Megatron's fields that are supported here; Megatron itself takes more."""


@section
class PolicyConfig:
    """The model that is trained."""

    model_path: PathText
    """Hugging Face directory: config.json, tokenizer, and weights unless ``initialization: random``. Or a model of the hub:
    ``ORGANISATION/NAME`` or ``ORGANISATION/NAME@REVISION``, which ``train`` and ``presample`` download into the hub's cache."""
    tokenizer_path: PathText | None = None
    """Another directory, or model of the hub, for the tokenizer."""
    initialization: Literal["pretrained", "random"] = "pretrained"
    megatron_cfg: dict[str, Any] = Field(default_factory=dict)
    """Fields of Megatron's TransformerConfig under their own names: parallel sizes, recompute, fp8, ... The shape of the
    model is not among them: it comes from config.json."""
    ddp_cfg: dict[str, Any] = Field(default_factory=dict)
    """Fields of Megatron's DistributedDataParallelConfig."""
    router_replay: bool = False
    """Routing replay in a model of experts: train through the experts that the rollout chose (R3, arXiv 2510.11370)."""
    optim: OptimConfig = Field(default_factory=OptimConfig)
    train_global_batch_size: PositiveInt = 512
    """Rows of one optimizer update, over all ranks."""
    train_micro_batch_tokens: PositiveInt = 16384
    """Tokens of one forward and backward of one copy of the model (context-parallel ranks share them). The longest prompt
    with ``rollout.max_new_tokens`` has to fit."""

    @property
    def model_dir(self) -> Path:
        """Folder of ``model_path``; of a model of the hub that in the cache, and a ``UserError`` if it has none."""
        return local_folder(self.model_path, field="policy.model_path")

    @property
    def tokenizer_dir(self) -> Path:
        """Folder of the tokenizer, likewise."""
        if self.tokenizer_path is None:
            return self.model_dir
        return local_folder(self.tokenizer_path, field="policy.tokenizer_path")

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
        upstream.check_fields(
            "policy.megatron_cfg", self.megatron_cfg, upstream.TRANSFORMER, owned=upstream.TRANSFORMER_OWNED
        )
        upstream.check_fields("policy.ddp_cfg", self.ddp_cfg, upstream.DDP, owned=upstream.DDP_OWNED)
        for name in _PARALLEL_SIZES:
            value = self.megatron_cfg.get(name)  # null is Megatron's way of leaving one out
            if value is not None and value < 1:
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
        self._check_fp8()
        self._check_activations()
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
        if self.router_replay and self.megatron_cfg.get("moe_router_fusion"):
            raise UserError(
                "policy.megatron_cfg.moe_router_fusion",
                True,
                "chooses experts in a kernel that cannot repeat the rollout's choices",
                "leave it out, or set policy.router_replay=false",
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

    def _check_activations(self) -> None:
        """Recomputed or offloaded."""
        passed = self.megatron_cfg
        modules = passed.get("recompute_modules")
        if modules is not None and (unknown := set(modules) - set(_RECOMPUTED)):
            raise UserError(
                "policy.megatron_cfg.recompute_modules", sorted(unknown), f"must be of {', '.join(_RECOMPUTED)}",
                "choose among them",
            )  # fmt: skip
        if modules is not None and passed.get("recompute_granularity") != "selective":
            raise UserError(
                "policy.megatron_cfg.recompute_modules", modules, "does nothing without recompute_granularity: selective",
                "set that, or leave this out",
            )  # fmt: skip
        if bool(passed.get("cpu_offloading")) != bool(passed.get("cpu_offloading_num_layers")):
            raise UserError(
                "policy.megatron_cfg.cpu_offloading_num_layers", passed.get("cpu_offloading_num_layers", 0),
                "does nothing without cpu_offloading, nor that without a number of layers", "set both, or neither",
            )  # fmt: skip
        if passed.get("cpu_offloading") and (self.pipeline_parallel_size > 1 or passed.get("recompute_granularity")):
            raise UserError(
                "policy.megatron_cfg.cpu_offloading", True,
                "works on one pipeline stage, and without recompute_granularity", "leave it or them out",
            )  # fmt: skip

    def _check_fp8(self) -> None:
        passed = self.megatron_cfg
        for field, values in _VALUES.items():
            if passed.get(field) is not None and passed[field] not in values:
                raise UserError(
                    f"policy.megatron_cfg.{field}",
                    passed[field],
                    f"must be one of {', '.join(values)}",
                    "choose one of them",
                )
        if passed.get("fp8_param") or self.ddp_cfg.get("fp8_param_gather"):
            raise UserError(
                "policy.megatron_cfg.fp8_param", True,
                "is not supported: weights would be loaded, published and saved through their eight bits",
                "leave it out; fp8 without it keeps weights in 16 bits, and multiplies in eight",
            )  # fmt: skip
        if passed.get("fp4"):
            raise UserError("policy.megatron_cfg.fp4", passed["fp4"], "is not supported", "use fp8, or leave it out")
        if passed.get("fp8"):
            recipe = passed.get("fp8_recipe") or "delayed"
            self._check_fp8_options(recipe)
            if passed.get("first_last_layers_bf16") and recipe == "delayed":
                raise UserError(
                    "policy.megatron_cfg.first_last_layers_bf16", True, "does not go with delayed scaling",
                    "set policy.megatron_cfg.fp8_recipe to tensorwise or blockwise",
                )  # fmt: skip
            return
        for field in sorted(passed):
            if field.startswith("fp8_") or field in (*_KEPT_LAYERS, *_OF_DELAYED):
                raise UserError(
                    f"policy.megatron_cfg.{field}", passed[field], "does nothing without policy.megatron_cfg.fp8",
                    "set fp8 to e4m3 or hybrid, or leave this out",
                )  # fmt: skip

    def _check_fp8_options(self, recipe: str) -> None:
        passed = self.megatron_cfg
        ignored = {} if recipe == "delayed" else dict.fromkeys(_OF_DELAYED, "is of fp8_recipe delayed alone")
        if not passed.get("first_last_layers_bf16"):
            ignored |= dict.fromkeys(_KEPT_LAYERS[1:], "does nothing without first_last_layers_bf16")
        ignored["fp8_interval"] = "does nothing in today's Transformer Engine"
        for field, why in ignored.items():
            if field in passed:
                raise UserError(f"policy.megatron_cfg.{field}", passed[field], why, "leave it out")

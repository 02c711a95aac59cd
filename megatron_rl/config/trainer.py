"""Sections ``trainer`` and ``exp_manager``: how long and wide a run is, where it lives and how it resumes."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any, Literal

from pydantic import Field, NonNegativeInt, PositiveFloat, PositiveInt

from megatron_rl.config.section import (
    MAX_PER_MACHINE,
    MAX_SECONDS,
    FolderName,
    PathText,
    PerMachine,
    Seconds,
    Seed,
    section,
)
from megatron_rl.errors import UserError


@section
class NumericsConfig:
    """Looks at the numbers of every linear layer (docs/fp8.md). Limits that are passed are said on the console, and counted."""

    every_n_steps: NonNegativeInt = 0
    """0 never looks."""
    forecast: Literal["tensorwise", "blockwise", "mxfp8"] = "blockwise"
    """Recipe whose effect is reported in a run without FP8."""
    max_underflow_frac: float = Field(default=0.05, ge=0, le=1)
    """Limit on the share of an operand's numbers that become zero."""
    max_overflow_frac: float = Field(default=0.001, ge=0, le=1)
    max_output_error: PositiveFloat = 0.1
    """Limit on the relative error of a layer's output."""


@section
class ProfileConfig:
    """Profiles of steps by torch's profiler, in ``profile/`` of the run's folder. A trace has some 100 MB on a GPU."""

    steps: list[PositiveInt] = Field(default_factory=list)
    """Numbers of the steps, as ``metrics.jsonl`` counts them. The first ones of a run are no example: they compile and fill
    caches."""
    ranks: list[NonNegativeInt] = Field(default_factory=lambda: [0])
    with_shapes: bool = False
    """Record the shapes of operands: larger traces, slower steps."""


@section
class TrainerConfig:
    """Length, width and precision of a run."""

    stage: Literal["rl", "sft"] = "rl"
    accelerator: Literal["auto", "cpu", "gpu"] = "auto"
    """``auto`` takes the GPU where torch sees one."""
    devices: PerMachine = 1
    """Processes on each node: GPUs, or CPU ranks."""
    num_nodes: PositiveInt = 1
    threads_per_rank: int = Field(default=0, ge=0, le=MAX_PER_MACHINE)
    """CPU threads of each process; 0 shares the cores out."""
    precision: Literal["fp32", "bf16"] = "bf16"
    """``bf16`` keeps float32 main weights in the optimizer. CPUs without AMX or AVX-512-BF16 are far faster in fp32."""
    max_steps: PositiveInt = 1000
    max_generated_tokens: PositiveInt | None = None
    """Stop after the step in which so many tokens have been sampled for training, whatever became of them: for comparisons of
    methods at equal cost. ``max_steps`` holds as well."""
    seed: Seed = 1234
    timeout_s: float = Field(default=1800.0, ge=1, le=MAX_SECONDS)
    """A collective that takes longer ends the run."""
    hang_timeout_s: Seconds | None = 900.0
    """Limit after which a run ends, with a message that says who waits for whom (docs/watchdog.md): no rank has made progress
    for this time, or one gives no sign of life. null: never. A phase begun or ended is progress, and so is a progress bar."""

    offload_during_rollouts: bool | None = None
    """Gradients and optimizer state leave the GPU while rollouts are sampled; null does so where servers share the trainer's
    GPUs (``rollout.servers.placement: colocated``)."""
    check_memory: bool = True
    """End at the start if the model, by the estimate of docs/memory.md, needs more than a GPU has. false tries it."""
    numerics: NumericsConfig = Field(default_factory=NumericsConfig)
    profile: ProfileConfig = Field(default_factory=ProfileConfig)

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
    metric_name: str | None = None
    """Metric by which checkpoints are better or worse, ``eval/pass@1``, or ``eval/<set>/greedy``; null: none. A step counts
    whose row has it, so with ``eval.every_n_steps`` those that are evaluated. A value that is not finite is never best."""
    higher_is_better: bool = True
    keep_best: PositiveInt = 1
    """Checkpoints of the best values by ``metric_name`` are kept beside the last ones."""
    async_save: bool = False
    """Write while training goes on, from a copy in main memory. The next one waits for it; the last step waits for its own."""


@section
class RolloutTextsConfig:
    """What the model writes, as text: ``rollouts/step_<number>.jsonl`` and ``eval/step_<number>.jsonl`` (docs/view.md)."""

    every_n_steps: NonNegativeInt = 1
    """0 never writes any."""
    max_rollouts: PositiveInt = 64
    """Rollouts of a step or an evaluation: its first whole groups (prompts are shuffled anyway), at least a part of one."""
    groups_with_tokens: NonNegativeInt = 2
    """Groups whose tokens have their log-probs, advantages, mask and entropy."""
    max_kb_per_step: PositiveInt = 500
    """Kilobytes of a file, whatever the settings above: 1,000 steps are at most 0.5 GB. Token details take half at most."""
    print: NonNegativeInt = 0
    """Rollouts of each recorded step on the console, shortened."""
    to_sinks: NonNegativeInt = 8
    """Rollouts of each recorded step for TensorBoard, W&B and MLflow, where those are on."""


@section
class ExpManagerConfig:
    """Folder of a run, how it resumes, and where its metrics go."""

    exp_dir: PathText = "runs"
    name: FolderName = "default"
    resume_if_exists: bool = True
    """Continue from the last complete checkpoint of this run, if there is one; the same command starts and resumes."""
    resume_from_checkpoint: PathText | None = None
    """One checkpoint directory to start from, until this run has a complete one that descends from it; an incomplete one is an
    error."""
    create_checkpoint_callback: bool = True
    checkpoint_callback_params: CheckpointConfig = Field(default_factory=CheckpointConfig)
    export_hf: bool = True
    """Write ``hf/``, a Hugging Face checkpoint, at the end."""
    rollout_texts: RolloutTextsConfig = Field(default_factory=RolloutTextsConfig)
    export_hf_every_n_steps: NonNegativeInt = 0
    """Write ``hf_step_00000050/`` so often; 0 never. The ``keep_last`` last of them stay, and those of the best steps."""
    export_hf_best: bool = False
    """Write ``hf_best/`` whenever ``metric_name`` has a better value; ``best.json`` says which step and value."""
    create_tensorboard_logger: bool = False
    summary_writer_kwargs: dict[str, Any] = Field(default_factory=dict)
    create_wandb_logger: bool = False
    wandb_logger_kwargs: dict[str, Any] = Field(default_factory=dict)
    create_mlflow_logger: bool = False
    mlflow_logger_kwargs: dict[str, Any] = Field(default_factory=dict)
    sinks: list[str] = Field(default_factory=list)
    """Further metric sinks, ``package.module:CLASS`` each (docs/metrics.md)."""

    @property
    def run_dir(self) -> Path:
        """Folder of the run."""
        return Path(self.exp_dir) / self.name

    def __post_init__(self) -> None:
        if self.export_hf_best and self.checkpoint_callback_params.metric_name is None:
            raise UserError(
                "exp_manager.export_hf_best",
                True,
                "needs a metric that says which weights are best",
                "set exp_manager.checkpoint_callback_params.metric_name, as to eval/pass@1",
            )

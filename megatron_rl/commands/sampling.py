"""The config of a program that samples a model and does not train it, made from one for training."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

from megatron_rl.config import Config
from megatron_rl.config.data import EvalConfig
from megatron_rl.config.methods.grpo import GRPOConfig
from megatron_rl.config.trainer import RolloutTextsConfig


def without_training(
    config: Config, *, exp_dir: str, name: str, train: Sequence[str] | None, evaluation: EvalConfig, start: str | None
) -> Config:
    """Return the config with which nothing is resumed, saved or logged, and no update has to fit.

    Args:
        config: the user's.
        exp_dir: folder of the run's folder.
        name: of the run's folder.
        train: problem files to sample on.
        evaluation: section ``eval``.
        start: checkpoint that has the weights; None: ``policy.model_path`` has them.
    """
    unit = config.data_parallel_size * config.policy.pipeline_parallel_size
    manager = replace(
        config.exp_manager,
        exp_dir=exp_dir,
        name=name,
        resume_if_exists=False,
        resume_from_checkpoint=start,
        create_checkpoint_callback=False,
        export_hf_every_n_steps=0,
        export_hf_best=False,
        rollout_texts=RolloutTextsConfig(every_n_steps=0),
        create_tensorboard_logger=False,
        create_wandb_logger=False,
        create_mlflow_logger=False,
        sinks=[],
    )
    return replace(
        config,
        trainer=replace(config.trainer, stage="rl"),
        exp_manager=manager,
        policy=replace(config.policy, train_global_batch_size=unit),
        algorithm=GRPOConfig(num_prompts_per_step=unit, num_generations_per_prompt=2),
        data=replace(config.data, train=None if train is None else list(train), shuffle=False),
        eval=evaluation,
    )

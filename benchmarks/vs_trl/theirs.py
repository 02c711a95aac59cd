"""One timed run of TRL's GRPOTrainer, in one process of its own environment: ``theirs.py WORK_AS_JSON``."""

from __future__ import annotations

import json
import sys
import tempfile
from pathlib import Path
from typing import Any

import torch
import transformers
import trl
from common import Clock, Work, digit_share
from datasets import Dataset
from transformers import AutoTokenizer, TrainerCallback


class Steps(TrainerCallback):
    """An optimizer update from its first row to its new weights; a step is ``num_updates`` of them."""

    def __init__(self, clock: Clock, num_updates: int) -> None:
        self.clock, self.num_updates = clock, num_updates

    def on_step_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Before the first forward of an update; generation, inside, is taken out again."""
        self.clock.push("update")

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """After the optimizer."""
        self.clock.pop()
        if state.global_step % self.num_updates == 0:
            self.clock.end_step()


def main() -> None:
    """Train, with the clock around the parts of a step."""
    work = Work(**json.loads(sys.argv[1]))
    torch.set_num_threads(work.num_threads)
    root = Path(work.directory)
    prompts = json.loads((root / "prompts.json").read_text())
    clock = Clock()
    with tempfile.TemporaryDirectory() as folder:
        trainer = trl.GRPOTrainer(
            model=str(root / "model"),
            reward_funcs=reward,
            args=settings(work, folder),
            train_dataset=Dataset.from_dict({"prompt": prompts}),
            processing_class=AutoTokenizer.from_pretrained(root / "model"),
            callbacks=[Steps(clock, work.num_updates)],
        )
        trainer.remove_callback(transformers.PrinterCallback)
        trainer.model.generation_config.use_cache = True
        clock.wrap(trainer, "_prepare_inputs", "rest")
        clock.wrap(trainer, "_generate_single_turn", "generate", count=lambda result: sum(map(len, result[0])))
        clock.wrap(trainer, "_get_per_token_logps_and_entropies", "update")
        trainer.train()
    clock.report(torch=torch.__version__, transformers=transformers.__version__, trl=trl.__version__)


def reward(completions: list[str], **_columns: Any) -> list[float]:
    """See ``digit_share``."""
    return [digit_share(text) for text in completions]


def settings(work: Work, folder: str) -> trl.GRPOConfig:
    """TRL at its best, doing what the other side does; vs_trl.py gives the reasons."""
    on_cpu = work.device == "cpu"
    rows_of_update = work.num_rows // work.num_updates
    return trl.GRPOConfig(
        output_dir=folder,
        use_cpu=on_cpu,
        bf16=not on_cpu,
        model_init_kwargs={"dtype": "float32" if on_cpu else "bfloat16", "attn_implementation": work.trl_attention},
        disable_dropout=True,
        gradient_checkpointing=False,
        # one step: generate all rows once, then num_updates updates on equal shares of them
        per_device_train_batch_size=work.trl_batch_size,
        gradient_accumulation_steps=rows_of_update // work.trl_batch_size,
        steps_per_generation=work.num_rows // work.trl_batch_size,
        num_iterations=1,
        max_steps=work.num_steps * work.num_updates,
        num_generations=work.num_generations,
        max_completion_length=work.max_new_tokens,
        temperature=1.0,
        top_p=1.0,
        top_k=0,
        # objective and optimizer
        loss_type="dapo",
        beta=0.0,
        epsilon=0.2,
        epsilon_high=0.2,
        scale_rewards="group",
        optim="adamw_torch_fused",
        learning_rate=1e-6,
        lr_scheduler_type="constant",
        weight_decay=0.0,
        max_grad_norm=1.0,
        # nothing around it
        shuffle_dataset=False,
        dataloader_num_workers=0,
        dataloader_pin_memory=False,
        logging_strategy="no",
        save_strategy="no",
        report_to="none",
        log_completions=False,
        disable_tqdm=True,
        seed=1,
    )


if __name__ == "__main__":
    main()

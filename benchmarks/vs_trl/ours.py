"""One timed run of megatron_rl's own training program, in one process: ``ours.py WORK_AS_JSON``."""

from __future__ import annotations

import json
import sys
import tempfile
from pathlib import Path

from common import Clock, Work, digit_share

from megatron_rl.config.installed import has_transformer_engine
from megatron_rl.tasks.word_problems import WordProblems
from megatron_rl.types import Problem, Score

QUICKSTART = Path(__file__).parent.parent.parent / "examples/quickstart/grpo.yaml"


class DigitProblems(WordProblems):
    """Word problems whose reward a model with random weights can earn."""

    name = "digit_problems"

    def score(self, problem: Problem, response: str) -> Score:
        """Return the share of digits in the response."""
        return Score(digit_share(response))


TASK = DigitProblems()


def main() -> None:
    """Train as ``megatron-rl train`` does, with the clock around the parts of a step."""
    work = Work(**json.loads(sys.argv[1]))
    from megatron_rl.config import load_config
    from megatron_rl.launch.rank import run_rank

    clock = Clock()
    with tempfile.TemporaryDirectory() as folder:
        config = load_config(QUICKSTART, overrides(work, folder))

        def run(runtime: object) -> None:
            attach(clock)
            from megatron_rl.train import train

            train(config, runtime)  # type: ignore[arg-type]

        import torch.distributed as dist

        # A store in a file: no port, so that nothing else on the machine is in the way.
        backend = "gloo" if work.device == "cpu" else "cpu:gloo,cuda:nccl"
        dist.init_process_group(backend, store=dist.FileStore(f"{folder}/store", 1), rank=0, world_size=1)
        status = run_rank(config, run)
    if status:
        sys.exit(status)
    from importlib.metadata import version

    packages = ("torch", "transformers", "megatron-core", "megatron-rl")
    clock.report(**{name: version(name) for name in packages})


def overrides(work: Work, folder: str) -> list[str]:
    """The quickstart's config, with what the comparison fixes."""
    settings = {
        "trainer.devices": 1,
        **(
            {}
            if work.device == "cpu" or has_transformer_engine()
            else {"policy.megatron_cfg.transformer_impl": "local"}
        ),
        "trainer.threads_per_rank": work.num_threads,
        "trainer.accelerator": work.device,
        "trainer.precision": "fp32" if work.device == "cpu" else "bf16",
        "trainer.max_steps": work.num_steps,
        "exp_manager.exp_dir": folder,
        "exp_manager.create_checkpoint_callback": "false",
        "exp_manager.export_hf": "false",
        "policy.model_path": f"{work.directory}/model",
        "policy.train_global_batch_size": work.num_rows // work.num_updates,
        "policy.train_micro_batch_tokens": work.megatron_rl_tokens,
        "policy.optim.lr": 1e-6,
        "policy.optim.sched.warmup_updates": 0,
        "rollout.max_new_tokens": work.max_new_tokens,
        "rollout.max_batch_size": work.num_rows,
        "algorithm.num_prompts_per_step": work.num_prompts,
        "algorithm.num_generations_per_prompt": work.num_generations,
        "algorithm.ratio_clip_max": 0.2,
        "data.task": "ours:TASK",
        "data.train": f"{work.directory}/problems.jsonl",
        "data.validation": "null",
        "data.shuffle": "false",
        "eval.before": "false",
        "eval.after": "false",
        "eval.every_n_steps": 0,
    }
    return [f"{name}={value}" for name, value in settings.items()]


def attach(clock: Clock) -> None:
    """Put the clock around the calls that make up a step of ``run_online``."""
    from megatron_rl.model.policy import Policy
    from megatron_rl.rollout.transformers_engine import TransformersEngine
    from megatron_rl.run import Run

    clock.wrap(
        TransformersEngine,
        "generate",
        "generate",
        count=lambda completions: sum(len(completion.response_ids) for completion in completions),
    )
    clock.wrap(Policy, "fill_log_probs", "update")
    clock.wrap(Policy, "train_step", "update")
    finish_step = Run.finish_step

    def finish_and_end(self: Run, *args: object, **kwargs: object) -> None:
        finish_step(self, *args, **kwargs)  # type: ignore[arg-type]
        clock.end_step()

    Run.finish_step = finish_and_end  # type: ignore[method-assign]


if __name__ == "__main__":
    main()

"""The config of presampling, made from that of the training that follows; and which problems give samples."""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace
from typing import Any

import torch

from megatron_rl.commands.presample import adapt, sample_chunk
from megatron_rl.config import load_config
from megatron_rl.types import Completion, Problem, Prompt, Rollout, RolloutGroup, Score

ONLINE = Path(__file__).parents[3] / "configs" / "online.yaml"


def test_nothing_is_logged_to_the_sinks_of_the_training() -> None:
    paths = ["policy.model_path=m", "data.train=d", "data.task=gsm8k"]
    sinks = ["exp_manager.sinks=[lab.sinks:Board]", "exp_manager.create_wandb_logger=true"]
    manager = adapt(load_config(ONLINE, [*paths, "algorithm.name=grpo", *sinks])).exp_manager
    assert manager.sinks == []
    assert not any(value for name, value in vars(manager).items() if name.endswith("_logger"))


SAMPLES = {  # right, finish reason; three samples of each problem
    "whole": [(1.0, "stop"), (1.0, "stop"), (0.0, "stop")],
    "cut": [(1.0, "stop"), (1.0, "length"), (1.0, "length")],
    "wrong": [(1.0, "stop"), (0.0, "stop"), (0.0, "length")],
}


class PlantedSamples:
    """A collector whose samples are those of ``SAMPLES``."""

    def collect(self, prompts: list[Prompt], *, num_generations: int, **_how: Any) -> list[RolloutGroup]:
        groups = []
        for prompt in prompts:
            said = SAMPLES[prompt.problem.problem_id][:num_generations]
            completions = [Completion(torch.tensor([1]), torch.zeros(1), finish, 0) for _, finish in said]  # type: ignore[arg-type]
            groups.append(RolloutGroup(prompt, [Rollout(c, Score(r)) for c, (r, _) in zip(completions, said)]))
        return groups


def test_a_problem_gives_replays_if_enough_of_its_right_samples_are_whole() -> None:
    paths = ["policy.model_path=m", "data.train=d", "data.task=gsm8k", "algorithm.name=grpo"]
    settings = ["presample.purpose=replay", "presample.num_samples=3", "presample.min_correct=2"]
    run: Any = SimpleNamespace(config=load_config(ONLINE, [*paths, *settings]), rollouts=PlantedSamples())
    prompts = [Prompt(Problem(name, "?", "1"), torch.tensor([1])) for name in SAMPLES]
    verdicts, kept = sample_chunk(run, prompts, 0)
    assert [(v.problem_id, v.num_correct) for v in verdicts] == [("whole", 2), ("cut", 3), ("wrong", 1)]
    assert [v.fate for v in verdicts] == ["kept", *["dropped: fewer than 2 right and whole samples"] * 2]
    assert [trajectory.problem_id for trajectory in kept] == ["whole"] * 2

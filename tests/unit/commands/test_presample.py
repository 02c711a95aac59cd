"""The config of presampling, made from that of the training that follows; and which problems give samples."""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from megatron_rl.commands.presample import _empty_pool, adapt, sample_chunk
from megatron_rl.config import PresampleConfig, load_config
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


def test_a_problem_whose_further_sample_is_wrong_is_still_to_be_learned() -> None:
    paths = ["policy.model_path=m", "data.train=d", "data.task=gsm8k", "algorithm.name=grpo"]
    settings = ["presample.num_samples=2", "presample.min_correct=1"]
    wrong = SimpleNamespace(collect=lambda prompts, *, num_generations, purpose, **_how: further(prompts, purpose))
    run: Any = SimpleNamespace(config=load_config(ONLINE, [*paths, *settings]), rollouts=wrong)
    prompts = [Prompt(Problem(name, "?", "1"), torch.tensor([1])) for name in ("wrong", "cut", "unjudged")]
    verdicts, kept = sample_chunk(run, prompts, 0)
    assert not kept
    assert [verdict.fate for verdict in verdicts] == [
        "exploration", "dropped: right, but cut at the limit", "dropped: the further sample could not be judged",
    ]  # fmt: skip


def further(prompts: list[Prompt], purpose: str) -> list[RolloutGroup]:
    """Return two right samples of each problem, or the further one, which cannot be kept."""
    if not purpose.endswith("/extra"):
        return [group_of(prompt, [("stop", Score(1.0))] * 2) for prompt in prompts]
    ends = {
        "wrong": ("stop", Score(0.0)),
        "cut": ("length", Score(1.0)),
        "unjudged": ("stop", Score(0.0, is_failure=True)),
    }
    return [group_of(prompt, [ends[prompt.problem.problem_id]]) for prompt in prompts]


def group_of(prompt: Prompt, ends: list[tuple[Any, Score]]) -> RolloutGroup:
    completions = [Completion(torch.tensor([1]), torch.zeros(1), end, 0) for end, _ in ends]
    return RolloutGroup(prompt, [Rollout(c, score) for c, (_, score) in zip(completions, ends)])


@pytest.mark.parametrize(
    ("purpose", "least", "reliable", "words"),
    [
        ("rehearsal", 1, 0, "0 of 9 problems were solved so often. Fix: sample more problems or easier ones"),
        ("rehearsal", 4, 0, "so often. Fix: lower it (presample/summary.json has the counts), sample more"),
        ("rehearsal", 4, 2, "and the further sample of each was wrong or cut. Fix: lower it"),
        ("replay", 4, 2, "but none with so many whole responses"),
    ],
)
def test_an_empty_pool_says_what_can_help(purpose: Any, least: int, reliable: int, words: str) -> None:
    settings = PresampleConfig(purpose=purpose, min_correct=least)
    assert words in str(_empty_pool(settings, reliable, 9, Path("presample")))

"""The commands of sample pools, from the command line to the files."""

from __future__ import annotations

import json
import subprocess
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any, cast

import pytest
import torch
import torch.distributed as dist
from click.testing import Result
from transformers import AutoTokenizer
from typer.testing import CliRunner

from megatron_rl.algorithms.grpo import GRPO
from megatron_rl.commands.cli import app
from megatron_rl.config import Config, load_config, save_resolved
from megatron_rl.data.origin import tokenizer_digest
from megatron_rl.data.pool import Pool, PoolWriter, Provenance, Trajectory
from megatron_rl.data.prompts import PromptMaker, tokenize_prompts
from megatron_rl.data.stream import Stream
from megatron_rl.errors import UserError
from megatron_rl.metrics import PhaseTimer
from megatron_rl.rollout.collect import Collector
from megatron_rl.rollout.engine import RolloutEngine
from megatron_rl.rollout.recorded import RecordingEngine
from megatron_rl.scoring.scorer import Scorer
from megatron_rl.tasks.problems import load_problems
from megatron_rl.tasks.word_problems import generate, write_rows
from megatron_rl.tasks.word_tokenizer import ModelSize, save_model
from megatron_rl.types import Completion
from tests.forked import run_ranks

ORIGIN = Provenance("word_problems", "aaaa", "bbbb", {"temperature": 0.7, "top_k": 0})

ROOT = Path(__file__).parents[3]


def build(directory: Path, problem_ids: list[str]) -> Path:
    """Responses of 1, 2, 3, ... tokens, every second one right; the first without log-probs."""
    with PoolWriter(directory, ORIGIN, shard_rows=4) as writer:
        for i, problem_id in enumerate(problem_ids):
            ids = torch.arange(i + 1)
            log_probs = -torch.ones(i + 1) if i else None
            writer.add(Trajectory(problem_id, torch.arange(3), ids, float(i % 2), ref_log_probs=log_probs))
    return directory


def run(*arguments: str | Path) -> Result:
    return CliRunner().invoke(app, ["pool", *map(str, arguments)], env={"COLUMNS": "120"})


def test_inspect_tells_sizes_rewards_problems_and_origin(tmp_path: Path) -> None:
    result = run("inspect", build(tmp_path / "pool", ["a", "b", "a", "a", "b"]))
    assert result.exit_code == 0
    lines = [" ".join(line.strip("\u2502 ").replace("\u2502", " ").split()) for line in result.output.splitlines()]
    for expected in (
        "trajectories 5 in 2 shards, 0.0 MB",
        "prompt tokens mean 3.0, at most 3",
        "response tokens mean 3.0, at most 5",
        "rewards 0: 3 (60.0%)",
        "1: 2 (40.0%)",
        "problems 2",
        "trajectories of a problem 2 to 3, mean 2.5",
        "with reference log-probs 80.0%",
        "task word_problems",
        "model, tokenizer aaaa, bbbb",
        "sampling temperature 0.7, top_k 0",
    ):
        assert expected in lines


def test_many_rewards_are_shown_as_ten_ranges(tmp_path: Path) -> None:
    with PoolWriter(tmp_path / "pool", ORIGIN) as writer:
        for i in range(101):
            writer.add(Trajectory("a", torch.arange(3), torch.arange(1), i / 10))
    output = run("inspect", tmp_path / "pool").output
    assert "0 to 1: 10 (9.9%)" in output and "9 to 10: 11 (10.9%)" in output and "2.5" not in output


def test_verify_names_the_first_damaged_row(tmp_path: Path) -> None:
    path = build(tmp_path / "pool", ["a"] * 7) / "shard_000001" / "data.bin"
    assert "7 trajectories, each as it was written" in run("verify", tmp_path / "pool").output
    data = bytearray(path.read_bytes())
    data[-1] ^= 1
    path.write_bytes(data)
    error = run("verify", tmp_path / "pool").exception
    assert isinstance(error, UserError) and "row 6 of the pool" in str(error)


def test_an_error_is_one_line_and_status_2(tmp_path: Path) -> None:
    command = [sys.executable, "tools/sample_pool.py", "verify", str(tmp_path)]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=60, check=False)
    error = f"error: {tmp_path}: holds no finished shard. Fix: point at a pool, or build one first.\n"
    assert (done.returncode, done.stderr) == (2, error)


def test_merge(tmp_path: Path) -> None:
    one, two = build(tmp_path / "one", ["a", "b"]), build(tmp_path / "two", ["c"])
    result = run("merge", one, two, "--target", tmp_path / "both")
    assert result.exit_code == 0 and "3 trajectories of 2 pools" in result.output
    assert [row.problem_id for row in Pool(tmp_path / "both")] == ["a", "b", "c"]


def test_filter_says_how_many_each_condition_drops(tmp_path: Path) -> None:
    rows = list(generate(3, split="train", seed=0, num_operations=[1]))
    write_rows(tmp_path / "all.jsonl", rows)
    write_rows(tmp_path / "some.jsonl", rows[:2])
    ids = [problem.problem_id for problem in load_problems("word_problems", tmp_path / "all.jsonl")]
    build(tmp_path / "pool", ids * 4)  # rights are 1, 3, 5, ..., of problems 1, 0, 2, 1, 0, 2
    options = ("--min-reward", "1", "--max-response-tokens", "8", "--problems", tmp_path / "some.jsonl")
    result = run("filter", tmp_path / "pool", tmp_path / "good", *options)
    assert result.exit_code == 0, result.exception
    assert result.output.endswith("good: 3 trajectories; dropped: problem 4, reward 4, response_tokens 1\n")
    assert [len(row.response_ids) for row in Pool(tmp_path / "good")] == [2, 4, 8]


# ---------------------------------------------------------------------------------------------------------------- build

NUM_STEPS = 3


class HalfRight:
    """An engine that solves about half of what it is asked, and sometimes does not come to an end."""

    def __init__(self, tokenizer: Any, answers: dict[tuple[int, ...], str]) -> None:
        self._tokenizer, self._answers = tokenizer, answers

    def generate(self, requests: Any, **_how: Any) -> list[Completion]:
        completions = []
        for request in requests:
            answer = self._answers[tuple(request.prompt_ids.tolist())]
            text = f"#### {answer}" if request.seed % 2 else "#### 0 0"
            ids = torch.tensor([*self._tokenizer(text)["input_ids"], self._tokenizer.eos_token_id])
            reason = "length" if request.seed % 5 == 0 else "stop"
            completions.append(Completion(ids, -torch.ones(len(ids)), reason, 0))
        return completions


def config_of(root: Path) -> Config:
    settings = {
        "policy.model_path": root / "model", "policy.train_micro_batch_tokens": 320, "exp_manager.exp_dir": root,
        "exp_manager.name": "run", "data.task": "word_problems", "data.train": root / "train.jsonl",
        "algorithm.overlong.buffer": 0, "algorithm.num_generations_per_prompt": 2, "rollout.record": True,
        "algorithm.use_dynamic_sampling": True, "rollout.temperature": 0.7, "trainer.max_steps": 9,
    }  # fmt: skip
    overrides = [f"{name}={json.dumps(value, default=str)}" for name, value in settings.items()]
    return load_config(Path(__file__).parents[2] / "tiny.yaml", overrides)


def record(root: Path) -> list[list[tuple[str, list[int], list[int], float, str]]]:
    """What the rollouts of each step were: problem, prompt, response, reward, how it ended."""
    config, group = config_of(root), dist.group.WORLD
    assert group is not None
    tokenizer = AutoTokenizer.from_pretrained(root / "model")
    problems = load_problems("word_problems", root / "train.jsonl")
    maker = PromptMaker(tokenizer, config.data, context_length=256, max_new_tokens=12)
    prompts, _ = tokenize_prompts(problems, maker)
    engine = HalfRight(tokenizer, {tuple(p.prompt_ids.tolist()): p.problem.answer for p in prompts})
    recording = RecordingEngine(cast(RolloutEngine, engine), config.exp_manager.run_dir / "rollouts", is_writer=True)
    scorer = Scorer(["word_problems"], tokenizer, num_workers=1, timeout_s=10.0, cpu_group=group)
    collector = Collector(recording, scorer, config.trainer.seed, PhaseTimer())
    algorithm, stream = GRPO(config), Stream(prompts, config.trainer.seed, config.data.shuffle)
    steps = [algorithm.collect(stream, collector, step) for step in range(NUM_STEPS)]
    scorer.close()
    save_resolved(config, config.exp_manager.run_dir / "config.yaml")
    rows = "".join(json.dumps({"step": step + 1}) + "\n" for step in range(NUM_STEPS))
    (config.exp_manager.run_dir / "metrics.jsonl").write_text(rows)
    return [
        [
            (g.prompt.problem.problem_id, g.prompt.prompt_ids.tolist(), r.completion.response_ids.tolist(),
             r.score.reward, r.completion.finish_reason)
            for g in groups for r in g.rollouts
        ]
        for groups in steps
    ]  # fmt: skip


@pytest.fixture(scope="module")
def recorded(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, list[Any]]:
    """A run's folder, and its rollouts by step."""
    root = tmp_path_factory.mktemp("recorded")
    save_model(root / "model", ModelSize(hidden_size=16, num_layers=1))
    write_rows(root / "train.jsonl", generate(40, split="train", seed=0, num_operations=[1]))
    return root, run_ranks(record, 1, root)[0]


def rows_of(directory: Path) -> list[tuple[str, list[int], list[int], float]]:
    return [(r.problem_id, r.prompt_ids.tolist(), r.response_ids.tolist(), r.reward) for r in Pool(directory)]


def test_the_right_rollouts_of_a_recorded_run_become_a_pool(recorded: tuple[Path, list[Any]], tmp_path: Path) -> None:
    root, steps = recorded
    result = run("build", tmp_path / "pool", "--from-rollouts", root / "run" / "rollouts")
    assert result.exit_code == 0, result.exception
    everything = [row for step in steps for row in step]
    ended = [row for row in everything if row[4] == "stop"]
    right = [row[:4] for row in ended if row[3] > 0]
    assert rows_of(tmp_path / "pool") == right and 0 < len(right) < len(ended) < len(everything)
    counts = f"{len(right)} trajectories; dropped: "
    assert counts in result.output and f"unfinished {len(everything) - len(ended)}" in result.output
    assert f"wrong {len(ended) - len(right)}" in result.output
    origin = Pool(tmp_path / "pool").provenance
    assert origin.tokenizer_digest == tokenizer_digest(AutoTokenizer.from_pretrained(root / "model"))
    assert origin.task == "word_problems" and origin.sampling["temperature"] == 0.7


def test_a_pool_may_begin_at_a_later_step_and_take_other_rewards(
    recorded: tuple[Path, list[Any]], tmp_path: Path
) -> None:
    root, steps = recorded
    options = ("--from-rollouts", root / "run" / "rollouts", "--first-step", "2", "--min-reward", "-1")
    assert run("build", tmp_path / "pool", *options).exit_code == 0
    expected = [row[:4] for step in steps[1:] for row in step if row[4] == "stop"]
    assert rows_of(tmp_path / "pool") == expected and {row[3] for row in expected} == {0.0, 1.0}


def test_a_run_whose_model_has_moved(recorded: tuple[Path, list[Any]], tmp_path: Path) -> None:
    root, _ = recorded
    config = config_of(root)
    moved = replace(config, policy=replace(config.policy, model_path=str(tmp_path / "gone")))
    (tmp_path / "run").mkdir()
    (tmp_path / "run" / "rollouts").symlink_to(root / "run" / "rollouts")
    (tmp_path / "run" / "metrics.jsonl").write_text((root / "run" / "metrics.jsonl").read_text())
    save_resolved(moved, tmp_path / "run" / "config.yaml")
    command = ("build", tmp_path / "pool", "--from-rollouts", tmp_path / "run" / "rollouts")
    assert isinstance(run(*command).exception, UserError) and not (tmp_path / "pool").exists()
    assert run(*command, "--model", root / "model").exit_code == 0


def test_nothing_good_enough_is_an_error_and_no_pool(recorded: tuple[Path, list[Any]], tmp_path: Path) -> None:
    root, _ = recorded
    command = ("build", tmp_path / "pool", "--from-rollouts", root / "run" / "rollouts")
    error = run(*command, "--min-reward", "2").exception
    assert isinstance(error, UserError) and "would be empty" in str(error) and not (tmp_path / "pool").exists()
    error = run("build", tmp_path / "pool", "--from-rollouts", tmp_path / "rollouts").exception
    assert isinstance(error, UserError) and not (tmp_path / "pool").exists()

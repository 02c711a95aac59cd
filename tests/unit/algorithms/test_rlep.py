"""Mixed groups: exact advantages, fewer replays where there are fewer successes, and who shares an update."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from megatron_rl.algorithms.rlep import RLEP
from megatron_rl.config import load_config
from megatron_rl.data.pool import Pool, PoolWriter, Provenance, Trajectory
from megatron_rl.data.replay import FoundSuccesses
from megatron_rl.errors import UserError
from megatron_rl.types import Completion, Problem, Prompt, Rollout, RolloutGroup, RowKind, Score
from tests.tiny_models import make_tiny_model

TINY = Path(__file__).parents[2] / "tiny.yaml"


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_tiny_model(tmp_path_factory.mktemp("rlep"), "qwen3", tied=True, seed=1)


def prompt(number: int) -> Prompt:
    return Prompt(Problem(f"p{number}", "?", "1"), torch.tensor([number, 7]))


PROMPTS = [prompt(number) for number in range(1, 5)]


def group(number: int, rewards: list[float], finish: str = "stop") -> RolloutGroup:
    completions = [Completion(torch.tensor([1, number]), torch.zeros(2), finish, 0) for _ in rewards]  # type: ignore[arg-type]
    return RolloutGroup(
        prompt(number), [Rollout(c, Score(r, {"correct": float(r > 0)})) for c, r in zip(completions, rewards)]
    )


def rlep(model: Path, *overrides: str, size: int = 16) -> RLEP:
    return RLEP(
        load_config(
            TINY,
            [
                f"policy.model_path={model}",
                f"policy.train_global_batch_size={size}",
                "algorithm.name=rlep",
                "algorithm.replay.source=online",
                "algorithm.num_prompts_per_step=1",
                f"algorithm.num_generations_per_prompt={size}",
                "algorithm.overlong.buffer=0",
                "algorithm.kl.coef=0",
                *overrides,
            ],
        )
    )


def make_pool(directory: Path, successes: dict[int, int], reward: float = 1.0, length: int = 3) -> Pool:
    with PoolWriter(directory, Provenance("t", "m", "k")) as writer:
        for number, count in successes.items():
            for index in range(count):
                ids = torch.full((length,), 10 + index)
                writer.add(Trajectory(f"p{number}", prompt(number).prompt_ids, ids, reward))
    return Pool(directory)


@pytest.mark.parametrize(
    ("num_correct", "num_replays", "right", "wrong"),
    [(4, 0, 1.67705, -0.55902), (4, 2, 1.37437, -0.68718), (0, 2, 2.74874, -0.34359), (0, 0, None, 0.0)],
)
def test_advantages_of_a_mixed_group(
    model: Path, tmp_path: Path, num_correct: int, num_replays: int, right: float | None, wrong: float
) -> None:
    """The exact numbers of the method's notes: 16 fresh rollouts, so many right, and so many replays."""
    algorithm = rlep(model)
    if num_replays:
        algorithm = rlep(model, "algorithm.replay.source=pool", f"algorithm.replay.pool={tmp_path}")
        algorithm.stored.use_pool(make_pool(tmp_path / "pool", {3: num_replays}), PROMPTS)
    samples = algorithm.samples([group(3, [1.0] * num_correct + [0.0] * (16 - num_correct))], 0)
    assert [sample.kind for sample in samples] == [RowKind.RL] * 16 + [RowKind.REPLAY] * num_replays
    algorithm.assign_advantages(samples)
    for sample in samples:
        expected = right if sample.reward else wrong
        assert sample.advantages is not None and sample.old_log_probs is None
        assert sample.advantages.tolist() == pytest.approx([expected] * sample.num_response_tokens, abs=1e-4)


def test_a_question_with_fewer_successes_gets_fewer_replays(model: Path, tmp_path: Path) -> None:
    algorithm = rlep(model, "algorithm.num_prompts_per_step=3", "algorithm.num_generations_per_prompt=2", size=2)
    algorithm.stored.use_pool(make_pool(tmp_path / "pool", {1: 5, 2: 1}), PROMPTS)
    groups = [group(number, [1.0, 0.0]) for number in (1, 2, 3)]
    samples = algorithm.samples(groups, 0)
    kinds = [
        RowKind.RL,
        RowKind.RL,
        RowKind.REPLAY,
        RowKind.REPLAY,
        RowKind.RL,
        RowKind.RL,
        RowKind.REPLAY,
        RowKind.RL,
        RowKind.RL,
    ]
    assert [sample.kind for sample in samples] == kinds
    assert (
        len({tuple(s.response_ids.tolist()) for s in samples if s.kind is RowKind.REPLAY and s.group_index == 0}) == 2
    )
    assert algorithm.mini_batches(samples) == [[0, 1, 2, 3], [4, 5, 6], [7, 8]]
    metrics = algorithm.step_metrics()
    assert metrics["replay/rows_frac"] == pytest.approx(3 / 9)
    assert metrics["replay/groups_without_frac"] == pytest.approx(1 / 3)


def test_each_group_gets_its_replays_once_wherever_its_rows_stand(model: Path, tmp_path: Path) -> None:
    algorithm = rlep(model, "algorithm.num_prompts_per_step=2", "algorithm.num_generations_per_prompt=2", size=4)
    algorithm.stored.use_pool(make_pool(tmp_path / "pool", {1: 5, 2: 5}), PROMPTS)
    groups = [group(number, [1.0, 0.0]) for number in (1, 2)]
    rows = algorithm.rollouts.rows(groups, 0)
    mixed = algorithm.stored.add([rows[0], rows[2], rows[1], rows[3]], groups, 0)
    assert [row.group_index for row in mixed] == [0] * 4 + [1] * 4
    assert [row.kind for row in mixed] == [RowKind.RL, RowKind.RL, RowKind.REPLAY, RowKind.REPLAY] * 2


def test_the_choice_follows_from_seed_problem_and_step(model: Path, tmp_path: Path) -> None:
    algorithm = rlep(model)
    algorithm.stored.use_pool(make_pool(tmp_path / "pool", {1: 20}), PROMPTS)
    assert algorithm.stored.successes is not None

    def draw(step: int, seed: int = 1) -> list[int]:
        return [int(s.response_ids[0]) for s in algorithm.stored.successes.draw(prompt(1), 4, seed=seed, step=step)]  # type: ignore[union-attr]

    assert draw(0) == draw(0)
    assert len({tuple(draw(step, seed)) for step in range(3) for seed in (1, 2)}) == 6


def test_what_cannot_be_replayed_is_counted_and_said(model: Path, tmp_path: Path) -> None:
    algorithm = rlep(model)
    make_pool(tmp_path / "pool", {1: 2}, length=3)
    make_pool(tmp_path / "pool", {2: 3}, length=13)  # above rollout.max_new_tokens
    make_pool(tmp_path / "pool", {3: 4}, reward=0.0)
    line = algorithm.stored.use_pool(Pool(tmp_path / "pool"), PROMPTS)
    assert (
        "2 successes of" in line
        and "for 1 of 4 training problems" in line
        and "3 left out: too long" in line
        and "4 left out: not a success" in line
    )
    with pytest.raises(UserError, match="no row to replay: 4 not a success, 0 too long"):
        algorithm.stored.use_pool(make_pool(tmp_path / "other", {3: 4}, reward=0.0), PROMPTS)


def test_successes_of_another_prompt_are_refused(model: Path, tmp_path: Path) -> None:
    algorithm = rlep(model)
    with PoolWriter(tmp_path / "pool", Provenance("t", "m", "k")) as writer:
        writer.add(Trajectory("p1", torch.tensor([5, 5, 5]), torch.tensor([1]), 1.0))
    with pytest.raises(UserError, match="answers another prompt of the same problem"):
        algorithm.stored.use_pool(Pool(tmp_path / "pool"), PROMPTS)


def test_a_pool_of_other_problems_is_refused(model: Path, tmp_path: Path) -> None:
    """Else the run would be plain GRPO, in silence."""
    with pytest.raises(UserError, match="knows none of the 4 problems"):
        rlep(model).stored.use_pool(make_pool(tmp_path / "pool", {9: 3}), PROMPTS)
    assert "for 2 of 4 training problems" in rlep(model).stored.use_pool(
        make_pool(tmp_path / "some", {1: 3, 4: 1}), PROMPTS
    )


@pytest.mark.parametrize("override", ["algorithm.kl.coef=0.1", "algorithm.use_dynamic_sampling=true"])
def test_what_replay_would_spoil_is_refused(model: Path, override: str) -> None:
    with pytest.raises(UserError, match="under rlep"):
        rlep(model, override)


def test_online_replays_are_of_earlier_steps_whole_and_bounded(model: Path) -> None:
    algorithm = rlep(model, "algorithm.replay.max_stored_per_prompt=3")
    assert all(sample.kind is RowKind.RL for sample in algorithm.samples([group(1, [1.0] * 4 + [0.0] * 12)], 0))
    assert len(algorithm.stored.found.by_problem["p1"]) == 3
    later = algorithm.samples([group(1, [0.0] * 16)], 1)
    assert [sample.kind for sample in later[16:]] == [RowKind.REPLAY] * 2
    algorithm.stored.found.add([group(2, [1.0] * 16, finish="length")])
    assert "p2" not in algorithm.stored.found.by_problem


def test_found_successes_survive_a_checkpoint() -> None:
    found, again, nothing = (FoundSuccesses(4) for _ in range(3))
    found.add([group(1, [1.0, 0.5]), group(2, [0.0, 1.0])])
    again.load_state(found.state())
    assert again.by_problem.keys() == found.by_problem.keys()
    for name, successes in found.by_problem.items():
        for one, other in zip(successes, again.by_problem[name], strict=True):
            assert torch.equal(one.response_ids, other.response_ids) and one.reward == other.reward
    again.load_state(nothing.state())
    assert again.by_problem == {}
    again.load_state({})

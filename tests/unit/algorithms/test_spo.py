"""SPO's two forms on a world whose values are known: a chain of coin flips, sampled by a toy engine."""

from __future__ import annotations

import itertools
import random
from collections.abc import Sequence
from contextlib import nullcontext
from pathlib import Path

import pytest
import torch

from megatron_rl.algorithms.parts.credit import whiten
from megatron_rl.algorithms.spo_chain import SPOChain
from megatron_rl.algorithms.spo_tree import SPOTree
from megatron_rl.config import Config, load_config
from megatron_rl.data.stream import Stream
from megatron_rl.errors import UserError
from megatron_rl.rollout.collect import Collector
from megatron_rl.rollout.growth import Branch, Expand, Key, grow_by_level
from megatron_rl.types import Completion, Problem, Prompt, Request, RolloutGroup, RowKind, Score, TrainingSample
from tests.policy_case import tiny_yaml
from tests.tiny_models import make_tiny_model

LENGTH, NEEDED = 8, 4
"""A response is eight flips, 1 or 2 (heads); it is right with four heads or more."""
END = 3


def true_value(flips: Sequence[int]) -> float:
    """Chance of a right response from here."""
    rest = LENGTH - len(flips)
    heads = sum(flip == 2 for flip in flips)
    outcomes = itertools.product((1, 2), repeat=rest)
    return sum(heads + sum(f == 2 for f in outcome) >= NEEDED for outcome in outcomes) / 2**rest


class Coins:
    """An engine: flips, the first of each response certain to be tails, then the end. Prompts are one token long."""

    weight_version = 0

    def __init__(self, *, with_end: bool = True) -> None:
        self.num_requests = self.num_recording = 0
        self.with_end = with_end

    def generate(self, requests: Sequence[Request]) -> list[Completion]:
        self.num_requests += len(requests)
        self.num_recording += sum(request.record_experts for request in requests)
        return [self._complete(request) for request in requests]

    def grow(self, seeds: Sequence[Branch], expand: Expand) -> dict[Key, Completion]:
        return grow_by_level(seeds, expand, self.generate)

    def _complete(self, request: Request) -> Completion:
        draw = random.Random(request.seed)
        done = len(request.prompt_ids) - 1
        ids = [draw.choice((1, 2)) for _ in range(LENGTH - done)] + [END] * self.with_end
        if done == 0:
            ids[0] = 1
        log_probs = torch.full((len(ids),), 0.5).log()
        log_probs[[i for i, token in enumerate(ids) if token == END or (i == 0 and done == 0)]] = 0.0
        is_cut = len(ids) > request.max_new_tokens
        ids, log_probs = ids[: request.max_new_tokens], log_probs[: request.max_new_tokens]
        return Completion(torch.tensor(ids), log_probs, "length" if is_cut or not self.with_end else "stop", 0)


class Judge:
    """Heads count; a response whose first flips are in ``broken`` cannot be judged."""

    def __init__(self, broken: Sequence[Sequence[int]] = ()) -> None:
        self.broken = [list(flips) for flips in broken]

    def score(self, prompts: Sequence[Prompt], completions: Sequence[Completion]) -> list[Score]:
        assert len(prompts) == len(completions)
        found = []
        for completion in completions:
            flips = completion.response_ids.tolist()
            is_broken = any(flips[: len(start)] == start for start in self.broken)
            reward = float(sum(flip == 2 for flip in flips) >= NEEDED)
            found.append(Score(reward, {"correct": reward}, is_failure=is_broken, reason="timeout" * is_broken))
        return found


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_tiny_model(tmp_path_factory.mktemp("spo"), "qwen3", tied=True, seed=1)


def load(model: Path, name: str, *overrides: str) -> Config:
    """The smallest run, under another algorithm's section."""
    file = model.parent / f"{name}.yaml"
    file.write_text(tiny_yaml(f"{{name: {name}, num_prompts_per_step: 2}}"))
    common = [f"policy.model_path={model}", "rollout.max_new_tokens=9", "policy.train_global_batch_size=16"]
    return load_config(file, [*common, *overrides])


def collect(algorithm, engine: Coins | None = None, judge: Judge | None = None, *, num_prompts: int = 2, step: int = 0):  # type: ignore[no-untyped-def]
    prompts = [Prompt(Problem(f"p{n}", "?", "1"), torch.tensor([10 + n])) for n in range(num_prompts)]
    collector = Collector(engine or Coins(), judge or Judge(), 1, lambda _name: nullcontext())  # type: ignore[arg-type]
    stream = Stream(prompts, 1, False)
    return algorithm.collect(stream, collector, step), collector


def chain(model: Path, *overrides: str) -> SPOChain:
    return SPOChain(load(model, "spo_chain", *overrides))


def asks_policy(algorithm: SPOChain) -> bool:
    return algorithm.config.algorithm.asks_policy(algorithm.config.rollout)


def tree(model: Path, *overrides: str) -> SPOTree:
    shape = ("algorithm.branch_factors=[3,3]", "algorithm.tokens_per_level=4", "algorithm.num_edges_per_step=16")
    return SPOTree(load(model, "spo_tree", *shape, *overrides))


# ------------------------------------------------------------------------------------------------ chain


@pytest.mark.slow
def test_monte_carlo_converges_at_the_rate_of_one_over_the_root_of_n(model: Path) -> None:
    errors = []
    for count in (4, 64, 1024):
        algorithm = chain(
            model, f"algorithm.num_continuations={count}", "algorithm.partition.kind=tokens",
            "algorithm.partition.size=2",
        )  # fmt: skip
        groups, _ = collect(algorithm)
        found = [
            state.value - true_value(rollout.completion.response_ids[: state.num_tokens].tolist())
            for group in groups
            for rollout in group.rollouts
            for state in rollout.states
            # From the start the first flip is no coin; with all decided there is nothing to estimate.
            if 0 < state.num_tokens < LENGTH
        ]
        assert len(found) == 48
        errors.append(torch.tensor(found).square().mean().sqrt())
    for coarse, fine in itertools.pairwise(errors):  # sixteen times the samples, a quarter of the error
        assert 2.5 < coarse / fine < 6.5
    assert errors[2] < 0.02


def test_borders_are_where_the_coin_is_flipped(model: Path) -> None:
    """Not before the certain first token, nor before the certain end; and equal prefixes are continued once."""
    algorithm, engine = chain(model, "algorithm.partition.size=3", "algorithm.num_continuations=5"), Coins()
    groups, collector = collect(algorithm, engine)
    states = {
        (index, *rollout.completion.response_ids[: state.num_tokens].tolist())
        for index, group in enumerate(groups)
        for rollout in group.rollouts
        for state in rollout.states
    }
    assert all([s.num_tokens for s in r.states] == [1, 4, 7] for g in groups for r in g.rollouts)
    assert (
        len({key for key in states if len(key) == 2}) == 2
    )  # all eight rollouts of a prompt begin with the same token
    assert engine.num_requests == 16 + 5 * len(states)
    assert algorithm.step_metrics()["spo/shared_borders_frac"] == pytest.approx(1 - len(states) / 48)
    # Every response has LENGTH + 1 tokens in all.
    assert collector.num_generated_tokens == 16 * 9 + 5 * sum(9 - (len(key) - 1) for key in states)


def test_rows_carry_segments_and_mask(model: Path) -> None:
    algorithm = chain(model, "algorithm.partition.size=3", "algorithm.whitening=none")
    groups, _ = collect(algorithm)
    rows = algorithm.samples(groups, 0)
    algorithm.assign_advantages(rows)
    for row, rollout in zip(rows, [rollout for group in groups for rollout in group.rollouts], strict=True):
        v1, v4, v7 = (state.value for state in rollout.states)
        reward = rollout.score.reward
        expected = [0, *[v4 - v1] * 3, *[v7 - v4] * 3, *[reward - v7] * 2]
        assert row.advantages.tolist() == pytest.approx(expected)
        assert row.loss_mask.tolist() == [False, *[True] * 7, False]
        assert row.kind is RowKind.RL
    algorithm.assign_weights(rows)
    weights = torch.cat([row.weights for row in rows])
    assert float(weights.sum()) == pytest.approx(1) and set(weights.tolist()) == {0.0, weights.max().item()}
    assert int((weights > 0).sum()) == 16 * 7


def test_a_border_that_cannot_be_judged_is_none(model: Path) -> None:
    """Nor is there a last segment where the rollout itself cannot be judged."""
    judge = Judge(broken=[(1, 2)])
    algorithm = chain(model, "algorithm.partition.size=1", "algorithm.whitening=none")
    groups, _ = collect(algorithm, judge=judge)
    broken = [r for g in groups for r in g.rollouts if r.completion.response_ids[:2].tolist() == [1, 2]]
    assert 0 < len(broken) < 16
    for rollout in broken:
        assert rollout.score.is_failure
        assert [state.value is None for state in rollout.states] == [state.num_tokens > 1 for state in rollout.states]
    rows = algorithm.samples(groups, 0)
    for row in rows:
        if not row.has_reward:  # only its first border could be judged: no segment has two ends
            assert not bool(row.advantages.any()) and row.num_loss_tokens == 0
    # Whitening shifts what counts, and makes nothing of what does not.
    whiten(rows, subtract_mean=True)
    algorithm.assign_weights(rows)
    assert not any(bool(row.weights.any()) for row in rows if not row.has_reward)
    # The border before the second flip is shared by those that can be judged and those that cannot: these do not count.
    assert all(r.states[0].value == pytest.approx(true_value([1, 1]), abs=0.5) for g in groups for r in g.rollouts)


def test_the_share_of_loss_tokens_is_of_all_rows(model: Path) -> None:
    """Only what could not be judged has a mask, where there is no threshold."""
    algorithm = chain(
        model,
        "algorithm.partition.kind=equal",
        "algorithm.partition.size=1",
        "algorithm.selection.max_probability=null",
    )
    groups, _ = collect(algorithm, judge=Judge(broken=[(1, 2, 2, 2)]))
    rows = algorithm.samples(groups, 0)
    unjudged = sum(not row.has_reward for row in rows)
    assert 0 < unjudged < 16 and all((row.loss_mask is None) == row.has_reward for row in rows)
    assert algorithm.step_metrics()["spo/loss_tokens_frac"] == pytest.approx(1 - unjudged / 16)


def test_a_limit_leaves_continuations_what_is_left(model: Path) -> None:
    algorithm = chain(model, "rollout.max_new_tokens=5")
    groups, collector = collect(algorithm)
    assert all(len(rollout.completion.response_ids) == 5 for group in groups for rollout in group.rollouts)
    # One border, after the first token, which all rollouts of a prompt share: nine times the four tokens that are left.
    assert collector.num_generated_tokens == 16 * 5 + 2 * 9 * 4


def test_the_policy_is_asked_where_sampling_is_cut_off(model: Path) -> None:
    assert not asks_policy(chain(model))
    assert asks_policy(chain(model, "rollout.top_p=0.9"))
    assert not asks_policy(chain(model, "rollout.top_p=0.9", "algorithm.selection.probabilities=rollout"))
    for kind in ("equal", "newlines", "tokens"):  # without a mask these look at no probability
        unmasked = (f"algorithm.partition.kind={kind}", "algorithm.selection.max_probability=null")
        assert not asks_policy(chain(model, "rollout.top_p=0.9", *unmasked))
        load(model, "spo_chain", *COLOCATED, *unmasked)
    algorithm = chain(model, "rollout.top_k=3", "algorithm.partition.size=1", "algorithm.num_continuations=2")
    prompts = Stream([Prompt(Problem(f"p{n}", "?", "1"), torch.tensor([10 + n])) for n in range(2)], 1, False)

    def unsure_of_the_fifth(of: Sequence[Prompt], responses: Sequence[torch.Tensor]) -> list[torch.Tensor]:
        assert [int(prompt.prompt_ids) for prompt in of] == [10] * 8 + [11] * 8
        return [torch.where(torch.arange(len(ids)) == 4, -1.0, 0.0) for ids in responses]

    collector = Collector(Coins(), Judge(), 1, lambda _name: nullcontext(), unsure_of_the_fifth)  # type: ignore[arg-type]
    groups = algorithm.collect(prompts, collector, 0)
    assert all([s.num_tokens for s in r.states] == [4] for g in groups for r in g.rollouts)
    for row in algorithm.samples(groups, 0):
        assert row.loss_mask.nonzero()[:, 0].tolist() == [4]


def test_continuations_do_not_record_experts(model: Path) -> None:
    algorithm, engine = chain(model, "policy.router_replay=true"), Coins()
    collect(algorithm, engine)
    assert engine.num_recording == 16 < engine.num_requests


def test_no_cut_point_no_update(model: Path) -> None:
    """With the threshold below every probability nothing is continued, and there is no mini-batch to train on."""
    algorithm, engine = (
        chain(model, "algorithm.partition.threshold=0.1", "algorithm.selection.max_probability=0.1"),
        Coins(),
    )
    groups, _ = collect(algorithm, engine)
    assert engine.num_requests == 16
    assert algorithm.step_metrics()["spo/without_border_frac"] == 1
    rows = algorithm.samples(groups, 0)
    assert not any(bool(row.advantages.any()) for row in rows)
    assert algorithm.updates(rows) == []


def test_naive_segments_and_vineppo_are_settings(model: Path) -> None:
    naive = chain(model, "algorithm.partition.kind=equal", "algorithm.selection.max_probability=null")
    groups, _ = collect(naive)
    assert all([s.num_tokens for s in r.states] == [0, 2, 4, 6] for g in groups for r in g.rollouts)
    assert all(row.loss_mask is None for row in naive.samples(groups, 0))
    lines = chain(model, "algorithm.partition.kind=newlines")
    lines.rollouts.newline_ids = torch.tensor([2])
    groups, _ = collect(lines)
    for group in groups:
        for rollout in group.rollouts:
            ids = rollout.completion.response_ids.tolist()
            assert [s.num_tokens for s in rollout.states] == [0, *(n + 1 for n, token in enumerate(ids) if token == 2)]


def test_the_same_prompt_twice_shares_its_borders(model: Path) -> None:
    algorithm, engine = chain(model, "algorithm.partition.size=3", "algorithm.num_continuations=5"), Coins()
    groups, _ = collect(algorithm, engine, num_prompts=1)  # of which a step wants two
    states = {
        tuple(rollout.completion.response_ids[: state.num_tokens].tolist())
        for group in groups
        for rollout in group.rollouts
        for state in rollout.states
    }
    assert len(groups) == 2 and engine.num_requests == 16 + 5 * len(states)
    assert all(len(rollout.states) == 3 for group in groups for rollout in group.rollouts)


# ------------------------------------------------------------------------------------------------ tree


def leaves(group: RolloutGroup) -> list[list[int]]:
    return [rollout.completion.response_ids.tolist() for rollout in group.rollouts]


def test_a_tree_has_its_shape_and_its_values(model: Path) -> None:
    algorithm, engine = tree(model), Coins()
    groups, collector = collect(algorithm, engine)
    assert engine.num_requests == 2 * (3 + 9)
    assert collector.num_generated_tokens == 2 * (3 * 4 + 9 * 5)
    for group in groups:
        assert len(group.rollouts) == 9 and all(len(flips) == 9 for flips in leaves(group))
        by_path = iter(group.rollouts)
        for child in group.tree.children:
            rewards = []
            for grandchild in child.children:
                rollout = next(by_path)
                path = torch.cat([child.completion.response_ids, grandchild.completion.response_ids])
                assert torch.equal(path, rollout.completion.response_ids)
                assert torch.equal(
                    torch.cat([child.completion.log_probs, grandchild.completion.log_probs]),
                    rollout.completion.log_probs,
                )
                rewards.append(rollout.score.reward)
            assert child.value == pytest.approx(sum(rewards) / 3)
    assert algorithm.step_metrics()["spo/early_leaves_frac"] == 0


def test_rows_are_edges_with_an_advantage(model: Path) -> None:
    algorithm = tree(
        model, "algorithm.whitening=none", "algorithm.num_edges_per_step=64", "policy.train_global_batch_size=64"
    )
    groups, _ = collect(algorithm)
    rows = algorithm.samples(groups, 0)
    of_first_level: dict[tuple[int, ...], list[float]] = {}
    for index, group in enumerate(groups):
        for child in group.tree.children:
            place = (10 + index, *child.completion.response_ids.tolist())
            of_first_level.setdefault(place, []).append(round(child.value - group.tree.value, 5))
    assert 0 < len(rows) < 24
    for row in rows:
        assert row.kind is RowKind.EDGE and bool(row.advantages.any())
        context = row.prompt_ids.tolist()
        assert len(context) in (1, 5) and len(row.response_ids) == (4 if len(context) == 1 else 5)
        if len(context) == 1:
            assert round(float(row.advantages[0]), 5) in of_first_level[(*context, *row.response_ids.tolist())]
    assert algorithm.mini_batches(rows) == [list(range(len(rows)))]


def test_early_ends_are_leaves_and_the_limit_is_one(model: Path) -> None:
    """With nine tokens on the first level, responses end there; with four as the limit, nothing is left to continue."""
    groups, _ = collect(algorithm := tree(model, "algorithm.tokens_per_level=9"))
    assert all(len(group.rollouts) == 3 and not child.children for group in groups for child in group.tree.children)
    assert algorithm.step_metrics()["spo/early_leaves_frac"] == 1
    groups, _ = collect(tree(model, "rollout.max_new_tokens=4"))
    assert all(len(group.rollouts) == 3 for group in groups)
    groups, _ = collect(tree(model, "rollout.max_new_tokens=6"))
    assert all(len(group.rollouts) == 9 and len(flips) == 6 for group in groups for flips in leaves(group))


def test_what_is_not_used_waits_with_the_log_probs_of_its_own_policy(model: Path) -> None:
    algorithm = tree(
        model, "algorithm.num_edges_per_step=4", "algorithm.max_waiting_edges_per_step=4",
        "policy.train_global_batch_size=4",
    )  # fmt: skip
    groups, _ = collect(algorithm)
    rows = algorithm.samples(groups, 0)
    assert algorithm.mini_batches(rows) == [[0, 1, 2, 3]]
    passes = algorithm.passes_ahead(rows)
    assert sorted(row for batch in passes for row in batch) == list(range(len(rows))) == list(range(8))
    for row in rows:
        row.old_log_probs = torch.full((row.num_response_tokens,), -0.7)
    raw = {id(row): row.advantages.clone() for row in rows[4:]}
    algorithm.assign_advantages(rows)
    assert all(torch.equal(row.advantages, raw[id(row)]) for row in rows[4:])  # whitened when used, not before
    again, _ = collect(algorithm, step=1)
    later = algorithm.samples(again, 1)
    old = [row for row in later[:4] if row.old_log_probs is not None]
    assert old and all(id(row) in raw for row in old)
    first = algorithm.passes_ahead(later)
    assert all(later[row].old_log_probs is None for batch in first for row in batch)
    assert algorithm.step_metrics()["spo/edges_fresh_frac"] == pytest.approx(1 - len(old) / 4)


@pytest.mark.parametrize("reward", [None, 1.0], ids=["unjudged", "all alike"])
def test_a_tree_that_agrees_with_itself_teaches_nothing(model: Path, reward: float | None) -> None:
    class Alike(Judge):
        def score(self, prompts: Sequence[Prompt], completions: Sequence[Completion]) -> list[Score]:
            return [Score(reward or 0.0, is_failure=reward is None) for _ in completions]

    algorithm = tree(model)
    groups, _ = collect(algorithm, judge=Alike())
    assert all(group.tree.value == reward for group in groups)
    assert algorithm.samples(groups, 0) == []
    assert algorithm.mini_batches([]) == [] and algorithm.passes_ahead([]) == []
    algorithm.assign_advantages([])


# ------------------------------------------------------------------------------------------------ both


def test_whitening_is_over_loss_tokens(model: Path) -> None:
    def row(values: list[float], mask: list[bool] | None) -> TrainingSample:
        given = None if mask is None else torch.tensor(mask)
        ids = torch.zeros(len(values), dtype=torch.int64)
        return TrainingSample(ids, ids, RowKind.RL, advantages=torch.tensor(values), loss_mask=given)

    rows = [row([5.0, 1.0], [False, True]), row([3.0], None)]
    whiten(rows, subtract_mean=True)
    assert rows[0].advantages.tolist() == pytest.approx([3 / 2**0.5, -1 / 2**0.5], rel=1e-5)
    assert rows[1].advantages.tolist() == pytest.approx([1 / 2**0.5], rel=1e-5)
    rows = [row([5.0, 1.0], [False, True]), row([3.0], None)]
    whiten(rows, subtract_mean=False)
    assert rows[1].advantages.tolist() == pytest.approx([3 / 2**0.5], rel=1e-5)
    equal = [row([0.5, 0.5], None)]
    whiten(equal, subtract_mean=False)
    assert equal[0].advantages.tolist() == [0.5, 0.5]


COLOCATED = ("rollout.engine=sglang", "rollout.top_p=0.9", "rollout.servers.placement=colocated")


@pytest.mark.parametrize(
    ("name", "overrides", "field"),
    [
        ("spo_chain", ("algorithm.kl={coef: 0.1, placement: reward, estimator: k1}",), "algorithm.kl.placement"),
        ("spo_chain", ("rollout.engine=sglang", "rollout.over_sampling=1.5"), "rollout.over_sampling"),
        ("spo_chain", COLOCATED, "algorithm.selection.probabilities"),
        ("spo_chain", ("algorithm.partition={kind: tokens, threshold: 0.5}",), "algorithm.partition.threshold"),
        ("spo_chain", ("algorithm.partition={kind: newlines, size: 5}",), "algorithm.partition.size"),
        ("spo_chain", ("rollout.top_k=5", "policy.router_replay=true"), "algorithm.selection.probabilities"),
        ("spo_tree", ("algorithm.branch_factors=[1,1]",), "algorithm.branch_factors"),
        ("spo_tree", ("policy.router_replay=true",), "policy.router_replay"),
        ("spo_tree", ("algorithm.num_edges_per_step=10",), "policy.train_global_batch_size"),
    ],
)  # fmt: skip
def test_settings_that_do_not_go_together(model: Path, name: str, overrides: tuple[str, ...], field: str) -> None:
    with pytest.raises(UserError) as error:
        load(model, name, *overrides)
    assert error.value.field == field

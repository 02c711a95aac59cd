"""Texts of rollouts: each line has its own row's numbers, whole groups are chosen, files stay small and every line valid."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

import pytest
import torch

from megatron_rl.config.trainer import RolloutTextsConfig
from megatron_rl.errors import UserError
from megatron_rl.launch.folder import RunFolder
from megatron_rl.report.rollout_texts import RolloutTexts, encode
from megatron_rl.report.token_texts import TokenTexts
from megatron_rl.types import (
    Completion,
    Problem,
    Prompt,
    Rollout,
    RolloutGroup,
    RowKind,
    Score,
    TrainingSample,
    TreeNode,
)


class Letters:
    """A tokenizer of letters, whose 0 is a special token."""

    def decode(self, ids: list[int], skip_special_tokens: bool = False) -> str:
        return "".join("#" if token == 0 else chr(96 + token) for token in ids if token or not skip_special_tokens)


def completion(text: str, finish: str = "stop") -> Completion:
    ids = torch.tensor([ord(letter) - 96 for letter in text], dtype=torch.int32)
    return Completion(ids, -torch.arange(1.0, len(ids) + 1), finish, 4)  # type: ignore[arg-type]


def prompt(name: str) -> Prompt:
    return Prompt(Problem(name, "not what the model read", "7"), torch.tensor([1, 0]))


def group(name: str, *texts: str) -> RolloutGroup:
    return RolloutGroup(prompt(name), [Rollout(completion(text), Score(float(i), {"correct": float(i)}))
                                       for i, text in enumerate(texts)])  # fmt: skip


def row(rollout: Rollout, index: int, **fields: Any) -> TrainingSample:
    ids, n = rollout.completion.response_ids, len(rollout.completion.response_ids)
    fields = {"advantages": torch.full((n,), 0.5), "weights": torch.ones(n), "old_log_probs": -torch.ones(n)} | fields
    return TrainingSample(torch.tensor([1, 0]), ids, RowKind.RL, group_index=index, **fields)


def rows_of(groups: list[RolloutGroup]) -> list[TrainingSample]:
    return [row(rollout, i) for i, one in enumerate(groups) for rollout in one.rollouts]


def written(path: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in path.read_bytes().split(b"\n") if line]


def record(tmp_path: Path, groups: list[RolloutGroup], rows: list[TrainingSample], **settings: int) -> list[dict]:
    texts = RolloutTexts(RolloutTextsConfig(**settings), tmp_path, Letters())
    texts.take(groups, rows)
    texts.write(3)
    return written(tmp_path / "rollouts" / "step_00000003.jsonl")


def test_a_line_has_the_text_the_reward_and_the_numbers_of_its_own_row(tmp_path: Path) -> None:
    groups = [group("p", "ab", "cde")]
    first, second = groups[0].rollouts
    mask = torch.tensor([True, False, True])
    rows = [
        row(second, 0, loss_mask=mask, advantages=torch.tensor([1.0, 9.0, 2.0]), entropy=torch.ones(3)),
        row(first, 0),
    ]
    one, two = record(tmp_path, groups, rows)
    assert (one["prompt"], one["response"], one["problem_id"], one["answer"]) == ("a#", "ab", "p", "7")
    assert (one["reward"], one["verdict"], two["verdict"], two["parts"]) == (0.0, "wrong", "right", {"correct": 1.0})
    assert (one["finish"], one["prompt_tokens"], one["response_tokens"], one["weight_version"]) == ("stop", 2, 2, 4)
    assert one["advantage"] == 0.5 and two["advantage"] == 1.5, "a mean over the tokens in the loss"
    assert one["tokens"]["advantage"] == 0.5 and "mask" not in one["tokens"] and "entropy" not in one["tokens"]
    assert two["tokens"] == {
        "text": ["c", "d", "e"], "engine_log_prob": [-1.0, -2.0, -3.0], "log_prob": [-1.0, -1.0, -1.0],
        "entropy": [1.0, 1.0, 1.0], "advantage": [1.0, 9.0, 2.0], "mask": "101",
    }  # fmt: skip


def test_whole_groups_are_written_up_to_the_limit_and_a_part_of_the_first_one_anyway(tmp_path: Path) -> None:
    groups = [group(f"p{i}", *"abcd") for i in range(5)]
    lines = record(tmp_path, groups, rows_of(groups), max_rollouts=11, groups_with_tokens=1)
    assert [line["group"] for line in lines] == [0] * 4 + [1] * 4
    assert [("tokens" in line) for line in lines] == [True] * 4 + [False] * 4
    assert len(record(tmp_path, groups, rows_of(groups), max_rollouts=3)) == 3


def test_a_file_stays_below_its_limit_whatever_the_lengths(tmp_path: Path) -> None:
    groups = [group(f"p{i}", *["abcd" * 100] * 4) for i in range(12)]
    lines = record(tmp_path, groups, rows_of(groups), max_kb_per_step=12, groups_with_tokens=12)
    size = (tmp_path / "rollouts" / "step_00000003.jsonl").stat().st_size
    assert 4000 < size <= 12_000 and any("tokens" not in line for line in lines)
    assert all(sum(line["group"] == other["group"] for other in lines) == 4 for line in lines), "groups are whole"


def test_a_failed_score_has_no_reward_and_a_stored_row_is_with_its_group(tmp_path: Path) -> None:
    groups = [group("p", "ab", "cd")]
    groups[0].rollouts[0] = Rollout(completion("ab", "length"), Score(0.0, reason="timeout", is_failure=True))
    replay = TrainingSample(torch.tensor([1, 0]), torch.tensor([5, 6]), RowKind.REPLAY, reward=1.0, group_index=0,
                            advantages=torch.ones(2), weights=torch.ones(2))  # fmt: skip
    rehearsed = TrainingSample(torch.tensor([2]), torch.tensor([7]), RowKind.REHEARSAL)
    lines = record(tmp_path, groups, [*rows_of(groups), replay, rehearsed])
    assert [line["origin"] for line in lines] == ["rollout", "rollout", "replay", "rehearsal"]
    assert (lines[0]["reward"], lines[0]["verdict"], lines[0]["finish"]) == (None, "failed", "length")
    assert lines[2]["group"] == 0 and lines[2]["problem_id"] == "p" and lines[2]["response"] == "ef"
    assert (lines[3]["prompt"], lines[3]["response"], lines[3]["group"]) == ("b", "g", -1)


def test_a_leaf_of_a_tree_is_the_path_to_it_with_the_numbers_of_each_piece(tmp_path: Path) -> None:
    leaf, other = TreeNode(completion("c"), [], Score(1.0), 1.0), TreeNode(completion("d"), [], Score(0.0), 0.0)
    inner = TreeNode(completion("ab"), [leaf, other], None, 0.5)
    tree = RolloutGroup(prompt("p"), [], TreeNode(None, [inner], None, 0.5))
    assert leaf.completion is not None
    edge = row(Rollout(leaf.completion, Score(1.0)), -1, advantages=torch.tensor([0.5]))
    one, two = record(tmp_path, [tree], [edge])
    assert (one["response"], one["reward"], two["response"], two["reward"]) == ("abc", 1.0, "abd", 0.0)
    assert one["borders"] == [[0, 0.5], [2, 0.5]] and one["tokens"]["mask"] == "001"
    assert one["tokens"]["advantage"] == [0.0, 0.0, 0.5] and one["tokens"]["log_prob"] == [None, None, -1.0]
    assert one["advantage"] == 0.5 and "advantage" not in two, "the other edge is no row"


def test_an_evaluation_has_the_greedy_response_and_a_few_samples_of_each_problem(tmp_path: Path) -> None:
    sampled = [group(f"p{i}", *["ab"] * 8) for i in range(40)]
    greedy = [group(f"p{i}", "cd") for i in range(40)]
    texts = RolloutTexts(RolloutTextsConfig(max_rollouts=9), tmp_path, Letters())
    texts.write_evaluation(0, {"": (sampled, greedy), "hard": (sampled, [])})
    lines = written(tmp_path / "eval" / "step_00000000.jsonl")
    assert [line["origin"] for line in lines] == (["greedy"] + ["sample"] * 3) * 2 + ["sample"] * 9
    assert [line.get("set") for line in lines] == [None] * 8 + ["hard"] * 9
    assert len({line["group"] for line in lines}) == 5, "groups of two sets are different ones"


def test_any_text_is_one_valid_line(tmp_path: Path) -> None:
    line = {"response": "a\n\x85\u2028\u2029\x00 \ud800 é", "reward": math.nan, "parts": {"x": math.inf}}
    data = encode(line)
    assert data.count(b"\n") == 1 and len(data.decode().splitlines()) == 1
    assert json.loads(data) == line | {"reward": "NaN", "parts": {"x": "Infinity"}}


def test_a_disk_error_is_a_user_error_and_zero_writes_nothing(tmp_path: Path) -> None:
    groups = [group("p", "ab")]
    off = RolloutTexts(RolloutTextsConfig(every_n_steps=0), tmp_path, Letters())
    off.write_evaluation(0, {"": (groups, [])})
    assert not off.is_due(3) and not list(tmp_path.iterdir())
    assert [RolloutTexts(RolloutTextsConfig(every_n_steps=2), tmp_path, Letters()).is_due(n) for n in (1, 2)] == [
        False,
        True,
    ]
    (tmp_path / "rollouts").write_text("in the way")
    with pytest.raises(UserError, match=r"exp_manager.rollout_texts.*every_n_steps=0"):
        record(tmp_path, groups, rows_of(groups))


def test_a_resume_drops_the_texts_of_later_steps_and_keeps_recorded_rollouts(tmp_path: Path) -> None:
    (tmp_path / "rollouts").mkdir()
    names = ["step_00000003.jsonl", "step_00000004.jsonl", "rollouts_00.safetensors", "grown_00.safetensors"]
    for name in names:
        (tmp_path / "rollouts" / name).write_text("{}")
    RunFolder(tmp_path, print).start_at(3, [])
    assert {path.name for path in (tmp_path / "rollouts").iterdir()} == {*names} - {"step_00000004.jsonl"}


class Bytes:
    """A tokenizer of bytes that drops a space at the start of a text, as some do."""

    def decode(self, ids: list[int], skip_special_tokens: bool = False) -> str:
        return bytes(ids).decode(errors="replace").removeprefix(" ")


@pytest.mark.parametrize("text", ["a b", "é", "a 日本 b", "🙂🙂", " x", "", "\n\n"])
def test_the_texts_of_tokens_joined_are_the_text(text: str) -> None:
    ids = [*text.encode()]
    assert "".join(TokenTexts(Bytes()).of(ids)) == Bytes().decode(ids)

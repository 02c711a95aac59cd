"""The page of a step: its pieces are the text, its numbers those that training had, and nothing in it can break out."""

from __future__ import annotations

import json
import re
from pathlib import Path

import pytest
import torch

from megatron_rl.advantages.tree import set_values
from megatron_rl.errors import UserError
from megatron_rl.report.tree_record import write_record
from megatron_rl.report.view import write_page
from megatron_rl.types import Completion, Problem, Prompt, Rollout, RolloutGroup, Score, SegmentStart, TreeNode

PROMPT = Prompt(Problem("p1", "What is </script>?", "7"), torch.tensor([1]))


class Letters:
    """A tokenizer of letters."""

    def decode(self, ids: list[int]) -> str:
        return "".join(chr(96 + token) for token in ids)


def completion(text: str, p: float = 0.5, finish: str = "length") -> Completion:
    ids = torch.tensor([ord(letter) - 96 for letter in text])
    return Completion(ids, torch.full((len(ids),), p).log(), finish, 0)  # type: ignore[arg-type]


def test_segments_of_a_chain_follow_each_other(tmp_path: Path) -> None:
    states = (SegmentStart(1, 0.25), SegmentStart(3, None), SegmentStart(4, 0.75))
    group = RolloutGroup(PROMPT, [Rollout(completion("abcdef", finish="stop"), Score(1.0, reason="correct"), states)])
    write_record(tmp_path / "step.json", [group], Letters(), step=3, shaped=lambda reward, n: reward - n / 10)
    record = json.loads((tmp_path / "step.json").read_text())
    assert record["step"] == 3 and record["prompts"][0]["answer"] == "7"
    (pieces,) = record["prompts"][0]["chains"]
    found = [("".join(text for text, _ in piece["tokens"]), piece["value"], piece["advantage"]) for piece in pieces]
    last = pieces[-1]
    assert not any("reward" in piece for piece in pieces[:-1])
    # The reward of six tokens is 0.4; the border without a value is none.
    assert found == [("a", None, 0.0), ("bcd", 0.25, 0.5), ("ef", 0.75, -0.35)]
    assert (last["reward"], last["reason"], last["end"]) == (1.0, "correct", "stop")
    assert last["tokens"][0] == ["e", 0.5]


def test_a_chain_may_be_long(tmp_path: Path) -> None:
    states = tuple(SegmentStart(n, 0.5) for n in range(3000))
    group = RolloutGroup(PROMPT, [Rollout(completion("a" * 3000), Score(1.0), states)])
    write_record(tmp_path / "step.json", [group], Letters(), step=1, threshold=0.7)
    record = json.loads((tmp_path / "step.json").read_text())
    assert len(record["prompts"][0]["chains"][0]) == 3000 and record["threshold"] == 0.7


def test_a_tree_keeps_its_shape(tmp_path: Path) -> None:
    def leaf(text: str, reward: float) -> TreeNode:
        return TreeNode(completion(text), [], Score(reward), value=reward)

    root = TreeNode(None, [TreeNode(completion("ab"), [leaf("c", 1.0), leaf("d", 0.0)]), leaf("x", 0.0)])
    set_values(root)
    write_record(tmp_path / "trees" / "step.json", [RolloutGroup(PROMPT, [], root)], Letters(), step=1)
    first, second = json.loads((tmp_path / "trees" / "step.json").read_text())["prompts"][0]["tree"]
    assert [piece["advantage"] for piece in (first, *first["pieces"], second)] == [0.25, 0.5, -0.5, -0.25]
    assert [piece["value"] for piece in (first, *first["pieces"])] == [0.25, 0.5, 0.5]
    assert "reward" not in first and [piece["reward"] for piece in first["pieces"]] == [1.0, 0.0]


def test_a_record_alone_makes_a_page(tmp_path: Path) -> None:
    group = RolloutGroup(PROMPT, [Rollout(completion("ab"), Score(0.0), ())])
    write_record(tmp_path / "step_00000001.json", [group], Letters(), step=1)
    write_page(tmp_path / "step_00000001.json", tmp_path / "step.html")
    page = (tmp_path / "step.html").read_text()
    assert page.count("</script>") == 2, "the prompt must not end a script"
    data = re.search(r'id="data">(.*?)</script>', page, re.DOTALL)
    assert data is not None
    (shown,) = json.loads(data.group(1))["pages"]
    assert shown["record"] == json.loads((tmp_path / "step_00000001.json").read_text())


@pytest.mark.parametrize("text", ["", "{}", '{"step": 1}', "[1]"])
def test_another_file_is_refused(tmp_path: Path, text: str) -> None:
    (tmp_path / "other.json").write_text(text)
    with pytest.raises(UserError, match="no record of a step"):
        write_page(tmp_path / "other.json", tmp_path / "page.html")
    with pytest.raises(UserError, match="does not exist"):
        write_page(tmp_path / "missing.json", tmp_path / "page.html")

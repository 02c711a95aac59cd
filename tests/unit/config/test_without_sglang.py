"""A laptop without SGLang plans and checks recipes that start servers; only a start asks for it."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest

from megatron_rl.commands import cli
from megatron_rl.commands.verbs import run_verb
from megatron_rl.config import check_files, load_config, upstream
from megatron_rl.errors import UserError

ROOT = Path(__file__).parents[3]
RECIPE = ROOT / "configs/grpo_qwen2.5_32b.yaml"
FURTHER = ["policy.model_path=m", "data.train=x.jsonl", "data.task=gsm8k"]


@pytest.fixture(autouse=True)
def no_sglang(monkeypatch: pytest.MonkeyPatch) -> None:
    """As on a machine where it is not installed."""
    find = upstream.importlib.util.find_spec
    monkeypatch.setattr(upstream.importlib.util, "find_spec", lambda name: None if name == "sglang" else find(name))
    upstream.sglang_fields.cache_clear()
    monkeypatch.setattr(upstream, "platform", lambda: "gpu")
    yield
    upstream.sglang_fields.cache_clear()


def test_check_says_what_it_did_not_check(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.setattr(sys, "argv", ["megatron-rl", "check", "--no-files", str(RECIPE), *FURTHER])
    assert run_verb(cli.app) == 0
    said = capsys.readouterr()
    assert "sglang_cfg" in said.out
    notes = [line for line in said.err.splitlines() if line.startswith("note: ")]
    assert len(notes) == 1 and "SGLang is not installed here" in notes[0] and "tp_size" in notes[0]


def test_what_is_ours_to_say_is_checked_all_the_same() -> None:
    for setting, words in (("tp_size=0", "at least 1"), ("api_key=k", "drawn at random")):
        with pytest.raises(UserError, match=words):
            load_config(RECIPE, [*FURTHER, f"rollout.sglang_cfg.{setting}"])


@pytest.mark.parametrize(("placement", "has_other_way"), [("colocated", False), ("separate", True)])
def test_a_start_asks_for_it_and_names_a_way_that_is_open(placement: str, has_other_way: bool) -> None:
    config = load_config(RECIPE, [*FURTHER, f"rollout.servers.placement={placement}"])
    with pytest.raises(UserError) as caught:
        check_files(config)
    text = str(caught.value)
    assert "needs SGLang, which is not installed here" in text and "make sglang PLATFORM=gpu" in text
    assert ("rollout.servers.urls" in text) == has_other_way


def test_no_servers_no_question() -> None:
    config = load_config(ROOT / "tests/tiny.yaml", ["policy.model_path=m"])
    assert upstream.unchecked_note(config.rollout.sglang_cfg) is None
    with pytest.raises(UserError, match=r"policy\.model_path"):
        check_files(config)

"""Presampling, rehearsal and replay as a user runs them: resumed after a kill, refused with other models, nothing silent."""

from __future__ import annotations

import json
import os
import shutil
import signal
import subprocess
import sys
import time
from dataclasses import replace
from pathlib import Path

import pytest
from transformers import AutoTokenizer

from megatron_rl.data.pool import Pool, merge
from tests.e2e.conftest import Case
from tests.forked import run_ranks
from tests.tiny_models import make_tiny_model

TASK = ("data.task=tests.e2e.parity_task:TASK", "algorithm.kl.coef=0", "algorithm.overlong.buffer=0")
SPLIT = (
    "presample.num_samples=3",
    "presample.min_correct=3",
    "presample.chunk_size=8",
    "rollout.max_new_tokens=12",
    "policy.train_micro_batch_tokens=320",
)


@pytest.fixture
def case(case: Case) -> Case:
    """With a model that stops after a few tokens: every third one is an end."""
    model = case.root / "model"
    shutil.copytree(case.model, model)
    config = json.loads((model / "config.json").read_text())
    (model / "config.json").write_text(json.dumps(config | {"eos_token_id": list(range(0, 120, 3))}))
    return replace(case, model=model)


def presample(case: Case, *overrides: str, ranks: int = 1) -> list[int]:
    overrides = (f"trainer.devices={ranks}", f"presample.problems={case.train}", *TASK, *SPLIT, *overrides)
    return run_ranks(run_presample, ranks, case.arguments(*overrides), timeout_s=120)


def run_presample(arguments: list[str]) -> int:
    from megatron_rl.commands.presample import main

    return main(["--config", *arguments])


def folder(case: Case, name: str = "tiny") -> Path:
    return case.root / name / "presample"


def rehearse(case: Case, *overrides: str, ranks: int = 1) -> list[int]:
    settings = (
        "algorithm.name=dph_rl",
        f"algorithm.rehearsal.pool={folder(case) / 'pool'}",
        "algorithm.rehearsal.num_rows_per_update=2",
        "algorithm.num_prompts_per_step=4",
        "algorithm.num_generations_per_prompt=4",
        f"data.train={folder(case) / 'exploration.jsonl'}",
        "rollout.max_new_tokens=12",
        "policy.train_micro_batch_tokens=320",
    )
    return case.run(*TASK, *settings, *overrides, ranks=ranks)


def test_from_presampling_to_rehearsal(case: Case) -> None:
    assert presample(case, ranks=2) == [0, 0]
    summary = json.loads((folder(case) / "summary.json").read_text())
    pool = Pool(folder(case) / "pool")
    explored = (folder(case) / "exploration.jsonl").read_text().splitlines()
    assert len(pool) == summary["fates"]["kept"] and len(explored) == summary["fates"]["exploration"]
    assert sum(summary["fates"].values()) == summary["num_problems"] == 24
    assert set(explored) < set(case.train.read_text().splitlines())
    assert all(row.ref_log_probs is not None and row.reward == 1 for row in pool)

    one_update = ("policy.train_global_batch_size=16", "algorithm.rehearsal.num_rows_per_update=4")
    assert rehearse(case, "exp_manager.name=dph", *one_update, ranks=2) == [0, 0]
    rows = case.rows("dph")
    # The stored log-probs are those of this very model: before the first update the divergence is nothing but rounding.
    assert 0 <= rows[0]["rehearsal/divergence"] < 1e-9 and abs(rows[0]["rehearsal/log_ratio"]) < 1e-5
    assert rows[-1]["rehearsal/forward_kl"] > 1e-7
    assert all(row["rehearsal/rows_frac"] == pytest.approx(0.2) for row in rows)
    assert all(row["ratio/first_update_max_abs_log_ratio"] == 0.0 for row in rows)
    assert all(row["num_rollouts"] == 16 for row in rows)


def test_presampling_goes_on_where_it_was_killed(case: Case) -> None:
    assert presample(case, "exp_manager.name=whole") == [0]
    command = [
        sys.executable, "-m", "megatron_rl.commands.cli", "presample",
        *case.arguments("trainer.devices=1", f"presample.problems={case.train}", *TASK, *SPLIT),
    ]  # fmt: skip
    with subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL) as process:
        deadline = time.monotonic() + 120
        while not list(folder(case).glob("chunks/*.json")) and time.monotonic() < deadline:
            time.sleep(0.05)
        os.kill(process.pid, signal.SIGKILL)
    assert list(folder(case).glob("chunks/*.json"))
    assert presample(case) == [0]
    for name in ("summary.json", "exploration.jsonl"):
        assert (folder(case) / name).read_text() == (folder(case, "whole") / name).read_text()
    one, other = Pool(folder(case) / "pool"), Pool(folder(case, "whole") / "pool")
    assert [row.problem_id for row in one] == [row.problem_id for row in other]
    for a, b in zip(one, other):
        assert (
            a.response_ids.tolist() == b.response_ids.tolist() and a.ref_log_probs.tolist() == b.ref_log_probs.tolist()
        )


def test_a_begun_folder_is_not_continued_with_other_settings(case: Case, capfd: pytest.CaptureFixture[str]) -> None:
    assert presample(case) == [0]
    assert presample(case, "presample.min_correct=2") == [2]
    assert "was begun with other settings: min_correct" in capfd.readouterr().err


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        (("data.task=gsm8k",), "leaves the pool empty: 0 of 24 problems were solved so often"),
        (("data.task=tests.e2e.parity_task:ALWAYS",), "leaves nothing to explore"),
    ],
)
def test_a_split_with_an_empty_side_is_an_error(
    case: Case, capfd: pytest.CaptureFixture[str], overrides: tuple[str, ...], message: str
) -> None:
    assert presample(case, *overrides) == [2]
    assert message in capfd.readouterr().err
    assert (folder(case) / "summary.json").is_file(), "the counts are there to choose a threshold by"


def test_a_pool_of_another_model_is_refused_and_a_damaged_one(case: Case, capfd: pytest.CaptureFixture[str]) -> None:
    assert presample(case) == [0]
    other = make_tiny_model(
        case.root / "other", "qwen3", tied=True, seed=4, tokenizer=True, max_position_embeddings=512
    )
    assert rehearse(case, "exp_manager.name=dph", f"policy.model_path={other}") == [2]
    assert "comes from another model" in capfd.readouterr().err
    retold = shutil.copytree(case.model, case.root / "retold")  # the same weights under a tokenizer with one more token
    tokenizer = AutoTokenizer.from_pretrained(retold)
    tokenizer.add_tokens(["seventeen"])
    tokenizer.save_pretrained(retold)
    assert rehearse(case, "exp_manager.name=dph", f"policy.model_path={retold}") == [2]
    assert "another tokenizer" in capfd.readouterr().err
    measured = ("algorithm.name=grpo", f"eval.pool={folder(case) / 'pool'}", "eval.every_n_steps=2")
    held_out = (f"data.validation={case.held_out}", f"policy.model_path={retold}", "exp_manager.name=probed")
    assert case.run(*TASK, *measured, *held_out) == [2]
    assert "another tokenizer" in capfd.readouterr().err
    assert rehearse(case, "exp_manager.name=dph", "algorithm.rehearsal.pool=nowhere") == [2]
    assert "algorithm.rehearsal.pool" in capfd.readouterr().err
    data = next((folder(case) / "pool").glob("shard_*/data.bin"))
    content = bytearray(data.read_bytes())
    for position in range(0, len(content), 16):
        content[position] ^= 1
    data.write_bytes(content)
    assert rehearse(case, "exp_manager.name=dph", ranks=2) == [2, 2]
    assert "checksum" in capfd.readouterr().err
    data.write_bytes(content[:-8])
    assert rehearse(case, "exp_manager.name=dph") == [2]
    assert str(data.parent) in capfd.readouterr().err


@pytest.mark.parametrize("method", ["rehearsal", "replay"])
def test_four_steps_are_two_and_two(case: Case, method: str) -> None:
    if method == "rehearsal":
        assert presample(case) == [0]

    def go(name: str, *overrides: str) -> None:
        if method == "rehearsal":
            assert rehearse(case, f"exp_manager.name={name}", *overrides) == [0]
        else:
            online = (
                "algorithm.name=rlep",
                "algorithm.replay.source=online",
                "rollout.max_new_tokens=12",
                "policy.train_micro_batch_tokens=320",
            )
            few = ("algorithm.num_prompts_per_step=4", "algorithm.num_generations_per_prompt=4")
            short = f"data.train={case.root / 'few.jsonl'}"  # prompts come again within the four steps
            (case.root / "few.jsonl").write_text("".join(case.train.read_text().splitlines(keepends=True)[:6]))
            assert case.run(*TASK, *online, *few, short, f"exp_manager.name={name}", *overrides) == [0]

    go("whole", "trainer.max_steps=4")
    go("parts", "trainer.max_steps=2")
    go("parts", "trainer.max_steps=4")
    assert case.rows("parts") == case.rows("whole")
    if method == "replay":
        assert case.rows("whole")[0]["replay/rows_frac"] == 0.0 and case.rows("whole")[-1]["replay/rows_frac"] > 0.0


def test_a_pool_that_changed_since_the_checkpoint_is_named(case: Case, capfd: pytest.CaptureFixture[str]) -> None:
    assert presample(case) == [0]
    assert rehearse(case, "exp_manager.name=dph", "trainer.max_steps=2") == [0]
    other = folder(case, "other") / "pool"
    merge([folder(case) / "pool", folder(case) / "pool"], other)
    capfd.readouterr()
    settings = ("exp_manager.name=dph", f"algorithm.rehearsal.pool={other}", "trainer.max_steps=4")
    assert rehearse(case, *settings) == [2]
    assert "algorithm.rehearsal.pool" in (error := capfd.readouterr().err) and "whose content was another" in error


def test_evaluation_measures_the_distance_to_a_pool(case: Case, capfd: pytest.CaptureFixture[str]) -> None:
    assert presample(case) == [0]
    measured = (
        f"data.validation={case.held_out}", "eval.before=true", "eval.after=true", "eval.num_problems=4",
        "eval.num_samples=2", "eval.k_values=[1,2]", f"eval.pool={folder(case) / 'pool'}", "policy.optim.lr=1e-2",
    )  # fmt: skip
    assert case.run(*TASK, *SPLIT[3:], *measured, "exp_manager.name=grpo", ranks=2) == [0, 0]
    rows = case.rows("grpo")
    assert 0 <= rows[0]["eval/pool_forward_kl"] < 1e-9 and rows[-1]["eval/pool_forward_kl"] > 1e-3
    assert case.run(*TASK, *SPLIT[3:], *measured, "rollout.temperature=0.5", "exp_manager.name=cold") == [2]
    assert "eval.pool" in (error := capfd.readouterr().err) and "log-probs at temperature 1.0" in error


def test_phase_one_to_phase_two(case: Case) -> None:
    settings = ("presample.purpose=replay", "presample.min_correct=1", "presample.num_samples=4")
    assert presample(case, *settings, ranks=2) == [0, 0]
    pool = Pool(folder(case) / "pool")
    assert max(len(rows) for rows in pool.rows_of_problems().values()) > 1
    # Phase 2 starts from another model: only the tokens must be the same.
    other = make_tiny_model(
        case.root / "other", "qwen3", tied=True, seed=4, tokenizer=True, max_position_embeddings=512
    )
    replay = (
        "algorithm.name=rlep",
        f"algorithm.replay.pool={folder(case) / 'pool'}",
        "rollout.max_new_tokens=12",
        "policy.train_micro_batch_tokens=320",
    )
    assert case.run(*TASK, *replay, f"policy.model_path={other}", "exp_manager.name=two", ranks=2) == [0, 0]
    rows = case.rows("two")
    assert all(row["ratio/first_update_max_abs_log_ratio"] == 0.0 for row in rows)
    assert all(row["replay/rows_frac"] > 0 and row["num_rollouts"] == 16 for row in rows)

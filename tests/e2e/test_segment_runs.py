"""SPO with the real engine and trainer: exact ratios, a resume to the bit, one result on one and two ranks, a token budget."""

from __future__ import annotations

import json
import subprocess
import sys

import pytest

from tests.e2e.conftest import Case

CHAIN = (
    "{name: spo_chain, num_prompts_per_step: 2, num_generations_per_prompt: 4, num_continuations: 3, "
    "overlong: {buffer: 12}}"
)
TREE = (
    "{name: spo_tree, num_prompts_per_step: 2, branch_factors: [3, 3], tokens_per_level: 4, num_edges_per_step: 8, "
    "overlong: {buffer: 12}}"
)
MASKED = (
    "{name: grpo, num_prompts_per_step: 2, num_generations_per_prompt: 4, "
    "selection: {max_probability: 0.05}, overlong: {buffer: 12}}"
)


@pytest.mark.parametrize("algorithm", [CHAIN, TREE, MASKED], ids=["chain", "tree", "masked"])
def test_four_steps_are_two_and_two(case: Case, algorithm: str) -> None:
    spo = case.with_algorithm(algorithm)
    # In twelve tokens hardly any response ends, and most are worth the same.
    longer = ("rollout.max_new_tokens=30", "algorithm.overlong.buffer=30")
    keep = () if algorithm == MASKED else ("algorithm.save_every_n_steps=2",)
    assert spo.run("exp_manager.name=whole", *longer, *keep) == [0]
    assert spo.run("exp_manager.name=parts", "trainer.max_steps=2", *longer) == [0]
    assert spo.run("exp_manager.name=parts", *longer) == [0]
    assert spo.rows("whole") == spo.rows("parts")
    rows = spo.rows("whole")
    assert [row["step"] for row in rows] == [1, 2, 3, 4]
    assert rows[0]["ratio/first_update_max_abs_log_ratio"] == 0.0
    assert any(row["grad_norm"] > 0 for row in rows)
    if algorithm == TREE:  # edges waited at the cut, and were used after it
        assert rows[1]["spo/edges_kept"] > 0 and any(row["spo/edges_staleness"] > 0 for row in rows[2:])
    if keep:
        trees = spo.root / "whole/trees"
        assert sorted(path.name for path in trees.iterdir()) == ["step_00000002.json", "step_00000004.json"]
        command = [sys.executable, "-m", "megatron_rl.commands.cli", "view", str(trees / "step_00000004.json")]
        subprocess.run(command, check=True, capture_output=True)
        assert ("chains" if algorithm == CHAIN else "tree") in json.loads((trees / "step_00000004.json").read_text())[
            "prompts"
        ][0]
        assert (trees / "step_00000004.html").read_text().startswith("<!doctype html>")
    total = [row["rollout/generated_tokens_total"] for row in rows]
    assert total == [sum(row["rollout/generated_tokens"] for row in rows[: n + 1]) for n in range(4)]


@pytest.mark.parametrize(
    ("algorithm", "layout"),
    [(CHAIN, "data"), (TREE, "data"), (TREE, "context")],
    ids=["chain-data", "tree-data", "tree-context"],
)
def test_two_ranks_give_the_result_of_one(case: Case, algorithm: str, layout: str) -> None:
    """From recorded rollouts: what differs is the trainer's doing."""
    spo = case.with_algorithm(algorithm)
    assert spo.run("exp_manager.name=one", "rollout.record=true", "trainer.max_steps=2") == [0]
    replay = ("rollout.engine=recorded", f"rollout.recorded_dir={case.root}/one/rollouts", "trainer.max_steps=2")
    parallel = () if layout == "data" else (f"policy.megatron_cfg.{layout}_parallel_size=2",)
    assert spo.run("exp_manager.name=two", *replay, *parallel, ranks=2) == [0, 0]
    one, two = spo.rows("one"), spo.rows("two")
    same = ("reward/mean", "rollout/generated_tokens", "advantages/abs_mean", "loss", "grad_norm", "spo/edges_used")
    assert any(row.get("grad_norm", 0) > 0 for row in one)
    for mine, theirs in zip(one, two, strict=True):
        for name in same:
            if name in mine:
                assert theirs[name] == pytest.approx(mine[name], rel=1e-4, abs=1e-6), name


def test_the_policy_can_be_asked_for_cut_points(case: Case) -> None:
    spo = case.with_algorithm(CHAIN)
    assert spo.run("exp_manager.name=rollout", "trainer.max_steps=1") == [0]
    assert spo.run(
        "exp_manager.name=policy", "trainer.max_steps=1", "algorithm.selection.probabilities=policy", ranks=2
    ) == [
        0,
        0,
    ]
    mine, theirs = spo.rows("rollout")[0], spo.rows("policy")[0]
    assert theirs["spo/borders_per_rollout"] == mine["spo/borders_per_rollout"] > 0
    assert theirs["loss"] == pytest.approx(mine["loss"], rel=1e-4, abs=1e-6)


def test_a_budget_of_tokens_ends_the_run(case: Case) -> None:
    """After the step that spends it, with everything that a last step has; and the same command finds nothing left to do."""
    spo = case.with_algorithm(CHAIN)
    common = ("data.validation=" + str(case.held_out), "eval.num_samples=2", "eval.k_values=[1,2]", "eval.after=true")
    assert spo.run("exp_manager.name=probe", "trainer.max_steps=2") == [0]
    first, second = (row["rollout/generated_tokens"] for row in spo.rows("probe"))
    budget = f"trainer.max_generated_tokens={int(first + second)}"
    assert spo.run(budget, "trainer.max_steps=100", *common) == [0]
    rows = spo.rows()
    assert [row["step"] for row in rows if "loss" in row] == [1, 2]
    assert any("eval/pass@1" in row for row in rows)
    summary = json.loads((case.root / "tiny" / "summary.json").read_text())
    assert summary["steps"] == 2
    assert spo.run(budget, "trainer.max_steps=100", *common) == [0]
    assert [row["step"] for row in spo.rows() if "loss" in row] == [1, 2]

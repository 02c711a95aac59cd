"""A whole run of a model with experts: rollouts, updates, publishing, checkpoint, export."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from tests.e2e.conftest import Case
from tests.tiny_models import make_tiny_model

SMALL = ("policy.megatron_cfg.expert_model_parallel_size=2", "trainer.max_steps=2")


@pytest.fixture
def experts(case: Case, tmp_path: Path) -> Case:
    model = make_tiny_model(
        tmp_path / "experts", "qwen3_moe", tied=False, seed=3, tokenizer=True, max_position_embeddings=512
    )
    return Case(model, case.train, case.root)


def test_grpo_with_expert_parallelism(experts: Case) -> None:
    assert experts.run(*SMALL, "exp_manager.export_hf=true", ranks=2) == [0, 0]
    rows = experts.rows()
    assert [row["step"] for row in rows] == [1, 2]
    for row in rows:  # the second step samples from published experts
        assert row["mismatch/log_prob_abs_diff_max"] < 1e-3
        assert row["ratio/first_update_max_abs_log_ratio"] == 0.0
    assert experts.run(*SMALL[:1], "trainer.max_steps=3", ranks=2) == [0, 0]
    whole = ("exp_manager.name=whole", "trainer.max_steps=3")
    assert experts.run(*SMALL[:1], *whole, ranks=2) == [0, 0]
    assert experts.rows() == experts.rows("whole")


@pytest.mark.parametrize("family", ["mixtral", "deepseek_v3"])
def test_other_families_with_experts(case: Case, tmp_path: Path, family: str) -> None:
    sizes = {"seed": 3, "tokenizer": True, "max_position_embeddings": 512}
    model = make_tiny_model(tmp_path / family, family, tied=False, **sizes)  # type: ignore[arg-type]
    here = Case(model, case.train, case.root)
    assert here.run(*SMALL, ranks=2) == [0, 0]
    for row in here.rows():
        assert row["mismatch/log_prob_abs_diff_max"] < 1e-3
        assert row["ratio/first_update_max_abs_log_ratio"] == 0.0


def test_training_repeats_the_rollouts_choices(experts: Case) -> None:
    from safetensors.torch import load_file

    replay = ("policy.router_replay=true", "rollout.record=true", "trainer.max_steps=2")
    assert experts.run(*SMALL, *replay, ranks=2) == [0, 0]
    for row in experts.rows():
        assert row["mismatch/log_prob_abs_diff_max"] < 1e-3 and row["ratio/first_update_max_abs_log_ratio"] == 0.0
    recorded = sorted((experts.root / "tiny" / "rollouts").glob("*.safetensors"))
    assert recorded
    for file in recorded:
        flat = load_file(file)
        positions, layers, chosen = flat["meta"][:, 3:].unbind(1)
        assert (positions > 0).all() and set(layers.tolist()) == {2} and set(chosen.tolist()) == {2}

    # What is recorded is what is trained through: with every choice set to expert 0 and 1, log-probs are others.
    for file in recorded:
        from safetensors.torch import save_file

        flat = load_file(file)
        flat["experts"] = torch.arange(2, dtype=torch.int16).repeat(len(flat["experts"]) // 4).view(torch.uint8)
        save_file(flat, file)
    engine = ("rollout.engine=recorded", f"rollout.recorded_dir={recorded[0].parent}")
    forced = ("exp_manager.name=forced", *engine, "policy.router_replay=true")
    assert experts.run(*SMALL, *forced, "trainer.max_steps=1", ranks=2) == [0, 0]
    assert experts.rows("forced")[0]["mismatch/log_prob_abs_diff_max"] > 0.01
    own = ("exp_manager.name=own", *engine, "policy.router_replay=false", "trainer.max_steps=1")
    assert experts.run(*SMALL, *own, ranks=2) == [0, 0]
    assert experts.rows("own")[0]["mismatch/log_prob_abs_diff_max"] < 1e-3


@pytest.mark.parametrize(
    ("overrides", "words"),
    [
        (["policy.megatron_cfg.expert_model_parallel_size=3"], "number of experts = 4"),
        (["policy.megatron_cfg.tensor_model_parallel_size=2"], "policy.megatron_cfg.sequence_parallel"),
        (
            ["policy.megatron_cfg.expert_model_parallel_size=4"],
            "must divide the ranks of a pipeline stage = 2",
        ),
    ],
)
def test_what_does_not_fit_is_refused(
    experts: Case, capfd: pytest.CaptureFixture[str], overrides: list[str], words: str
) -> None:
    assert set(experts.run(*overrides, ranks=2)) == {2}
    assert words in capfd.readouterr().err


def test_experts_of_a_dense_model_are_refused(case: Case, capfd: pytest.CaptureFixture[str]) -> None:
    assert set(case.run(*SMALL, ranks=2)) == {2}
    assert "needs experts" in capfd.readouterr().err
    assert set(case.run("policy.router_replay=true", ranks=2)) == {2}
    assert "policy.router_replay" in capfd.readouterr().err

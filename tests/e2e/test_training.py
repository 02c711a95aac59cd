"""Whole runs of the training program on a tiny model."""

from __future__ import annotations

import json
import os
import shutil

import psutil
import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from megatron_rl.tasks import problems
from tests.e2e.conftest import Case, run_main
from tests.forked import run_ranks
from tests.policy_case import build_policy, log_probs_of, random_samples, tiny_config


def test_a_run_leaves_what_it_promises(case: Case) -> None:
    overrides = [
        "exp_manager.export_hf=true",
        f"data.validation={case.held_out}",
        "eval.before=true",
        "eval.after=true",
        "eval.num_problems=6",
        "eval.num_samples=4",
        "eval.k_values=[1,4]",
        "exp_manager.create_tensorboard_logger=true",
    ]
    assert case.run(*overrides, ranks=2) == [0, 0]
    run = case.root / "tiny"
    rows = case.rows()
    assert [row["step"] for row in rows] == [0, 1, 2, 3, 4]
    for row in rows[1:]:
        assert row["ratio/first_update_max_abs_log_ratio"] == 0.0
        assert row["mismatch/log_prob_abs_diff_max"] < 1e-3
        assert {
            "reward/mean",
            "reward/correct",
            "pass@1",
            "pass@4",
            "entropy/mean",
            "kl/reference",
            "clip_frac",
            "cov/mean",
            "grad_norm",
            "rollout/staleness",
        } <= row.keys()
        assert row["rollout/staleness"] == 0.0
    summary = json.loads((run / "summary.json").read_text())
    assert {
        "greedy_before",
        "greedy_after",
        "pass1_before",
        "pass1_after",
        "pass4_after",
        "seconds",
        "engine",
    } <= summary.keys()
    assert (run / "config.yaml").exists() and (run / "curves.png").stat().st_size > 10_000
    assert [p.name for p in sorted((run / "checkpoints").iterdir())] == ["step_00000002", "step_00000004"]
    assert list(run.glob("**/events.out.tfevents*"))

    model = AutoModelForCausalLM.from_pretrained(run / "hf")
    assert AutoTokenizer.from_pretrained(run / "hf")("2+2")["input_ids"]
    before = AutoModelForCausalLM.from_pretrained(case.model)
    assert any(not torch.equal(a, b) for a, b in zip(model.parameters(), before.parameters())), "nothing was learned"


def _megatron_log_probs(case: Case) -> list[torch.Tensor]:
    from megatron_rl.model.checkpoint import Checkpoints

    policy = build_policy(tiny_config(case.model))
    checkpoints = Checkpoints(case.root / "tiny/checkpoints", keep_last=1, groups=policy.groups, say=print)
    path = checkpoints.find(None)
    assert path is not None
    checkpoints.load(path, policy.trainable)
    samples = random_samples()
    policy.fill_log_probs(samples, [range(len(samples))], "old_log_probs")
    return [row.old_log_probs for row in samples]


def test_exported_log_probs_are_the_trained_models(case: Case) -> None:
    assert case.run("exp_manager.export_hf=true", "policy.optim.lr=1e-2") == [0]
    mine = run_ranks(_megatron_log_probs, 1, case)[0]
    exported = log_probs_of(AutoModelForCausalLM.from_pretrained(case.root / "tiny/hf"), random_samples())
    assert max((a - b).abs().max() for a, b in zip(mine, exported)) < 1e-4
    original = log_probs_of(AutoModelForCausalLM.from_pretrained(case.model), random_samples())
    assert max((a - b).abs().max() for a, b in zip(mine, original)) > 1e-2, "the test would pass without training"


@pytest.mark.parametrize("ranks", [1, 2])
def test_2k_steps_equal_k_steps_stop_resume_k_steps(case: Case, ranks: int) -> None:
    case.run("exp_manager.name=whole", "trainer.max_steps=4", ranks=ranks)
    case.run("trainer.max_steps=2", ranks=ranks)
    case.run("trainer.max_steps=4", ranks=ranks)
    assert case.rows() == case.rows("whole")


LAYOUTS = {
    "tp2": ["policy.megatron_cfg.tensor_model_parallel_size=2"],
    "tp2sp": ["policy.megatron_cfg.tensor_model_parallel_size=2", "policy.megatron_cfg.sequence_parallel=true"],
    "pp2": ["policy.megatron_cfg.pipeline_model_parallel_size=2"],
    "dp2": [],
    "cp2": ["policy.megatron_cfg.context_parallel_size=2"],
}


def test_recorded_rollouts_give_the_same_first_step_under_every_layout(case: Case) -> None:
    assert case.run("exp_manager.name=one", "rollout.record=true", "trainer.max_steps=1") == [0]
    reference = case.rows("one")[0]
    for name, overrides in LAYOUTS.items():
        replay = ["rollout.engine=recorded", f"rollout.recorded_dir={case.root}/one/rollouts", "trainer.max_steps=1"]
        assert case.run(f"exp_manager.name={name}", *replay, *overrides, ranks=2) == [0, 0]
        row = case.rows(name)[0]
        assert row["loss"] == pytest.approx(reference["loss"], rel=1e-6), name
        assert row["grad_norm"] == pytest.approx(reference["grad_norm"], rel=1e-5), name
        assert row["reward/mean"] == reference["reward/mean"]


def test_a_checkpoint_loads_under_another_layout(case: Case) -> None:
    case.run("trainer.max_steps=2", ranks=1)
    shutil.copytree(case.root / "tiny", case.root / "other")
    case.run("trainer.max_steps=3", "rollout.record=true", ranks=1)
    replay = ["rollout.engine=recorded", f"rollout.recorded_dir={case.root}/tiny/rollouts"]
    overrides = ["exp_manager.name=other", "trainer.max_steps=3", *replay, *LAYOUTS["tp2"]]
    assert case.run(*overrides, ranks=2) == [0, 0]
    mine, theirs = case.rows("other")[2], case.rows()[2]
    assert mine["grad_norm"] == pytest.approx(theirs["grad_norm"], rel=1e-4)
    assert mine["loss"] == pytest.approx(theirs["loss"], rel=1e-4)


VARIANTS = {
    "rloo": ["algorithm.use_leave_one_out_baseline=true", "algorithm.normalize_rewards=false"],
    "dapo": [
        "algorithm.ratio_clip_max=0.28",
        "algorithm.ratio_clip_c=10",
        "algorithm.overlong.buffer=4",
        "algorithm.kl.coef=0",
    ],
    "dr_grpo": ["algorithm.normalize_rewards=false", "algorithm.loss_aggregation=seq-mean-token-sum-norm"],
    "kl_in_reward": ["algorithm.kl.placement=reward", "algorithm.kl.estimator=k1", "algorithm.kl.coef=0.1"],
    "epochs": ["algorithm.num_epochs=2", "algorithm.loss_aggregation=seq-mean-token-mean"],
    "bf16": ["trainer.precision=bf16", "trainer.max_steps=1"],
}


@pytest.mark.parametrize("name", VARIANTS)
def test_variants_run(case: Case, name: str) -> None:
    assert case.run("trainer.max_steps=2", *VARIANTS[name]) == [0]
    row = case.rows()[-1]
    assert row["grad_norm"] >= 0 and row["ratio/first_update_max_abs_log_ratio"] == 0.0


def test_supervised_stage_lowers_the_loss(case: Case) -> None:
    config = case.root / "sft.yaml"
    config.write_text(
        "trainer: {stage: sft, precision: fp32, max_steps: 16, accelerator: cpu, threads_per_rank: 1}\n"
        f"exp_manager: {{exp_dir: {case.root}, name: sft, export_hf: false}}\n"
        f"policy: {{model_path: {case.model}, initialization: random, train_global_batch_size: 8, optim: {{lr: 1.0e-2}}}}\n"
        f"algorithm: {{name: sft}}\ndata: {{task: gsm8k, train: {case.train}}}\n"
    )
    assert run_ranks(run_main, 1, [str(config)]) == [0]
    losses = [row["loss"] for row in case.rows("sft")]
    assert losses[0] == pytest.approx(torch.tensor(131.0).log().item(), abs=0.3)  # a random model knows nothing
    assert losses[-1] < losses[0] - 1


def test_random_initialization_does_not_depend_on_the_layout(case: Case) -> None:
    overrides = ["policy.initialization=random", "rollout.record=true", "trainer.max_steps=1"]
    case.run("exp_manager.name=one", *overrides)
    replay = ["rollout.engine=recorded", f"rollout.recorded_dir={case.root}/one/rollouts"]
    case.run(
        "exp_manager.name=two", "policy.initialization=random", "trainer.max_steps=1", *replay, *LAYOUTS["pp2"], ranks=2
    )
    assert case.rows("two")[0]["grad_norm"] == pytest.approx(case.rows("one")[0]["grad_norm"], rel=1e-5)


def _processes_of(case: Case) -> list[psutil.Process]:
    processes = psutil.process_iter(["cmdline", "status"])
    return [
        p
        for p in processes
        if str(case.root) in " ".join(p.info["cmdline"] or []) and p.info["status"] != psutil.STATUS_ZOMBIE
    ]


def test_a_reader_that_goes_does_not_end_the_run_which_leaves_no_process(case: Case) -> None:
    """The reader takes one line, like ``| head -1``; standard error goes the same way."""
    process = case.start("trainer.max_steps=1", "trainer.devices=2")
    assert process.stdout.readline().startswith("$ torchrun")
    process.stdout.close()
    assert process.wait(timeout=120) == 0
    assert not _processes_of(case)
    logs = case.root / "tiny/logs"
    first, *rest = (logs / "console.log").read_text().splitlines()
    assert first.endswith("standard output cannot be written (Broken pipe); it goes on here")
    assert any(line.startswith("step 1/1") for line in rest) and not any("Traceback" in line for line in rest)
    assert (logs / "rank_1.log").exists() and os.path.getsize(case.root / "tiny/metrics.jsonl")


@pytest.mark.parametrize("stage", ["rl", "sft"])
def test_rows_that_stay_on_disk_make_the_same_run(case: Case, monkeypatch: pytest.MonkeyPatch, stage: str) -> None:
    """Above a number of rows each is read when its turn comes; here above one."""
    place = case if stage == "rl" else case.with_algorithm("{name: sft}")
    overrides = (
        "trainer.max_steps=2",
        f"trainer.stage={stage}",
        "policy.train_micro_batch_tokens=512",
        f"data.validation={case.held_out}",
        "eval.before=true",
    )
    assert place.run(*overrides, "exp_manager.name=loaded") == [0]
    monkeypatch.setattr(problems, "MAX_LOADED", 1)
    assert place.run(*overrides, "exp_manager.name=on_disk") == [0]
    loaded, on_disk = place.rows("loaded"), place.rows("on_disk")
    assert loaded == on_disk and len(loaded) >= 2

"""A supervised run samples in evaluations alone: its engine has released its memory while the run trains."""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.e2e.conftest import Case, run_main
from tests.forked import run_ranks

ENGINE = """
import os
from megatron_rl.model.trainable import Trainable
from megatron_rl.rollout.build import BUILDERS

def note(what):
    with open(os.environ["NOTES"], "a") as file:
        file.write(what + "\\n")

def noted(owner, name, what):
    honest = getattr(owner, name)
    def call(*args, **kwargs):
        note(what)
        return honest(*args, **kwargs)
    setattr(owner, name, call)

def build(config, model, *, device, cpu_group):
    noted(Trainable, "update", "update")
    engine = BUILDERS["transformers"](config, model, device=device, cpu_group=cpu_group)
    for name, what in (("release_memory", "release"), ("resume_memory", "resume"), ("complete", "sample")):
        noted(engine, name, what)
    return engine
"""


def test_the_engine_has_memory_between_publication_and_the_end_of_an_evaluation(
    case: Case, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "noting_engine.py").write_text(ENGINE)
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.setenv("NOTES", str(tmp_path / "notes"))
    overrides = (
        "trainer.stage=sft", "trainer.max_steps=3", "rollout.engine=noting_engine:build", "eval.every_n_steps=1",
        f"data.validation={case.held_out}", "eval.num_problems=2", "eval.k_values=[1]", "eval.greedy=false",
        "rollout.max_new_tokens=8", "policy.train_micro_batch_tokens=512",
        "trainer.offload_during_rollouts=true",  # as colocated servers do: checkpoints then ask for it once more
    )  # fmt: skip
    arguments = case.with_algorithm("{name: sft}").arguments(*overrides)
    assert run_ranks(run_main, 1, arguments, timeout_s=120) == [0]
    notes = (tmp_path / "notes").read_text().split()
    step, checkpoint = ["update", "resume", "sample", "release"], ["release"]
    assert notes == [*step, *step, *checkpoint, *step, *checkpoint]

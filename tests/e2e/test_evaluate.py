"""`megatron-rl eval`: killed between chunks it gives the figures of an uninterrupted start; several sets; what it refuses.

And what it can be given: the best weights of a run, as a checkpoint and as an export.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from safetensors.torch import load_file

from tests.e2e.conftest import Case
from tests.forked import run_ranks

BASE = "megatron_rl/config/eval.yaml"


def settings(case: Case, out: Path, *more: str) -> list[str]:
    parity = "data.task=tests.e2e.parity_task:TASK"
    return [
        BASE, f"policy.model_path={case.model}", f"exp_manager.exp_dir={out.parent}", f"exp_manager.name={out.name}",
        f"data.validation={{first: '{case.train}[:7]', second: '{case.train}[7:]'}}", parity, "trainer.precision=fp32",
        "eval.num_samples=4", "eval.k_values=[1,2,4]", "eval.chunk_size=3", "rollout.max_new_tokens=8",
        "trainer.threads_per_rank=1", *more,
    ]  # fmt: skip


def evaluate(arguments: list[str], chunks: int | None = None) -> int:
    """Run the program; with ``chunks`` it ends like a killed one once so many are on disk."""
    from megatron_rl.commands.evaluate import main
    from megatron_rl.evaluation.samples import SampleFolder

    keep, written = SampleFolder.keep, []

    def keep_some(folder: SampleFolder, *chunk: object) -> None:
        if len(written) == chunks:
            raise KeyboardInterrupt
        keep(folder, *chunk)  # type: ignore[arg-type]
        written.append(chunk)

    SampleFolder.keep = keep_some  # type: ignore[method-assign,assignment]
    try:
        return main(["--config", *arguments])
    except KeyboardInterrupt:
        return 130


def test_a_killed_evaluation_goes_on_and_gives_the_same_figures(case: Case, capfd: pytest.CaptureFixture[str]) -> None:
    whole, parts = case.root / "whole", case.root / "parts"
    assert run_ranks(evaluate, 1, settings(case, whole)) == [0]
    assert run_ranks(evaluate, 1, settings(case, parts), 4) == [130]
    assert not (parts / "results.json").exists()
    capfd.readouterr()
    assert run_ranks(evaluate, 1, settings(case, parts)) == [0]
    assert "second: 1 of 6 chunks are sampled already" in capfd.readouterr().out
    results = json.loads((whole / "results.json").read_text())
    assert json.loads((parts / "results.json").read_text()) == results
    assert (parts / "samples/second.jsonl").read_text() == (whole / "samples/second.jsonl").read_text()
    assert {name: found["num_problems"] for name, found in results["sets"].items()} == {"first": 7, "second": 17}
    figures = results["sets"]["second"]["figures"]
    assert 0 < figures["pass@1"]["low"] < figures["pass@1"]["value"] < figures["pass@1"]["high"] < 1
    assert figures["pass@1"]["value"] < figures["pass@4"]["value"]
    assert run_ranks(evaluate, 1, settings(case, parts, "eval.temperature=0.5")) == [2]
    assert "sampling" in capfd.readouterr().err


def test_the_best_weights_are_kept_exported_and_evaluated(case: Case, capfd: pytest.CaptureFixture[str]) -> None:
    params = "{every_n_train_steps: 10, keep_last: 1, metric_name: entropy/mean, higher_is_better: false}"
    run = (
        f"exp_manager.checkpoint_callback_params={params}", "exp_manager.export_hf_best=true",
        "exp_manager.export_hf_every_n_steps=1",
    )  # fmt: skip
    folder = case.root / "tiny"
    for last in (3, 5):  # the second start resumes
        assert case.run(f"trainer.max_steps={last}", *run) == [0]
        rows = case.rows()
        best = min(rows, key=lambda row: row["entropy/mean"])["step"]
        told = json.loads((folder / "best.json").read_text())
        assert (told["best"], told["hf_best"]) == ([{"step": best, "value": rows[best - 1]["entropy/mean"]}], best)
        steps = sorted({best, last})
        assert sorted(int(path.name[5:]) for path in folder.glob("checkpoints/step_*")) == steps
        assert sorted(int(path.name[8:]) for path in folder.glob("hf_step_*")) == steps
        exported, same = (load_file(folder / name / "model.safetensors") for name in ("hf_best", f"hf_step_{best:08d}"))
        assert all(exported[name].equal(same[name]) for name in same)
    for checkpoint, status, words in (("best", 0, "pass@2"), ("9", 2, "is no checkpoint of")):
        command = [
            sys.executable, "-m", "megatron_rl.commands.cli", "eval", str(folder), "--data", f"{case.train}[:3]",
            "--checkpoint", checkpoint, "--samples", "2", "--no-greedy",
        ]  # fmt: skip
        done = subprocess.run(command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)
        assert done.returncode == status and words in done.stdout and "Traceback" not in done.stdout, done.stdout
    assert (folder / "evaluations/hf_best/results.json").is_file()
    capfd.readouterr()
    assert run_ranks(evaluate, 1, settings(case, case.root / "none", "data.validation=null")) == [2]
    assert "data.validation: there must be problems" in capfd.readouterr().err
    assert case.run("exp_manager.checkpoint_callback_params.metric_name=eval/pass@1") == [2]
    assert "this run makes none" in capfd.readouterr().err


def train_until(arguments: list[str], killed_at: int) -> int:
    """Train; end like a killed one where the checkpoint of a step would begin, after its export."""
    from megatron_rl.model.checkpoint import Checkpoints
    from megatron_rl.train import main

    start = Checkpoints.start

    def start_some(checkpoints: Checkpoints, step: int, *rest: Any, **settings: Any) -> None:
        if step == killed_at:
            os._exit(9)
        start(checkpoints, step, *rest, **settings)

    Checkpoints.start = start_some  # type: ignore[method-assign]
    Checkpoints.poll = lambda self: None  # type: ignore[method-assign]  # as if the disk were slow
    return main(["--config", *arguments])


def test_a_kill_between_export_and_checkpoint_loses_no_best_step(case: Case) -> None:
    params = "every_n_train_steps: 1, keep_last: 1, metric_name: entropy/mean, async_save: true"
    run = (f"exp_manager.checkpoint_callback_params={{{params}}}", "exp_manager.export_hf_best=true")
    arguments = case.arguments("trainer.devices=1", "trainer.max_steps=3", *run)
    folder = case.root / "tiny"
    with pytest.raises(AssertionError, match="exit code 9"):
        run_ranks(train_until, 1, arguments, 3)
    values = {row["step"]: row["entropy/mean"] for row in case.rows()}
    best = max((1, 2), key=values.__getitem__)
    assert best == 1 and values[3] > values[1], "the case needs a best step that only the last one replaces"
    assert case.run("trainer.max_steps=2", *run) == [0]
    told = json.loads((folder / "best.json").read_text())
    assert ([each["step"] for each in told["best"]], told["hf_best"]) == ([best], None)
    assert not (folder / "hf_best").exists() and [*folder.glob("abandoned_*/hf_best/model.safetensors")]
    assert sorted(int(path.name[5:]) for path in folder.glob("checkpoints/step_*")) == [1, 2]

"""Method, task, reward and engine of examples/own_method train a random model of the quickstart's size from another folder."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
from safetensors.torch import load_file

ROOT = Path(__file__).parents[2]
COMMAND = Path(sys.executable).parent / "megatron-rl"
"""The console script: unlike ``python -m`` it does not have the current folder on its path by itself."""


@pytest.fixture(scope="module")
def lab(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("outside") / "lab"
    shutil.copytree(ROOT / "examples" / "own_method", folder, ignore=shutil.ignore_patterns("__pycache__"))
    sizes = ["--num-warm-start", "10", "--num-train", "40", "--num-held-out", "10"]
    tool = [sys.executable, str(ROOT / "tools" / "make_word_problems.py"), str(folder / "data"), *sizes]
    subprocess.run(tool, check=True, capture_output=True)
    return folder


def run(lab: Path, verb: str, *overrides: str) -> subprocess.CompletedProcess[str]:
    own = (
        "policy.model_path=data/model", "policy.initialization=random", "exp_manager.exp_dir=runs",
        "data.train=data/train.jsonl", "data.validation=data/held_out.jsonl", "exp_manager.export_hf=false",
        "trainer.accelerator=cpu", "eval.before=false", "eval.after=false", "rollout.max_new_tokens=30",
    )  # fmt: skip
    environment = {key: value for key, value in os.environ.items() if key != "PYTHONPATH"} | {"OMP_NUM_THREADS": "1"}
    return subprocess.run(
        [COMMAND, verb, "config.yaml", *own, *overrides], cwd=lab, env=environment, capture_output=True, text=True
    )


def test_they_train_and_resume(lab: Path) -> None:
    every = "exp_manager.checkpoint_callback_params.every_n_train_steps=2"
    for steps in (2, 3):  # the last step is always saved
        done = run(lab, "train", f"trainer.max_steps={steps}", every, "algorithm.correction.max_ratio=2")
        assert done.returncode == 0, done.stdout + done.stderr
    rows = [json.loads(line) for line in (lab / "runs/own_method/metrics.jsonl").read_text().splitlines()]
    assert [row["step"] for row in rows] == [1, 2, 3]
    assert all(row["grad_norm"] > 0 and row["mismatch/log_prob_abs_diff_max"] < 1e-4 for row in rows)
    assert all(row["correction/weight_mean"] == pytest.approx(1, abs=1e-5) for row in rows)  # the engine is exact
    # The state of the method's own: a mean over the steps before, over a resume as well.
    rewards = [row["reward/mean"] for row in rows]
    expected = 0.9 * (0.9 * 0.1 * rewards[0] + 0.1 * rewards[1]) + 0.1 * rewards[2]
    assert rows[-1]["running_mean"] == pytest.approx(expected)
    (kept,) = (lab / "runs/own_method/checkpoints").glob("*3/*.safetensors")
    assert float(load_file(kept)["credit/mean"]) == pytest.approx(expected)


@pytest.mark.parametrize(
    ("override", "message"),
    [
        ("algorithm.name=settings:RunningMeen", "error: algorithm.name = 'settings:RunningMeen': is not there"),
        ("algorithm.decay=2", "error: algorithm.decay = 2"),
        (
            "data.task=task:WORD",
            "error: data.task = 'task:WORD': is not there: task has no WORD. Fix: did you mean WORDS?",
        ),
        ("rollout.engine=engine:Plane", "error: rollout.engine = 'engine:Plane': is not there"),
    ],
)
def test_a_wrong_name_is_one_error_of_check(lab: Path, override: str, message: str) -> None:
    done = run(lab, "check", override)
    assert done.returncode == 2 and done.stderr.startswith(message), done.stdout[-500:] + done.stderr
    assert len(done.stderr.splitlines()) == 1

"""A run's folder: whether it holds this run, finished; whose it is; what does not belong to a new run."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest

from megatron_rl.config import Config, load_config
from megatron_rl.errors import UserError
from megatron_rl.launch.finished import finished_steps, result_settings
from megatron_rl.launch.folder import RunFolder
from megatron_rl.process.lock import take_lock

TINY = Path(__file__).parents[2] / "tiny.yaml"
FILES = {
    "model/config.json": "{}",
    "model/model.safetensors": "weights",
    "train.jsonl": "problems",
    "others.jsonl": "harder problems",
    "template.txt": "",
}


@pytest.fixture
def place(tmp_path: Path) -> Path:
    """A place with a model, problems and a finished run of four steps."""
    for name, text in FILES.items():
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_text(text)
    shutil.copytree(tmp_path / "model", tmp_path / "moved")
    shutil.copytree(tmp_path / "model", tmp_path / "tuned")
    (tmp_path / "tuned/model.safetensors").write_text("WEIGHTS")
    finish(config(tmp_path), steps=4)
    return tmp_path


def config(place: Path, *overrides: str) -> Config:
    own = [f"policy.model_path={place}/model", f"data.train={place}/train.jsonl", f"exp_manager.exp_dir={place}"]
    given = [override.replace("PLACE", str(place)) for override in overrides]
    return load_config(TINY, [*own, "exp_manager.export_hf=false", *given])


def finish(of: Config, steps: int, **more: object) -> None:
    of.exp_manager.run_dir.mkdir(exist_ok=True)
    summary = {"steps": steps, "origin": None, "is_exported": False, "settings": result_settings(of)} | more
    (of.exp_manager.run_dir / "summary.json").write_text(json.dumps(summary))


@pytest.mark.parametrize(
    "overrides",
    [
        [],
        ["trainer.max_steps=3"],
        ["trainer.devices=2", "trainer.accelerator=auto", "policy.megatron_cfg.tensor_model_parallel_size=2"],
        ["policy.model_path=PLACE/moved", "policy.megatron_cfg.fp8=null"],
        ["exp_manager.checkpoint_callback_params.keep_last=5", "rollout.record=true", "trainer.hang_timeout_s=60"],
    ],
)
def test_the_same_run_is_finished_however_it_is_laid_out(place: Path, overrides: list[str]) -> None:
    assert finished_steps(config(place, *overrides)) == 4


@pytest.mark.parametrize(
    ("override", "change"),
    [
        ("policy.optim.lr=0.01", r"policy\.optim\.lr was 0\.001, not 0\.01"),
        ("trainer.seed=8", r"trainer\.seed was 7, not 8"),
        ("policy.model_path=PLACE/tuned", r"policy\.model_path had other content \(.*/model\)"),
        ("data.train=PLACE/others.jsonl", r"data\.train had other content \(.*/train\.jsonl\)"),
        ("data.task=word_problems", r"data\.task was 'gsm8k', not 'word_problems'"),
        ("algorithm.kl.coef=0.1", r"algorithm\.kl\.coef was 0\.01, not 0\.1"),
        ("rollout.temperature=0.7", r"rollout\.temperature was 1\.0, not 0\.7"),
        ("policy.megatron_cfg.moe_z_loss_coeff=0.1", r"policy\.megatron_cfg was {}, not {'moe_z_loss_coeff': 0\.1}"),
        ("data.validation=PLACE/others.jsonl", r"data\.validation was None, not '.*/others\.jsonl'"),
    ],
)
def test_another_run_in_a_finished_folder_is_refused(place: Path, override: str, change: str) -> None:
    with pytest.raises(
        UserError, match=f"exp_manager.name = 'tiny': .*finished after 4 steps: {change}. Fix: "
    ) as error:
        finished_steps(config(place, override))
    assert "set another exp_manager.name, or move " in error.value.fix
    assert finished_steps(config(place, override, "trainer.max_steps=5")) is None, "that goes on"


def test_the_first_few_changes_are_named(place: Path) -> None:
    changes = ["trainer.seed=8", "policy.optim.lr=0.01", "rollout.top_k=5", "rollout.top_p=0.5", "data.shuffle=false"]
    with pytest.raises(
        UserError, match=r"trainer\.seed was 7, not 8, policy\.optim\.lr .*, rollout\.top_p .* and 2 more"
    ):
        finished_steps(config(place, *changes))


def test_a_changed_file_under_the_same_name_is_another(place: Path) -> None:
    (place / "train.jsonl").write_text("PROBLEMS")
    with pytest.raises(UserError, match=r"data\.train had other content"):
        finished_steps(config(place))


def test_a_changed_reward_under_the_same_name_is_another(place: Path) -> None:
    file = place / "own.py"
    file.write_text("def score(response): return 1.0\ndef other(response): return 0.0\n")
    reward = f"data.reward={file}:score"
    finish(config(place, reward), steps=4)
    assert finished_steps(config(place, reward)) == 4
    with pytest.raises(UserError, match=r"data\.reward had other content"):
        finished_steps(config(place, f"data.reward={file}:other"))
    file.write_text("def score(response): return 2.0\n")
    with pytest.raises(UserError, match=r"data\.reward had other content"):
        finished_steps(config(place, reward))


def test_a_summary_that_names_no_settings_is_taken_as_it_is(place: Path) -> None:
    finish(config(place), steps=4, settings={})
    assert finished_steps(config(place, "trainer.seed=8")) == 4


def test_a_folder_that_another_start_has_taken_over_says_who(tmp_path: Path) -> None:
    held = take_lock(tmp_path)
    folder = RunFolder(tmp_path, print)
    folder.check_same()
    found = json.loads((tmp_path / ".lock").read_text())
    (tmp_path / "new").write_text(json.dumps({**found, "pid": 7, "host": "node7", "user": "ann"}))
    (tmp_path / "new").rename(tmp_path / ".lock")
    for touch in (folder.check_same, lambda: folder.start_at(None, [])):
        with pytest.raises(
            UserError, match=r"exp_manager\.exp_dir.*was taken over by process 7 of user ann on node7, since"
        ):
            touch()
    RunFolder(tmp_path, print, is_writer=False).check_same()
    held.release()
    assert json.loads((tmp_path / ".lock").read_text())["pid"] == 7


@pytest.mark.parametrize("name", ["tensorboard/events.out", "wandb_run_id.txt", "mlflow_run_id.txt"])
def test_a_new_run_does_not_go_on_in_the_sinks_of_another(tmp_path: Path, name: str) -> None:
    (tmp_path / name).parent.mkdir(exist_ok=True)
    (tmp_path / name).write_text("of an earlier run")
    said: list[str] = []
    folder = RunFolder(tmp_path, said.append)
    with pytest.raises(UserError, match=name.partition("/")[0]):
        folder.check_unused()
    folder.start_at(None, [])
    assert not (tmp_path / name).exists() and len(list(tmp_path.glob(f"abandoned_*/{name}"))) == 1
    assert name.partition("/")[0] in said[0]
    folder.check_unused()

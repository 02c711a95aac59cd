"""What a config points at is opened and measured before torch is imported."""

from __future__ import annotations

import json
import os
import re
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest

from megatron_rl.commands import cli
from megatron_rl.commands.verbs import run_verb
from megatron_rl.config import Config, check_files, load_config
from megatron_rl.errors import UserError
from tests.tiny_models import make_tiny_model

TINY = Path(__file__).parents[2] / "tiny.yaml"


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_tiny_model(
        tmp_path_factory.mktemp("model"), "qwen3", tied=True, seed=0, tokenizer=True, num_hidden_layers=3
    )


@pytest.fixture
def arguments(model: Path, tmp_path: Path) -> list[str]:
    (tmp_path / "train.jsonl").write_text('{"question": "q", "answer": "#### 1"}\n')
    return [f"policy.model_path={model}", f"data.train={tmp_path}/train.jsonl", f"exp_manager.exp_dir={tmp_path}/runs"]


def config(arguments: list[str], *overrides: str) -> Config:
    return load_config(TINY, [*arguments, *overrides])


def test_a_good_config_passes_and_makes_nothing(arguments: list[str], tmp_path: Path) -> None:
    check_files(config(arguments))
    assert not (tmp_path / "runs").exists()


def test_an_unknown_task_is_refused_without_torch(arguments: list[str]) -> None:
    code = (
        "import sys\nfrom megatron_rl.config import check_files, load_config\nfrom megatron_rl.errors import UserError\n"
        f"config = load_config({str(TINY)!r}, {[*arguments, 'data.task=gsm8']!r})\n"
        "try:\n    check_files(config)\nexcept UserError as error:\n    print(error)\n"
        "assert not {'torch', 'megatron.core', 'transformers'} & set(sys.modules), 'heavy import'"
    )
    output = subprocess.run([sys.executable, "-c", code], check=True, capture_output=True, text=True).stdout
    assert "data.task = 'gsm8'" in output and "word_problems" in output


def test_a_metric_sink_that_is_not_there_is_refused_unimported(
    arguments: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "never_imported.py").write_text("raise RuntimeError\nclass Sink: ...\n")
    monkeypatch.syspath_prepend(tmp_path)
    check_files(config(arguments, "exp_manager.sinks=[never_imported:Sink]"))
    with pytest.raises(UserError, match="did you mean Sink") as caught:
        check_files(config(arguments, "exp_manager.sinks=[never_imported:Sinc]"))
    assert caught.value.field == "exp_manager.sinks"


def test_a_folder_that_is_a_file_is_refused(arguments: list[str], tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"train\.jsonl is a file") as caught:
        check_files(config(arguments, f"exp_manager.exp_dir={tmp_path}/train.jsonl/runs"))
    assert caught.value.field == "exp_manager.exp_dir"


def test_a_folder_without_the_right_to_write_is_refused(
    arguments: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(os, "access", lambda path, _mode: Path(path) != tmp_path)  # root may write anywhere
    with pytest.raises(UserError, match="is not writable"):
        check_files(config(arguments))


def test_pipeline_stages_may_be_uneven_where_their_sizes_are_given(arguments: list[str]) -> None:
    two_stages = ["trainer.devices=2", "policy.megatron_cfg.pipeline_model_parallel_size=2"]
    with pytest.raises(UserError, match="num_hidden_layers = 3"):
        check_files(config(arguments, *two_stages))
    check_files(config(arguments, *two_stages, "policy.megatron_cfg.num_layers_in_first_pipeline_stage=2"))


def gguf_file(folder: Path) -> Path:
    (folder / "model.Q4.gguf").touch()
    return folder / "model.Q4.gguf"


def gguf_folder(folder: Path) -> Path:
    for name in ("config.json", "model.safetensors"):
        (folder / name).unlink()
    return gguf_file(folder).parent


def without(*names: str) -> Callable[[Path], Path]:
    def change(folder: Path) -> Path:
        for name in names:
            (folder / name).unlink()
        return folder

    return change


def shard_missing(folder: Path) -> Path:
    (folder / "model.safetensors").rename(folder / "model-00001-of-00002.safetensors")
    places = {"a": "model-00001-of-00002.safetensors", "b": "model-00002-of-00002.safetensors"}
    (folder / "model.safetensors.index.json").write_text(json.dumps({"weight_map": places}))
    return folder


def shard_cut(folder: Path) -> Path:
    path = folder / "model.safetensors"
    path.write_bytes(path.read_bytes()[:-8])
    return folder


def pointer(name: str) -> Callable[[Path], Path]:
    def change(folder: Path) -> Path:
        (folder / name).write_text("version https://git-lfs.github.com/spec/v1\noid sha256:0\n")
        return folder

    return change


def tiktoken(folder: Path) -> Path:
    (folder / "tokenizer.json").rename(folder / "tiktoken.model")
    return folder


WRONG_FOLDERS: list[tuple[Callable[[Path], Path], str]] = [
    (lambda folder: folder / "nowhere", "policy.model_path = .*nowhere.*: is not a directory"),
    (gguf_file, r"policy.model_path = .*is a GGUF file.*tools/gguf_to_hf.py model.Q4.gguf FOLDER"),
    (gguf_folder, r"policy.model_path = .*is a GGUF file"),
    (without("config.json"), r"config\.json: cannot be read"),
    (without("tokenizer.json"), "policy.model_path = .*: holds no tokenizer"),
    (tiktoken, "policy.model_path = .*: has a tokenizer of tiktoken with code of its own.*policy.tokenizer_path"),
    (pointer("tokenizer.json"), r"tokenizer\.json: is a git-lfs pointer"),
    (without("model.safetensors"), "policy.model_path = .*: holds no weights.*initialization=random"),
    (pointer("model.safetensors"), r"model\.safetensors: is a git-lfs pointer"),
    (shard_missing, r"model-00002-of-00002\.safetensors: is named in model\.safetensors\.index\.json but missing"),
    (shard_cut, r"model\.safetensors: is not a complete safetensors file"),
]


@pytest.mark.parametrize(("change", "message"), WRONG_FOLDERS)
def test_check_names_what_is_wrong_with_a_model(
    model: Path, arguments: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str],
    change: Callable[[Path], Path], message: str,
) -> None:  # fmt: skip
    wrong = change(Path(shutil.copytree(model, tmp_path / "model")))
    monkeypatch.setattr(sys, "argv", ["megatron-rl", "check", str(TINY), *arguments, f"policy.model_path={wrong}"])
    assert run_verb(cli.app) == 2
    out, error = capsys.readouterr()
    assert out == "" and error.count("\n") == 1 and re.match(f"error: (.*/)?{message}", error), error
    monkeypatch.setattr(sys, "argv", [*sys.argv, "--no-files"])
    assert run_verb(cli.app) == 0


def test_check_passes_what_is_right_and_names_a_wrong_problem_file(
    arguments: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(sys, "argv", ["megatron-rl", "check", str(TINY), *arguments])
    assert run_verb(cli.app) == 0 and "max_steps: 4" in capsys.readouterr().out
    (tmp_path / "train.jsonl").write_text("no json")
    assert run_verb(cli.app) == 2 and "train.jsonl:1 = 'no json': is not JSON" in capsys.readouterr().err
    good = '{"question": "q", "answer": "#### 1"}\n'
    (tmp_path / "train.jsonl").write_text(good * 30 + "no json\n" + good)
    assert run_verb(cli.app) == 2 and "train.jsonl:31 = 'no json': is not JSON" in capsys.readouterr().err


def test_check_says_the_layout_and_refuses_files_of_two(arguments: list[str], tmp_path: Path) -> None:
    said: list[str] = []
    (tmp_path / "other.jsonl").write_text('{"prompt": "q", "solution": "1"}\n')
    arguments = [*arguments, "data.task=math"]
    check_files(config(arguments, f"data.train={tmp_path}/other.jsonl"), say=said.append)
    assert said == ["data.train: layout of TRL: prompt <- prompt, answer <- solution"]
    with pytest.raises(UserError, match=r"data\.train = .*other\.jsonl': has the layout 'TRL'"):
        check_files(config(arguments, f"data.train=[{tmp_path}/train.jsonl,{tmp_path}/other.jsonl]"))

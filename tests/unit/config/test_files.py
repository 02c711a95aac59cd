"""What a config points at is opened and measured before torch is imported."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

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

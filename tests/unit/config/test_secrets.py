"""Values from the environment work, and nobody sees them: not in files, on the screen, in W&B, or in errors."""

from __future__ import annotations

import stat
import sys
from pathlib import Path

import pytest
import yaml

from megatron_rl import errors
from megatron_rl.commands import cli
from megatron_rl.commands.verbs import run_verb
from megatron_rl.config import Config, load_config, save_resolved, shown
from megatron_rl.errors import UserError
from megatron_rl.launch.rank import difference
from megatron_rl.metrics import build_sinks

TINY = Path(__file__).parents[2] / "tiny.yaml"
SECRET = "hunter2-hunter2"
KEYS = ("exp_manager", "mlflow_logger_kwargs", "tracking_uri")
URI = f"http://me:{SECRET}@host"
WRITTEN = "http://me:${oc.env:MY_PASSWORD}@host"


def load(*overrides: str) -> Config:
    return load_config(TINY, ["policy.model_path=m", f"{'.'.join(KEYS)}={WRITTEN}", *overrides])


@pytest.fixture(autouse=True)
def environment(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("MY_PASSWORD", SECRET)
    monkeypatch.setenv("MY_FOLDER", "/scratch/of-mine")
    monkeypatch.setattr(errors, "_HIDDEN", {})


def test_the_run_has_the_value_and_nobody_else() -> None:
    config = load()
    assert config.exp_manager.mlflow_logger_kwargs["tracking_uri"] == URI
    assert shown(config)["exp_manager"]["mlflow_logger_kwargs"]["tracking_uri"] == WRITTEN
    assert SECRET not in str(shown(config, with_digests=True))


def test_the_saved_config_is_private_and_works_again(tmp_path: Path) -> None:
    path = tmp_path / "run/config.yaml"
    path.parent.mkdir()
    (tmp_path / "run/.config.yaml.tmp").touch(mode=0o644)  # of a run that was killed
    save_resolved(load(), path)
    assert stat.S_IMODE(path.stat().st_mode) == 0o600
    assert SECRET not in path.read_text()
    assert load_config(path) == load()


def test_the_temporary_file_is_private_before_its_first_byte(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from megatron_rl.config import secrets

    modes = []

    def look(_config: Config) -> str:
        modes.extend(stat.S_IMODE(path.stat().st_mode) for path in tmp_path.iterdir())
        return "a: 1\n"

    monkeypatch.setattr(secrets, "to_yaml", look)
    save_resolved(load(), tmp_path / "config.yaml")
    assert modes == [0o600]


@pytest.mark.parametrize(
    "reference",
    [
        "exp_manager.summary_writer_kwargs.comment=${exp_manager.mlflow_logger_kwargs.tracking_uri}",
        "exp_manager.summary_writer_kwargs.comment=see ${exp_manager.mlflow_logger_kwargs.tracking_uri}",
        "exp_manager.summary_writer_kwargs=${exp_manager.mlflow_logger_kwargs}",
        "exp_manager.summary_writer_kwargs.comment=${oc.env:UNSET,${oc.env:MY_PASSWORD}}",
        "exp_manager.summary_writer_kwargs.tags=[a, '${oc.env:MY_PASSWORD}']",
    ],
)
def test_what_refers_to_a_secret_is_hidden_too(reference: str) -> None:
    config = load(reference)
    assert SECRET in str(config.exp_manager.summary_writer_kwargs)
    assert SECRET not in str(shown(config))


def test_a_default_serves_where_the_variable_is_not_set(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("MY_PASSWORD")
    config = load("exp_manager.summary_writer_kwargs.comment=${oc.env:MY_PASSWORD,nothing}", f"{'.'.join(KEYS)}=x")
    assert config.exp_manager.summary_writer_kwargs["comment"] == "nothing"
    assert "${oc.env:MY_PASSWORD,nothing}" in str(shown(config))


def test_a_changed_value_is_shown_as_it_is() -> None:
    from dataclasses import replace

    config = load()
    changed = replace(
        config, exp_manager=replace(config.exp_manager, mlflow_logger_kwargs={"tracking_uri": "http://other"})
    )
    assert "http://other" in str(shown(changed))


def test_paths_stay_readable() -> None:
    config = load("exp_manager.exp_dir=${oc.env:MY_FOLDER}/runs")
    assert shown(config)["exp_manager"]["exp_dir"] == "/scratch/of-mine/runs"
    assert "/scratch/of-mine/runs" in str(UserError("exp_manager.exp_dir", "/scratch/of-mine/runs", "is full", "wait"))


def test_check_prints_the_interpolation(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    arguments = ["check", "--no-files", str(TINY), "policy.model_path=m", f"{'.'.join(KEYS)}={WRITTEN}"]
    monkeypatch.setattr(sys, "argv", ["megatron-rl", *arguments])
    status, out = run_verb(cli.app), capsys.readouterr().out
    assert status == 0 and SECRET not in out
    assert yaml.safe_load(out)["exp_manager"]["mlflow_logger_kwargs"]["tracking_uri"] == WRITTEN


@pytest.mark.parametrize(
    "override",
    [
        "trainer.max_steps=${oc.env:MY_PASSWORD}",
        "trainer.precision=${oc.env:MY_PASSWORD}",
        "policy.megatron_cfg.recompute_granularity=${oc.env:MY_PASSWORD}",
        "exp_manager.name=${oc.env:MY_PASSWORD}/x",
        "exp_manager.${oc.env:MY_PASSWORD}=1",
        "rollout.sglang_cfg.api_key=${oc.env:MY_PASSWORD}",
        "exp_manager.sinks=${exp_manager.mlflow_logger_kwargs}",
    ],
)
def test_errors_do_not_tell(override: str) -> None:
    with pytest.raises(UserError) as caught:
        load(override)
    assert SECRET not in str(caught.value)


@pytest.mark.parametrize(
    "override",
    [
        f"exp_manager.api_key={SECRET}",
        f"exp_manager.keys={{auth: {SECRET}}}",
        f"exp_manager.keys=[{{auth: [{SECRET}]}}]",
        f"exp_manager.url=http://me:{SECRET}@host",
        f"exp_manager.url=http://host?api_key={SECRET}",
        f"exp_manager.api_key='{SECRET}",  # not YAML
        f"exp_manager..api_key={SECRET}",
        f"policy.megatron_cfg.secret_key={SECRET}",
        f"rollout.sglang_cfg.auth={SECRET}",
        f"rollout.sglang_cfg.api_key={SECRET}",
    ],
)
def test_errors_do_not_tell_what_is_written_out_either(override: str) -> None:
    with pytest.raises(UserError) as caught:
        load(override)
    assert SECRET not in str(caught.value) and SECRET not in str(caught.value.args)
    assert str(caught.value).startswith(("exp_manager", "policy", "rollout", "override"))


def test_errors_of_others_do_not_tell() -> None:
    load()
    error = UserError("exp_manager", {"uri": URI}, f"ConnectionError: {URI} refuses", f"try {URI} later")
    assert SECRET not in str(error) and str(error).count("${oc.env:MY_PASSWORD}") == 3


def test_a_short_value_is_hidden_where_it_stands_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("MY_PIN", "step")
    load("exp_manager.summary_writer_kwargs.comment=${oc.env:MY_PIN}")
    assert str(UserError("a", "step", "first step", "b")) == "a = '${oc.env:MY_PIN}': first step. Fix: b."


def test_ranks_compare_values_without_telling_them(monkeypatch: pytest.MonkeyPatch) -> None:
    one = shown(load(), with_digests=True)
    monkeypatch.setenv("MY_PASSWORD", "another-password")
    other = shown(load(), with_digests=True)
    text = str(difference([one, other]))
    assert text.startswith(".".join(KEYS)) and SECRET not in text and "another-password" not in text


def test_a_sink_gets_the_interpolation(tmp_path: Path) -> None:
    config = load(f"exp_manager.sinks=[{__name__}:Sink]")
    (sink,) = build_sinks(config.exp_manager, tmp_path, run_config=shown(config))
    assert SECRET not in str(sink.run_config) and WRITTEN in str(sink.run_config)  # type: ignore[attr-defined]


class Sink:
    name = "listening"

    def __init__(self, directory: Path, run_config: dict) -> None:
        self.run_config = run_config

    def log(self) -> None: ...

    def resume_at(self) -> None: ...

    def close(self) -> None: ...


@pytest.mark.parametrize(
    "override",
    [
        "algorithm.name=grpo",
        "exp_manager.wandb_logger_kwargs.notes=a token",
        "exp_manager.wandb_logger_kwargs.max_tokens=many",
        "exp_manager.wandb_logger_kwargs.author=me",
        "exp_manager.wandb_logger_kwargs.auth=true",
        "exp_manager.wandb_logger_kwargs.notes=http://host/?page=3",
        "exp_manager.wandb_logger_kwargs.notes=what?token=1",
    ],
)
def test_a_word_that_looks_like_a_secret_is_none(override: str) -> None:
    load(override)

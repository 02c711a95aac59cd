"""Models that `megatron-rl eval` takes, and its options as settings."""

from __future__ import annotations

from pathlib import Path

import pytest

from megatron_rl.commands.evaluate import adapt
from megatron_rl.commands.evaluated import BASE, data_overrides, find_model, sampling_overrides
from megatron_rl.config import load_config
from megatron_rl.errors import UserError


@pytest.fixture
def run(tmp_path: Path) -> Path:
    """A run with two checkpoints and no export."""
    for step in (5, 10):
        (tmp_path / f"checkpoints/step_{step:08d}").mkdir(parents=True)
    (tmp_path / "config.yaml").touch()
    return tmp_path


def test_a_run_gives_its_export_else_its_last_checkpoint(run: Path) -> None:
    found = find_model(str(run), None)
    assert found.overrides == (f"exp_manager.resume_from_checkpoint='{run}/checkpoints/step_00000010'",)
    assert (found.config, found.out) == (run / "config.yaml", run / "evaluations/step_00000010")
    assert find_model(str(run), "5") == find_model(str(run / "checkpoints/step_00000005"), None)
    (run / "hf").mkdir()
    assert f"policy.model_path='{run}/hf'" in find_model(str(run), None).overrides
    assert find_model(str(run), "last").out.name == "step_00000010"


def test_a_checkpoint_that_is_not_there_is_named(run: Path) -> None:
    with pytest.raises(UserError, match=r"--checkpoint = '77': is no checkpoint of .*, which has: 5, 10"):
        find_model(str(run), "77")
    with pytest.raises(UserError, match=r"it has no best\.json"):
        find_model(str(run), "best")
    (run / "best.json").write_text('{"best": [{"step": 5, "value": 1}], "hf_best": null}')
    assert find_model(str(run), "best").out.name == "step_00000005"
    with pytest.raises(UserError, match="is for the folder of a run"):
        find_model("org/model", "best")


def test_a_model_without_a_run_has_a_config_that_loads(tmp_path: Path) -> None:
    found = find_model("org/Some-Model@abc", None)
    assert found.config == BASE and found.out == Path("evaluations/Some-Model")
    settings = [
        *found.overrides,
        *data_overrides([f"{tmp_path}/a.jsonl[:5]"]),
        *sampling_overrides(6, None, greedy=False, by=["a.b"]),
    ]
    config = load_config(BASE, settings)
    assert config.policy.model_path == "org/Some-Model@abc" and config.data.validation == [f"{tmp_path}/a.jsonl[:5]"]
    assert (config.eval.k_values, config.eval.greedy, config.eval.by) == ([1, 2, 4], False, ["a.b"])


def test_a_model_may_have_the_name_of_a_number() -> None:
    assert load_config(BASE, list(find_model("2024", None).overrides)).policy.model_path == "2024"


@pytest.mark.parametrize("devices", [1, 2, 6, 8, 16])
def test_a_model_is_evaluated_on_any_number_of_devices(devices: int) -> None:
    settings = ["policy.model_path=m", "data.validation=a.jsonl", f"trainer.devices={devices}"]
    assert adapt(load_config(BASE, settings)).policy.train_global_batch_size == devices


def test_the_folder_of_a_run_takes_no_results(tmp_path: Path) -> None:
    settings = [
        "policy.model_path=m",
        "data.validation=a.jsonl",
        f"exp_manager.exp_dir={tmp_path}",
        "exp_manager.name=run",
    ]
    adapt(load_config(BASE, settings))
    (tmp_path / "run").mkdir()
    (tmp_path / "run/metrics.jsonl").touch()  # as an earlier evaluation leaves it
    adapt(load_config(BASE, settings))
    (tmp_path / "run/metrics.jsonl").write_text('{"step": 1}\n')
    with pytest.raises(UserError, match=r"--out = .* is the folder of a run"):
        adapt(load_config(BASE, settings))


def test_sets_have_names_where_there_are_several() -> None:
    settings = data_overrides(["a=x/it's.jsonl", "b=[y.jsonl, z.jsonl]"])
    held_out = load_config(BASE, ["policy.model_path=m", *settings]).data.held_out
    assert held_out == {"a": ["x/it's.jsonl"], "b": ["y.jsonl", "z.jsonl"]}
    for wrong, words in ((["a.jsonl", "b=c"], "names no set"), (["a=b", "a=c"], "name of an earlier one")):
        with pytest.raises(UserError, match=words):
            data_overrides(wrong)
    with pytest.raises(UserError, match="write 1,8"):
        sampling_overrides(8, "one", greedy=True, by=[])

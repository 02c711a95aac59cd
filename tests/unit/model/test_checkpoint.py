"""Which checkpoint is taken, kept, set aside or refused: on directories that only look like checkpoints."""

from __future__ import annotations

import hashlib
import json
from pathlib import Path

import pytest
import torch

from megatron_rl.errors import UserError
from tests.forked import run_ranks
from tests.policy_case import CONFIG
from tests.tiny_models import make_tiny_model


def write(directory: Path, step: int, *, is_complete: bool = True, **state: object) -> Path:
    path = directory / f"step_{step:08d}"
    path.mkdir(parents=True)
    data = json.dumps({"step": step, **state}).encode()
    (path / "state.json").write_bytes(data)
    entry = {"bytes": len(data), "blake2b": hashlib.blake2b(data, digest_size=16).hexdigest()}
    if is_complete:
        (path / "manifest.json").write_text(json.dumps({"files": {"state.json": entry}}))
    return path


def checkpoints_of(directory: Path):
    from megatron_rl.model.checkpoint import Checkpoints
    from megatron_rl.parallel.groups import build_groups

    groups = build_groups(tensor_parallel_size=1, pipeline_parallel_size=1, device=torch.device("cpu"), seed=1)
    said: list[str] = []
    return Checkpoints(directory, keep_last=2, groups=groups, say=said.append), said


def found(directory: Path, explicit: Path | None, is_resuming: bool = True) -> tuple[str | None, str | None]:
    checkpoints, _ = checkpoints_of(directory)
    path = checkpoints.find(None if explicit is None else str(explicit), is_resuming=is_resuming)
    return path and path.name, checkpoints.origin


def test_an_explicit_checkpoint_gives_way_to_those_that_descend_from_it(tmp_path: Path) -> None:
    first = write(tmp_path, 20)
    second = write(tmp_path, 40, origin=str(first))
    assert run_ranks(found, 2, tmp_path, first) == [("step_00000040", str(first))] * 2
    write(tmp_path, 60, origin=str(first), is_complete=False)
    assert run_ranks(found, 1, tmp_path, first) == [("step_00000040", str(first))]
    assert run_ranks(found, 1, tmp_path, first, False) == [("step_00000020", str(first))]
    assert run_ranks(found, 1, tmp_path, None) == [("step_00000040", str(first))]
    # The newest belongs to another branch now, although older ones descend from the first.
    write(tmp_path, 80, origin=str(second))
    assert run_ranks(found, 2, tmp_path, first) == [("step_00000020", str(first))] * 2
    assert run_ranks(found, 1, tmp_path, second) == [("step_00000080", str(second))]


def test_a_pruned_explicit_checkpoint_is_not_missed(tmp_path: Path) -> None:
    write(tmp_path, 40, origin=str(tmp_path / "step_00000020"))
    origin = tmp_path / "step_00000020"
    assert run_ranks(found, 1, tmp_path, origin) == [("step_00000040", str(origin))]


def set_aside(directory: Path, start: Path | None) -> tuple[list[str], list[str]]:
    checkpoints, said = checkpoints_of(directory)
    checkpoints.set_aside_others(start)
    return sorted(path.name for path in directory.glob("step_*")), said


def test_what_a_run_does_not_continue_is_set_aside(tmp_path: Path) -> None:
    directory = tmp_path / "mine"
    paths = [write(directory, step) for step in (20, 40, 60)]
    names = [path.name for path in paths]
    assert run_ranks(set_aside, 1, directory, paths[2]) == [(names, [])]
    first, other = run_ranks(set_aside, 2, directory, paths[1])
    assert first[0] == names[:2] and "step_00000060: renamed to abandoned_" in first[1][0] and not other[1]
    assert run_ranks(set_aside, 1, directory, write(tmp_path / "others", 40))[0][0] == []
    write(directory, 80)
    assert run_ranks(set_aside, 1, directory, None)[0][0] == []
    assert sorted(int(path.name[-8:]) for path in directory.glob("abandoned_*")) == [20, 40, 60, 80]


def saved(directory: Path, model: Path, step: int) -> list[str]:
    from megatron_rl.model.checkpoint import Checkpoints
    from tests.policy_case import build_policy, tiny_config

    policy = build_policy(tiny_config(model))
    Checkpoints(directory, keep_last=2, groups=policy.groups, say=print).save(step, policy.trainable, {"step": step})
    return sorted(path.name for path in directory.glob("step_*"))


def test_a_save_never_removes_itself_nor_counts_incomplete_ones(tmp_path: Path) -> None:
    from tests.tiny_models import make_tiny_model

    model = make_tiny_model(tmp_path / "model", "qwen3", tied=True, seed=3)
    directory = tmp_path / "checkpoints"
    for step in (2, 4, 40, 60):
        write(directory, step)
    write(directory, 6, is_complete=False)
    names = [f"step_{step:08d}" for step in (4, 6, 8, 40, 60)]
    assert run_ranks(saved, 1, directory, model, 8) == [names]


def load_with(path: Path, fixed: dict) -> str:
    checkpoints, _ = checkpoints_of(path.parent)
    with pytest.raises(UserError) as error:
        checkpoints.load(path, None, fixed)  # refused before the policy is looked at
    return str(error.value)


def test_fixed_settings_are_compared_before_anything_is_loaded(tmp_path: Path) -> None:
    def fixed(value: object, compared: object) -> dict:
        return {"value": value, "compared": compared}

    saved = {
        "data.task": fixed("gsm8k", "gsm8k"),
        "data.train": fixed("a.jsonl", "12ab"),
        "data.reward": fixed(None, None),
        "policy.model_path": fixed("m", {"num_layers": 2, "tied": True}),
    }
    path = write(tmp_path, 2, fixed=saved)
    end = "Fix: restore it to continue that run, or start another one: set exp_manager.name."
    for field, now, words in (
        ("data.task", fixed("sums", "sums"), f"data.task = 'sums': the checkpoint was trained with 'gsm8k'. {end}"),
        ("data.reward", fixed("a:b", "a:b"), "data.reward = 'a:b': the checkpoint was trained without one. Fix"),
        ("data.train", fixed("a.jsonl", "34cd"), "trained with 'a.jsonl', whose content was another"),
        ("policy.model_path", fixed("n", {"num_layers": 3, "tied": True}), "a model of num_layers 2, not 3. Fix"),
    ):
        for error in run_ranks(load_with, 2, path, {**saved, "trainer.seed": fixed(1, 1), field: now}):
            assert words in error


def test_what_may_not_change_is_written_down(tmp_path: Path) -> None:
    from megatron_rl.config import load_config
    from megatron_rl.convert.architecture.shape import read_shape
    from megatron_rl.model.checkpoint import fixed_settings

    model, train = make_tiny_model(tmp_path, "qwen3", tied=True, seed=1), tmp_path / "train.jsonl"
    train.write_text("{}")
    reward = "tests.unit.scoring.rewards:brief"
    overrides = [f"policy.model_path={model}", f"data.train={train}", f"data.reward={reward}", "trainer.seed=5"]
    fixed = fixed_settings(load_config(CONFIG, overrides), read_shape(model))
    values = {field: entry["value"] for field, entry in fixed.items()}
    assert values == {
        "policy.model_path": str(model), "policy.optim.name": "adam", "data.task": "gsm8k", "data.reward": reward,
        "data.train": str(train), "trainer.seed": 5,
    }  # fmt: skip
    assert fixed["data.reward"]["compared"] == reward and fixed["policy.model_path"]["compared"]["num_layers"] > 0

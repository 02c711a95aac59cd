"""Which checkpoint is taken, kept, set aside or refused: on directories that only look like checkpoints."""

from __future__ import annotations

import io
import json
import os
import pickle
import random
import shutil
import tempfile
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy
import pytest
import torch

from megatron_rl.errors import UserError
from megatron_rl.model.manifest import entry_of, incompleteness, write_manifest
from tests.forked import run_ranks
from tests.policy_case import CONFIG
from tests.tiny_models import make_tiny_model


def write(directory: Path, step: int, *, is_complete: bool = True, **state: object) -> Path:
    path = directory / f"step_{step:08d}"
    path.mkdir(parents=True)
    (path / "model").mkdir()
    (path / "state.json").write_text(json.dumps({"step": step, "num_ranks": 1, **state}))
    for name in ("model/.metadata", "model/metadata.json", "rng_rank_0.json"):
        (path / name).touch()
    if is_complete:
        list_files(path)
    return path


def list_files(path: Path) -> None:
    """Write the manifest of whatever is there, as whoever can write a checkpoint can."""
    files = [file for file in path.rglob("*") if file.is_file() and file.name != "manifest.json"]
    write_manifest(path, {str(file.relative_to(path)): entry_of(file) for file in files})


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


def others(directory: Path, start: Path | None) -> list[str]:
    return [path.name for path in checkpoints_of(directory)[0].others(start)]


def test_what_a_run_does_not_continue(tmp_path: Path) -> None:
    directory = tmp_path / "mine"
    paths = [write(directory, step) for step in (20, 40, 60)]
    names = [path.name for path in paths]
    assert run_ranks(others, 1, directory, paths[2]) == [[]]
    assert run_ranks(others, 1, directory, paths[1]) == [names[2:]]
    assert run_ranks(others, 1, directory, write(tmp_path / "others", 40)) == [names]
    assert run_ranks(others, 1, directory, None) == [names]


@pytest.mark.parametrize("name", ["state.json", "model/.metadata", "model/metadata.json", "rng_rank_1.json"])
def test_a_manifest_lists_what_every_checkpoint_has(tmp_path: Path, name: str) -> None:
    path = write(tmp_path, 2, num_ranks=2)
    (path / "rng_rank_1.json").touch()
    list_files(path)
    assert incompleteness(path) is None
    (path / name).unlink()
    assert incompleteness(path) == f"is incomplete: {name} is missing or cut short"
    list_files(path)
    assert incompleteness(path) == f"is incomplete: its manifest.json lacks {name}"


@pytest.mark.parametrize("content", ["", "[]", '{"files": 5}', '{"files": {"state.json": {"bytes": 2}}}'])
def test_a_manifest_that_says_nothing_is_none(tmp_path: Path, content: str) -> None:
    path = write(tmp_path, 2)
    (path / "manifest.json").write_text(content)
    assert incompleteness(path) == "is incomplete: it has no readable manifest.json"
    (path / "manifest.json").write_text('{"files": {}}')
    assert incompleteness(path) == "is incomplete: its manifest.json lacks state.json"


@pytest.mark.parametrize("name", ["../other.json", "/etc/hostname", "model/../../x"])
def test_a_manifest_names_only_what_is_inside(tmp_path: Path, name: str) -> None:
    path = write(tmp_path, 2)
    manifest = json.loads((path / "manifest.json").read_text())
    manifest["files"][name] = entry_of(path / "state.json")
    (path / "manifest.json").write_text(json.dumps(manifest))
    assert f"names {name}, outside of it" in (incompleteness(path) or "")


def find_fails(directory: Path, explicit: Path | None = None, sight: str = "") -> str:
    from megatron_rl.model import checkpoint

    def look(path: Path) -> str | None:
        """One rank's mount lags, or its disk fails."""
        if torch.distributed.get_rank() == 1:
            if sight == "EIO":
                raise UserError(str(path), None, "cannot be read (Input/output error)", "mend it")
            return "is incomplete: x is missing or cut short"
        return incompleteness(path)

    if sight:
        checkpoint.incompleteness = look
    checkpoints, _ = checkpoints_of(directory)
    with pytest.raises(UserError) as error:
        checkpoints.find(None if explicit is None else str(explicit))
    return str(error.value)


def test_a_run_whose_checkpoints_are_all_unusable_never_starts_over(tmp_path: Path) -> None:
    for step in (20, 40):
        write(tmp_path / "mine", step)
        (tmp_path / f"mine/step_{step:08d}/state.json").write_text("{}")
    write(tmp_path / "mine", 60, is_complete=False)
    first, second = run_ranks(find_fails, 2, tmp_path / "mine")
    assert first == second and "has no checkpoint to resume from: step_00000060 is incomplete" in first
    assert "; step_00000040 is incomplete: state.json is missing or cut short; step_00000020 is" in first
    assert "another exp_manager.name" in first and "explicit" not in first
    other = write(tmp_path / "other", 20)
    assert "resume_if_exists=false to go back to the explicit" in run_ranks(find_fails, 1, tmp_path / "mine", other)[0]


@pytest.mark.parametrize("sight", ["EIO", "lags"])
def test_what_one_rank_cannot_see_is_no_reason_to_take_another(tmp_path: Path, sight: str) -> None:
    for step in (20, 40):
        write(tmp_path, step)
    first, second = run_ranks(find_fails, 2, tmp_path, None, sight)
    assert first == second and "step_00000040" in first
    assert "Input/output error" in first if sight == "EIO" else "as rank 1 on" in first


def find_as_another_user(directory: Path) -> str:
    checkpoints, _ = checkpoints_of(directory)
    os.seteuid(65534)
    try:
        with pytest.raises(UserError) as error:
            checkpoints.find(None)
    finally:
        os.seteuid(0)
    return str(error.value)


@pytest.mark.skipif(os.getuid() != 0, reason="root alone can become another user, whom rights bind")
@pytest.mark.parametrize("name", ["step_00000040/manifest.json", "step_00000040/model", "step_00000040", "."])
def test_rights_that_lack_are_named_and_end_the_run(name: str) -> None:
    with tempfile.TemporaryDirectory() as folder:  # pytest's own is closed to others
        Path(folder).chmod(0o755)
        directory = Path(folder, "checkpoints")
        for step in (20, 40):
            write(directory, step)
        (directory / name).chmod(0)
        [error] = run_ranks(find_as_another_user, 1, directory)
        assert "cannot be read (Permission denied)" in error and "step_00000020" not in error


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


class Evil:
    """Makes a folder when it is unpickled."""

    def __init__(self, mark: Path) -> None:
        self.mark = mark

    def __reduce__(self) -> tuple[object, tuple[str]]:
        return os.mkdir, (str(self.mark),)


def read_pickle(path: Path) -> Any:
    return pickle.loads(path.read_bytes())


def plant_in_metadata(path: Path, evil: Evil) -> None:
    metadata = read_pickle(path / "model/.metadata")
    metadata.planner_data = {"harmless": evil}
    (path / "model/.metadata").write_bytes(pickle.dumps(metadata))


def plant_in_an_object(path: Path, evil: Evil) -> None:
    """Let .metadata point at other bytes for an object that every load reads."""
    metadata = read_pickle(path / "model/.metadata")
    keys = {key for key, kind in metadata.state_dict_metadata.items() if type(kind).__name__ == "BytesStorageMetadata"}
    places = {index: place for index, place in metadata.storage_data.items() if index.fqn in keys}
    assert places
    data = io.BytesIO()
    torch.save(evil, data)
    (path / "model/evil.distcp").write_bytes(data.getvalue())
    for index, place in places.items():
        moved = replace(place, relative_path="evil.distcp", offset=0, length=len(data.getvalue()))
        metadata.storage_data[index] = moved
    (path / "model/.metadata").write_bytes(pickle.dumps(metadata))


PLANTS: dict[str, Callable[[Path, Evil], object]] = {
    "generators": lambda path, evil: (path / "rng_rank_1.json").write_bytes(pickle.dumps(evil)),
    "all of .metadata": lambda path, evil: (path / "model/.metadata").write_bytes(pickle.dumps(evil)),
    "inside .metadata": plant_in_metadata,
    "common.pt": lambda path, evil: torch.save({"num_updates": evil}, path / "model/common.pt"),
    "an object": plant_in_an_object,
}


def saved_and_tried(directory: Path, model: Path) -> dict[str, str]:
    """Save one checkpoint; plant something into copies of it, make their manifests fit, and load each."""
    from megatron_rl.model.checkpoint import Checkpoints
    from tests.policy_case import build_policy, tiny_config

    policy = build_policy(tiny_config(model, "trainer.devices=2"))
    checkpoints = Checkpoints(directory, keep_last=9, groups=policy.groups, say=print)
    good = checkpoints.save(1, policy.trainable, {"step": 1})
    checkpoints.load(good, policy.trainable)
    errors = {}
    for name, plant in PLANTS.items():
        bad, mark = directory / name / good.name, directory / f"{name} ran"
        if policy.groups.rank == 0:
            shutil.copytree(good, bad)
            plant(bad, Evil(mark))
            list_files(bad)
        torch.distributed.barrier()
        assert checkpoints.find(str(bad), is_resuming=False) == bad
        with pytest.raises(UserError) as error:
            checkpoints.load(bad, policy.trainable)
        assert not mark.exists(), name
        errors[name] = str(error.value)
    checkpoints.load(good, policy.trainable)
    return errors


def test_nothing_in_a_checkpoint_is_executed(tmp_path: Path) -> None:
    evil = Evil(tmp_path / "ran")
    pickle.loads(pickle.dumps(evil))
    assert evil.mark.is_dir(), "it would do harm"
    model = make_tiny_model(tmp_path / "model", "qwen3", tied=True, seed=3)
    first, second = run_ranks(saved_and_tried, 2, tmp_path / "checkpoints", model)
    assert first == second and first.keys() == PLANTS.keys()
    assert "rng_rank_1.json: holds no states of random generators" in first["generators"]
    for name in PLANTS.keys() - {"generators"}:
        assert "cannot be loaded as plain data" in first[name] and "Fix: " in first[name], first[name]
    assert "names posix.mkdir" in first["inside .metadata"]


def draws() -> tuple[object, ...]:
    from megatron.core.tensor_parallel.random import get_cuda_rng_tracker

    with get_cuda_rng_tracker().fork():
        tracked = torch.rand(3).tolist()
    return tracked, torch.rand(3).tolist(), numpy.random.normal(size=3).tolist(), random.gauss(0, 1), random.random()


def drawn_twice() -> tuple[object, object, object]:
    from megatron_rl.model.generators import generator_states, restore_generators
    from megatron_rl.parallel.groups import build_groups

    build_groups(tensor_parallel_size=1, pipeline_parallel_size=1, device=torch.device("cpu"), seed=1)
    numpy.random.normal()  # the second of a pair waits
    random.gauss(0, 1)
    kept = json.loads(json.dumps(generator_states()))
    first = draws()
    restore_generators(kept)
    return first, draws(), draws()


def test_generators_go_on_bit_for_bit() -> None:
    [(first, again, later)] = run_ranks(drawn_twice, 1)
    assert first == again != later


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
        (
            "policy.model_path",
            fixed("n", {"num_layers": 2, "tied": True, "digest of the weights": "5"}),
            "weights were others",
        ),
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
        "algorithm.name": "grpo",
        "data.train": str(train), "trainer.seed": 5,
    }  # fmt: skip
    assert fixed["data.reward"]["compared"] == reward and fixed["policy.model_path"]["compared"]["num_layers"] > 0
    moved = shutil.copytree(model, tmp_path / "moved")
    other = make_tiny_model(tmp_path / "other", "qwen3", tied=True, seed=2)
    [of_moved, of_other] = [
        fixed_settings(load_config(CONFIG, [*overrides, f"policy.model_path={path}"]), read_shape(path))
        for path in (moved, other)
    ]
    assert of_moved["policy.model_path"]["compared"] == fixed["policy.model_path"]["compared"]
    assert of_other["policy.model_path"]["compared"] != fixed["policy.model_path"]["compared"]

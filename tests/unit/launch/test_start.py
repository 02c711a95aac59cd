"""A start takes a lock and a key on its node, and hands them on to the launcher and the ranks."""

from __future__ import annotations

import json
import os
from pathlib import Path

import pytest
import torch.distributed as dist
from torch.distributed.distributed_c10d import _get_default_store

from megatron_rl.config import Config, load_config
from megatron_rl.errors import UserError
from megatron_rl.launch import command, program
from megatron_rl.launch.meeting import Meeting
from megatron_rl.launch.rank import Runtime, _key_among_ranks
from megatron_rl.process.lock import take_lock
from megatron_rl.process.run_key import FILE, FILE_VARIABLE, VARIABLE, read_key, write_key
from tests.forked import run_child, run_ranks

TINY = Path(__file__).parents[2] / "tiny.yaml"


def config(folder: Path, num_nodes: int = 1) -> Config:
    return load_config(TINY, ["policy.model_path=m", f"exp_manager.exp_dir={folder}", f"trainer.num_nodes={num_nodes}"])


def handed_on(folder: Path, node_rank: int | None = None) -> dict[str, str]:
    """The environment of the launcher, from a start in a process of its own."""

    def note(_path: str, _command: list[str], environment: dict[str, str]) -> None:
        (folder / "environment").write_text(json.dumps(environment))

    def start() -> None:
        os.execve = note  # type: ignore[assignment]
        nodes = 1 if node_rank is None else 2
        meeting = None if node_rank is None else Meeting("127.0.0.1", 1, node_rank)
        command.start(config(folder, nodes), "c.yaml", [], meeting)

    assert run_child(start) == 0
    return json.loads((folder / "environment").read_text())


def test_each_start_on_one_node_has_another_key_that_no_file_holds(tmp_path: Path) -> None:
    first, second = handed_on(tmp_path)[VARIABLE], handed_on(tmp_path)[VARIABLE]
    assert len(first) == len(second) == 64 and first != second
    assert [path.name for path in (tmp_path / "tiny").iterdir()] == [".lock"]


def test_on_several_nodes_node_0_writes_it_anew_and_the_others_are_told_where(tmp_path: Path) -> None:
    keys = [handed_on(tmp_path, 0)[VARIABLE] for _ in range(2)]
    assert keys[0] != keys[1] and (tmp_path / "tiny" / FILE).read_text() == keys[1]
    other = handed_on(tmp_path, 1)
    assert VARIABLE not in other and other[FILE_VARIABLE] == str(tmp_path / "tiny" / FILE)
    assert (tmp_path / "tiny" / FILE).read_text() == keys[1]


def test_a_key_of_the_user_needs_no_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(VARIABLE, "ab" * 32)
    for node_rank in (None, 0, 1):
        assert handed_on(tmp_path, node_rank)[VARIABLE] == "ab" * 32
    assert {path.name for path in (tmp_path / "tiny").iterdir()} == {".lock", ".lock.1"}


def test_a_second_start_is_refused_on_every_node(tmp_path: Path) -> None:
    for node_rank in (0, 1):
        held = take_lock(tmp_path / "tiny", node_rank)
        with pytest.raises(UserError, match=f"is in use by process {os.getpid()} of user"):
            command.start(config(tmp_path, 2), "c.yaml", [], Meeting("127.0.0.1", 1, node_rank))
        held.release()


def test_without_our_launcher_the_first_rank_of_each_node_takes_a_lock(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    names = []
    for rank, local_rank, node_rank in ((0, 0, 0), (1, 1, 0), (2, 0, 1), (3, 1, 1)):
        for name, value in (("RANK", rank), ("LOCAL_RANK", local_rank), ("GROUP_RANK", node_rank)):
            monkeypatch.setenv(name, str(value))
        if (held := program._take_folder(config(tmp_path, 2))) is not None:
            names.append((rank, held._path.name))
            held.release()
    assert names == [(0, ".lock"), (2, ".lock.1")]


def key_of_rank(folder: Path) -> str:
    rank, world_size = dist.get_rank(), dist.get_world_size()
    return _key_among_ranks(config(folder), Runtime(rank, world_size, None), _get_default_store()).hex()  # type: ignore[arg-type]


def test_ranks_without_our_launcher_share_a_new_key(tmp_path: Path) -> None:
    old = write_key(tmp_path / "tiny")
    first, second = run_ranks(key_of_rank, 2, tmp_path)
    assert first == second != old.hex() and read_key(tmp_path / "tiny" / FILE) == bytes.fromhex(first)
    assert run_ranks(key_of_rank, 1, tmp_path) != [first]
    assert read_key(tmp_path / "tiny" / FILE) == bytes.fromhex(first), "one rank needs no file"


GPU = ("CUDA_DEVICE_MAX_CONNECTIONS", "PYTORCH_ALLOC_CONF", "PYTORCH_CUDA_ALLOC_CONF")


def test_ranks_get_variables_for_gpus_unless_the_user_has_set_them(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def found() -> dict[str, str]:
        return {name: value for name, value in handed_on(tmp_path).items() if name in GPU}

    for name in GPU:
        monkeypatch.delenv(name, raising=False)
    assert found() == {"CUDA_DEVICE_MAX_CONNECTIONS": "1", "PYTORCH_ALLOC_CONF": "expandable_segments:True"}
    for name, value in (("CUDA_DEVICE_MAX_CONNECTIONS", "32"), ("PYTORCH_CUDA_ALLOC_CONF", "max_split_size_mb:512")):
        monkeypatch.setenv(name, value)
    assert found() == {"CUDA_DEVICE_MAX_CONNECTIONS": "32", "PYTORCH_CUDA_ALLOC_CONF": "max_split_size_mb:512"}


def test_memory_that_servers_open_by_cuda_ipc_does_not_grow(tmp_path: Path) -> None:
    colocated = ["rollout.engine=sglang", "rollout.servers.placement=colocated"]
    given = load_config(TINY, ["policy.model_path=m", *colocated])
    assert command.gpu_variables(given, {}) == {"CUDA_DEVICE_MAX_CONNECTIONS": "1"}

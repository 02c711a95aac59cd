"""Decisions before the ranks meet, and what the launcher says when one of them fails."""

from __future__ import annotations

import os
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
import torch.distributed as dist
from torch.distributed.elastic.multiprocessing.errors import ChildFailedError

import megatron_rl.patches
from megatron_rl.config import Config, installed, load_config
from megatron_rl.config.methods.sft import SFTConfig
from megatron_rl.errors import UserError
from megatron_rl.launch import launcher
from megatron_rl.launch import rank as runtime
from tests.forked import run_ranks

TINY = Path(__file__).parents[2] / "tiny.yaml"


def config(*overrides: str):
    return load_config(TINY, ["policy.model_path=m", *overrides])


def supervised(given: Config) -> Config:
    """The same without rollouts: it builds no engine."""
    return replace(given, trainer=replace(given.trainer, stage="sft"), algorithm=SFTConfig())


def test_more_ranks_than_gpus_are_refused_on_every_rank(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 1)
    for local_rank in ("0", "1"):
        monkeypatch.setenv("LOCAL_RANK", local_rank)
        with pytest.raises(UserError, match=r"trainer\.devices = 2.*torch sees 1 here"):
            runtime._device(config("trainer.accelerator=auto", "trainer.devices=2"))


def test_servers_beside_the_trainer_need_gpus_too() -> None:
    given = config(
        "rollout.engine=sglang", "trainer.devices=2", "rollout.servers.num_per_node=2", "rollout.sglang_cfg.tp_size=2"
    )
    runtime._check_enough_gpus(given, 6)
    with pytest.raises(
        UserError, match=r"num_per_node = 2: our servers take 4 GPUs of a node after the trainer's 2, and.* 5 here"
    ):
        runtime._check_enough_gpus(given, 5)
    runtime._check_enough_gpus(config("trainer.devices=2"), 2)
    runtime._check_enough_gpus(supervised(given), 2)


def test_segments_that_colocated_servers_cannot_open_are_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    given = ("rollout.engine=sglang", "trainer.devices=1", "rollout.servers.placement=colocated")
    monkeypatch.setenv("PYTORCH_CUDA_ALLOC_CONF", "max_split_size_mb:64,expandable_segments:True")
    runtime._check_allocator(config(*given[:2]))
    runtime._check_allocator(supervised(config(*given)))
    with pytest.raises(UserError, match=r"PYTORCH_CUDA_ALLOC_CONF = .*by CUDA IPC"):
        runtime._check_allocator(config(*given))
    monkeypatch.setenv("PYTORCH_CUDA_ALLOC_CONF", "expandable_segments:False")
    runtime._check_allocator(config(*given))


def test_a_gpu_that_torch_cannot_use_is_not_passed_over(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    monkeypatch.setattr(installed, "platform", lambda: "gpu")
    monkeypatch.setattr(installed, "driver_cuda", lambda: (12, 8))
    monkeypatch.setattr(torch.version, "cuda", None)
    assert runtime._device(config("trainer.accelerator=auto")).type == "cpu"  # torch was built for CPUs: no accident
    with pytest.raises(UserError, match=r"trainer\.accelerator = 'gpu': finds torch .*, a build without CUDA"):
        runtime._device(config("trainer.accelerator=gpu"))
    monkeypatch.setattr(torch.version, "cuda", "13.0")
    with pytest.raises(UserError, match=r"trainer\.accelerator = 'auto': finds a driver for CUDA 12\.8"):
        runtime._device(config("trainer.accelerator=auto"))
    assert runtime._device(config("trainer.accelerator=cpu")).type == "cpu"


@pytest.mark.parametrize(("options", "is_checked"), [((), True), (("transformer_impl=local",), False)])
def test_a_gpu_and_its_software_are_checked_before_the_ranks_meet(
    options: tuple[str, ...], is_checked: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Kernels always, Transformer Engine unless its layers are not wanted."""
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 1)
    monkeypatch.setattr(torch.cuda, "set_device", lambda _device: None)
    monkeypatch.setattr(torch.cuda, "get_arch_list", lambda: ["sm_90"])
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda _device: (9, 0))
    checked: list[str] = []
    monkeypatch.setattr(installed, "check_engine_here", lambda *, torch, cuda: checked.append(torch))
    settings = [f"policy.megatron_cfg.{option}" for option in options]
    assert runtime._device(config("trainer.accelerator=gpu", "trainer.devices=1", *settings)).type == "cuda"
    assert checked == [torch.__version__] * is_checked
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda _device: (7, 0))
    with pytest.raises(UserError, match=r"compute capability 7\.0"):
        runtime._device(config("trainer.accelerator=gpu", "trainer.devices=1", *settings))


def patched_for(directory: Path) -> list[str | None]:
    """The device types that a CPU run on a machine with CUDA asks patches for."""
    asked: list[str | None] = []
    torch.cuda.is_available = lambda: True
    megatron_rl.patches.apply = lambda device_type=None: asked.append(device_type) or []
    assert runtime.run_rank(config(f"exp_manager.exp_dir={directory}"), lambda _runtime: None) == 0
    return asked


def test_patches_follow_the_device_of_the_run(tmp_path: Path) -> None:
    assert run_ranks(patched_for, 1, tmp_path) == [["cpu"]]


def status_without_a_log(directory: Path) -> int:
    return runtime.run_rank(config(f"exp_manager.exp_dir={directory}", "trainer.devices=2"), lambda _runtime: None)


def test_a_log_that_cannot_be_opened_is_a_user_error(tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "file").touch()
    assert run_ranks(status_without_a_log, 2, tmp_path / "file") == [2, 2]
    assert "exp_manager.exp_dir = " in capfd.readouterr().err


def what_the_launcher_says(monkeypatch: pytest.MonkeyPatch, *failed_ranks: int) -> tuple[int, str | None]:
    failures = {
        rank: SimpleNamespace(
            local_rank=rank, exitcode=2, message="", error_file_data={}, timestamp=rank, signal_name=lambda: ""
        )
        for rank in failed_ranks
    }
    error = ChildFailedError.__new__(ChildFailedError)
    error.name, error.failures = "ranks", failures  # type: ignore[assignment]

    def torchrun(_arguments: list[str]) -> None:
        raise error

    monkeypatch.setattr("torch.distributed.run.main", torchrun)
    return launcher._run_torchrun([], None)


def test_the_launcher_points_at_the_log_of_a_rank_that_failed_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    status, message = what_the_launcher_says(monkeypatch, 1)
    assert status == 2 and message is not None and "rank 1" in message and "logs/rank_1.log" in message


def test_the_launcher_is_silent_where_rank_0_has_spoken(monkeypatch: pytest.MonkeyPatch) -> None:
    assert what_the_launcher_says(monkeypatch, 0, 1) == (2, None)


def refusal(check: Callable[[], None]) -> str:
    try:
        check()
    except UserError as error:
        return str(error)
    return ""


def refusal_of_other_configs(equal: bool) -> str:
    steps = 5 if equal else 5 + dist.get_rank()
    return refusal(lambda: runtime._check_same_config(config(f"trainer.max_steps={steps}")))


def test_ranks_with_other_configs_all_stop_with_the_same_words() -> None:
    assert run_ranks(refusal_of_other_configs, 2, equal=True) == ["", ""]
    first, second = run_ranks(refusal_of_other_configs, 2, equal=False)
    assert first == second and first.startswith("trainer.max_steps: rank 0 has 5, rank 1 6")


def refusal_of_folders(folders: list[Path]) -> str:
    rank = dist.get_rank()
    return refusal(lambda: runtime._check_shared_folder(config(f"exp_manager.exp_dir={folders[rank]}"), rank))


def test_a_folder_that_one_node_does_not_see_stops_all_ranks(tmp_path: Path) -> None:
    here, elsewhere = tmp_path / "here", tmp_path / "elsewhere"
    assert run_ranks(refusal_of_folders, 2, [here, here]) == ["", ""]
    first, second = run_ranks(refusal_of_folders, 2, [here, elsewhere])
    assert first == second and "rank 1 on " in first and str(elsewhere) in first
    assert not [path for path in here.rglob("*") if path.is_file()], "the mark is taken away again"
    (tmp_path / "file").touch()
    first, second = run_ranks(refusal_of_folders, 2, [tmp_path / "file", here])
    assert first == second and "could not be written" in first


def test_another_number_of_processes_than_configured_is_refused() -> None:
    runtime._check_world_size(config("trainer.devices=2"), 2)
    with pytest.raises(UserError, match=r"devices \* num_nodes = 2, but torchrun started 4 processes"):
        runtime._check_world_size(config("trainer.devices=2"), 4)


@pytest.mark.parametrize(
    ("master", "words"),
    [
        (
            "2130706433",
            "to its own loopback",
        ),  # 127.0.0.1 as one number: a name that is loopback only once it is resolved
        ("2001:db8::1", "to no IPv4 address"),
    ],
)
def test_a_node_0_that_others_cannot_reach_is_one_line(
    monkeypatch: pytest.MonkeyPatch, master: str, words: str
) -> None:
    monkeypatch.setenv("MASTER_ADDR", master)
    monkeypatch.delenv("GLOO_SOCKET_IFNAME", raising=False)
    with pytest.raises(UserError, match=f"MASTER_ADDR = '{master}': leads .* {words}.*--rdzv-endpoint") as caught:
        runtime._join_others(config("trainer.num_nodes=2"), runtime.Runtime(0, 2, torch.device("cpu")))
    assert "\n" not in str(caught.value) and "GLOO_SOCKET_IFNAME" not in os.environ


@pytest.mark.parametrize("master", ["localhost", "127.0.0.1", "127.1.2.3"])
def test_nodes_that_are_said_to_be_on_one_machine_meet_on_loopback(
    monkeypatch: pytest.MonkeyPatch, master: str
) -> None:
    monkeypatch.setenv("MASTER_ADDR", master)
    runtime._check_meeting_address(2, master)

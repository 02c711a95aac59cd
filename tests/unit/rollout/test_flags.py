"""Command line and environment of a server, for parts of a larger one too."""

from __future__ import annotations

import os
import sys
from pathlib import Path
from typing import Any

import pytest
import torch

from megatron_rl.rollout.sglang.flags import ServerPart, server_command, server_environment
from megatron_rl.rollout.sglang_server import MEETING_VARIABLE

PART = ServerPart(index=1, num_parts=2, meeting="10.0.0.1:4711")


def environment(**more: Any) -> dict[str, str]:
    sizes = {"is_cpu": False, "tensor_parallel_size": 2, "num_servers": 1, "num_cores": 4}
    return server_environment(key="k", port=30000, meeting=Path("/folder/store"), **(sizes | more))


def test_programs_of_this_environment_are_found_by_their_names(monkeypatch: pytest.MonkeyPatch) -> None:
    """SGLang runs ninja, whether or not the environment has been activated."""
    monkeypatch.setenv("PATH", "/usr/bin")
    assert environment()["PATH"] == f"{Path(sys.executable).parent}{os.pathsep}/usr/bin"


def test_ranks_meet_in_a_file_unless_they_are_on_several_nodes() -> None:
    alone, part = environment(), environment(part=PART)
    assert alone[MEETING_VARIABLE] == "file:///folder/store" and MEETING_VARIABLE not in part
    assert (alone["MASTER_ADDR"], alone["MASTER_PORT"]) == ("127.0.0.1", "30000")
    assert (part["MASTER_ADDR"], part["MASTER_PORT"]) == ("10.0.0.1", "4711")


@pytest.mark.parametrize("part", [None, PART])
def test_a_part_is_told_which_it_is_and_where_they_meet(part: ServerPart | None) -> None:
    command = server_command(
        {"tp_size": 2}, model_path="m", dtype=torch.bfloat16, is_cpu=False, host="10.0.0.2", port=30000, base_gpu_id=0,
        releases_memory=True, seed=1, part=part,
    )  # fmt: skip
    said = {command[n]: command[n + 1] for n in range(len(command) - 1) if command[n].startswith("--")}
    flags = ("--nnodes", "--node-rank", "--dist-init-addr")
    assert [said.get(flag) for flag in flags] == ([None] * 3 if part is None else ["2", "1", "10.0.0.1:4711"])

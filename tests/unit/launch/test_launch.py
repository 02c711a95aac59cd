from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

from megatron_rl.config import Config, load_config
from megatron_rl.errors import UserError
from megatron_rl.launch.command import torchrun_arguments
from megatron_rl.launch.meeting import Meeting, find_meeting, first_host, read_back
from megatron_rl.launch.rank import difference

TINY = Path(__file__).parents[2] / "tiny.yaml"
SLURM = {"SLURM_JOB_NODELIST": "gpu[07-08]", "SLURM_NODEID": "1", "SLURM_JOB_ID": "123456"}


def config(num_nodes: int = 2) -> Config:
    return load_config(TINY, ["policy.model_path=m", f"trainer.num_nodes={num_nodes}", "trainer.devices=2"])


@pytest.mark.parametrize(
    ("endpoint", "node_rank", "environment", "expected"),
    [
        ("head:1234", 1, {}, Meeting("head", 1234, 1)),
        ("head", 0, {}, Meeting("head", 29500, 0)),
        ("[::1]:1234", 0, {}, Meeting("::1", 1234, 0)),
        (None, None, {"MASTER_ADDR": "a", "MASTER_PORT": "7", "NODE_RANK": "1"}, Meeting("a", 7, 1)),
        (None, None, {"MASTER_ADDR": "a", "NODE_RANK": "0"}, Meeting("a", 29500, 0)),
        (None, None, SLURM, Meeting("gpu07", 23456, 1)),
        (None, None, SLURM | {"SLURM_STEP_NODELIST": "gpu08"}, Meeting("gpu08", 23456, 1)),
        (None, None, SLURM | {"MASTER_PORT": "99"}, Meeting("gpu07", 99, 1)),
        (None, None, SLURM | {"MASTER_ADDR": "a", "NODE_RANK": "0"}, Meeting("a", 29500, 0)),
        ("head:1234", 0, SLURM | {"MASTER_ADDR": "a", "MASTER_PORT": "7", "NODE_RANK": "1"}, Meeting("head", 1234, 0)),
    ],
)
def test_options_win_over_variables_and_those_over_slurm(
    endpoint: str | None, node_rank: int | None, environment: dict[str, str], expected: Meeting
) -> None:
    assert find_meeting(config(), endpoint, node_rank, environment) == expected


@pytest.mark.parametrize(
    ("endpoint", "node_rank", "environment", "words"),
    [
        (None, None, {}, ["trainer.num_nodes = 2", "--rdzv-endpoint", "MASTER_ADDR"]),
        (None, 0, {}, ["trainer.num_nodes = 2", "--rdzv-endpoint"]),
        ("head:1", None, {}, ["trainer.num_nodes = 2", "--node-rank"]),
        ("head:1", 2, {}, ["--node-rank = 2", "0 to trainer.num_nodes - 1 = 1"]),
        ("head:1", -1, {}, ["--node-rank = -1"]),
        ("head:1", None, {"NODE_RANK": "first"}, ["NODE_RANK = 'first'"]),
        ("head:port", 0, {}, ["--rdzv-endpoint = 'head:port'", "65535"]),
        (None, 0, {"MASTER_ADDR": "a", "MASTER_PORT": "70000"}, ["MASTER_PORT = '70000'", "65535"]),
    ],
)
def test_a_meeting_point_that_is_missing_or_wrong_is_one_error(
    endpoint: str | None, node_rank: int | None, environment: dict[str, str], words: list[str]
) -> None:
    with pytest.raises(UserError) as caught:
        find_meeting(config(), endpoint, node_rank, environment)
    assert all(word in str(caught.value) for word in [*words, "Fix: "])


def test_one_node_meets_nobody_and_a_forgotten_num_nodes_is_an_error() -> None:
    assert find_meeting(config(1), None, None, SLURM) is None  # a job of several machines may hold runs on one
    for endpoint, node_rank in (("head:1", None), (None, 1)):
        with pytest.raises(UserError, match=r"trainer\.num_nodes = 1"):
            find_meeting(config(1), endpoint, node_rank, {})


@pytest.mark.parametrize(
    ("nodes", "first"),
    [
        ("gpu3", "gpu3"),
        ("gpu3,gpu4", "gpu3"),
        ("gpu[03-05,9],login", "gpu03"),
        ("gpu[7,9-11]", "gpu7"),
        ("rack[2-3]node[10,12]-ib,other", "rack2node10-ib"),
    ],
)
def test_first_host_of_a_slurm_list(nodes: str, first: str) -> None:
    assert first_host(nodes) == first


def test_torchrun_is_told_where_and_who_and_never_to_restart() -> None:
    alone = torchrun_arguments(config(1), "c.yaml", ["a.b=1"])
    assert alone[0] == "--standalone" and "--max-restarts=0" in alone
    assert read_back(alone) == (None, 1, 0.0)
    meeting = Meeting("head", 1234, 1)
    arguments = torchrun_arguments(config(), "c.yaml", ["a.b=1"], meeting)
    assert "--standalone" not in arguments and "--max-restarts=0" in arguments and "--nproc-per-node=2" in arguments
    assert arguments[-4:] == ["megatron_rl.train", "--config", "c.yaml", "a.b=1"]
    assert read_back(arguments) == (meeting, 2, 120.0)


def test_the_command_refuses_before_torch_is_imported() -> None:
    code = (
        "import sys\nfrom megatron_rl.commands.cli import app\nfrom megatron_rl.commands.verbs import run_verb\n"
        f"sys.argv = ['megatron-rl', 'train', {str(TINY)!r}, 'policy.model_path=m', 'trainer.num_nodes=2']\n"
        "status = run_verb(app)\nassert 'torch' not in sys.modules\nsys.exit(status)\n"
    )
    names = ("MASTER_ADDR", "NODE_RANK", "SLURM_JOB_NODELIST", "SLURM_STEP_NODELIST", "SLURM_NODEID")
    without = [word for name in names for word in ("-u", name)]
    run = subprocess.run(["env", *without, sys.executable, "-c", code], capture_output=True, text=True)
    assert run.returncode == 2, run.stderr
    assert run.stderr.startswith("error: trainer.num_nodes = 2: ") and run.stderr.count("\n") == 1


def test_the_ranks_whose_config_differs_are_named() -> None:
    first = {"trainer": {"max_steps": 4, "seed": 1}, "policy": {"megatron_cfg": {}}}
    other = {"trainer": {"max_steps": 6, "seed": 1}, "policy": {"megatron_cfg": {"add_bias_linear": True}}}
    text = str(difference([first, first, other, other]))
    assert text.startswith("policy.megatron_cfg.add_bias_linear: rank 0 has None, rank 2, 3 True,")
    assert "(also different: trainer.max_steps)" in text
    text = str(difference([first, other | {"policy": first["policy"]}, first]))
    assert text.startswith("trainer.max_steps: rank 0 has 4, rank 1 6, and all nodes") and "Fix: " in text

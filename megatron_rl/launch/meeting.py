"""The meeting point of a run's nodes, and this node's rank: from options, else variables, else Slurm."""

from __future__ import annotations

import argparse
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from megatron_rl.config import Config
from megatron_rl.errors import UserError

DEFAULT_PORT = 29500
"""Default port of torchrun."""


@dataclass(frozen=True)
class Meeting:
    """The meeting point of a run's nodes, and this node's rank."""

    host: str
    """Name or address of node 0, as the others reach it."""
    port: int
    node_rank: int


def find_meeting(
    config: Config, endpoint: str | None, node_rank: int | None, environment: Mapping[str, str]
) -> Meeting | None:
    """Find the meeting point and this node's rank: options first, then MASTER_ADDR, MASTER_PORT, NODE_RANK, then Slurm.

    Args:
        config: ``trainer.num_nodes`` is the number of nodes; a single node needs no meeting.
        endpoint: the value of ``--rdzv-endpoint``, ``HOST:PORT`` or ``HOST``.
        node_rank: the value of ``--node-rank``.
        environment: usually ``os.environ``.

    Raises:
        UserError: several nodes and no meeting point or rank, or options that the number of nodes contradicts.
    """
    num_nodes = config.trainer.num_nodes
    if num_nodes == 1:
        if (
            endpoint is not None or node_rank is not None
        ):  # otherwise a forgotten num_nodes starts one whole run on each node
            raise UserError(
                "trainer.num_nodes",
                1,
                "must be above 1 where --rdzv-endpoint or --node-rank is given",
                "set trainer.num_nodes, or leave the options out",
            )
        return None
    host, port = _meeting_point(num_nodes, endpoint, environment)
    return Meeting(host, port, _node_rank(num_nodes, node_rank, environment))


def _meeting_point(num_nodes: int, endpoint: str | None, environment: Mapping[str, str]) -> tuple[str, int]:
    name, host, port = "MASTER_PORT", environment.get("MASTER_ADDR"), environment.get("MASTER_PORT")
    if endpoint is not None:
        name, (host, colon, port) = "--rdzv-endpoint", endpoint.rpartition(":")
        if not colon:
            host, port = endpoint, None
    nodes = environment.get("SLURM_STEP_NODELIST") or environment.get("SLURM_JOB_NODELIST")
    if not host and nodes:
        host = first_host(nodes)
        port = port or str(20000 + int(environment.get("SLURM_JOB_ID", 0)) % 10000)  # two jobs may share a node
    if not host:
        raise UserError(
            "trainer.num_nodes",
            num_nodes,
            "several nodes need a place to meet, and neither --rdzv-endpoint nor MASTER_ADDR nor a Slurm job names one",
            "give --rdzv-endpoint HOST:PORT on every node, HOST being that of node 0",
        )
    if port and not (port.isdecimal() and 0 < int(port) < 2**16):
        raise UserError(name, endpoint or port, "the port must be a number from 1 to 65535", "correct it")
    return host.strip("[]"), int(port or DEFAULT_PORT)


def _node_rank(num_nodes: int, given: int | None, environment: Mapping[str, str]) -> int:
    values = {"--node-rank": given} | {name: environment.get(name) for name in ("NODE_RANK", "SLURM_NODEID")}
    name, value = next(((name, value) for name, value in values.items() if value is not None), ("", None))
    if value is None:
        raise UserError(
            "trainer.num_nodes",
            num_nodes,
            "every node needs its rank, and neither --node-rank nor NODE_RANK nor a Slurm job gives this one's",
            f"give --node-rank N, from 0 (which has the console) to {num_nodes - 1}",
        )
    if not str(value).isdecimal() or int(value) >= num_nodes:
        rule = f"must be a number from 0 to trainer.num_nodes - 1 = {num_nodes - 1}"
        raise UserError(name, value, rule, "give every node its own rank, or correct trainer.num_nodes")
    return int(value)


def first_host(nodes: str) -> str:
    """Return the first name of a Slurm node list: ``gpu[03-05,9],login`` gives ``gpu03``.

    ``scontrol`` would know, but may be missing in a container.
    """
    first = re.split(r",(?![^\[]*\])", nodes)[0]
    return re.sub(r"\[([^\],-]+)[^\]]*\]", r"\1", first)


def read_back(arguments: Sequence[str]) -> tuple[Meeting | None, int, float]:
    """Return the meeting, number of nodes and time limit that ``torchrun_arguments`` put into torchrun's arguments."""
    parser = argparse.ArgumentParser(allow_abbrev=False, add_help=False)
    parser.add_argument("--nnodes", type=int, default=1)
    parser.add_argument("--node-rank", type=int, default=0)
    parser.add_argument("--master-addr")
    parser.add_argument("--master-port", type=int, default=DEFAULT_PORT)
    parser.add_argument("--rdzv-conf", default="")
    end = arguments.index("-m") if "-m" in arguments else len(arguments)
    known, _ = parser.parse_known_args(arguments[:end])
    if known.master_addr is None or known.nnodes == 1:
        return None, 1, 0.0
    timeout_s = float(known.rdzv_conf.removeprefix("timeout=") or 600)
    return Meeting(known.master_addr, known.master_port, known.node_rank), known.nnodes, timeout_s

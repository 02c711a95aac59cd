"""A check at the start that GPUs reach each other: those of a node, then each node and the next.

gloo's connections, over which ranks meet, say nothing of NCCL's: it chooses interfaces by itself, and needs shared memory
between the ranks of a node. What it lacks would otherwise show in the first update, as a hang.
"""

from __future__ import annotations

import socket
import threading
from datetime import timedelta
from itertools import pairwise

import torch
import torch.distributed as dist

from megatron_rl.errors import described
from megatron_rl.parallel.agree import gather_json, raise_first

LIMIT_S = 120.0
"""Most seconds for one exchange; an NCCL communicator of a few ranks takes one or two."""
SILENCE = "no answer"


def limit_below(*others_s: float | None) -> float:
    """Return the limit of an exchange that ends before others do (None: never), after which nobody could say why."""
    return min(LIMIT_S, *(other_s * 2 / 3 for other_s in others_s if other_s is not None))


def check_ranks_reach_each_other(
    *, num_nodes: int, devices: int, device: torch.device, limit_s: float = LIMIT_S, backend: str = "nccl"
) -> None:
    """Let ranks exchange a number: all ranks of a node, then the first ranks of each node and the next. Collective.

    Args:
        num_nodes, devices: of the run; ranks are numbered node by node.
        device: of this rank.
        limit_s: for each of at most three exchanges.
        backend: what carries it.

    Raises:
        UserError: on all ranks, which machines do not reach each other.
    """
    firsts = [node * devices for node in range(num_nodes)]
    neighbours = [list(pair) for pair in pairwise(firsts)]
    nodes = [list(range(first, first + devices)) for first in firsts]
    for groups in (nodes if devices > 1 else [], neighbours[::2], neighbours[1::2]):
        mine: tuple[list[int], dist.ProcessGroup] | None = None
        for ranks in groups:
            group = dist.new_group(ranks, timeout=timedelta(seconds=2 * limit_s), backend=backend)
            if dist.get_rank() in ranks:
                mine = ranks, group
        problem = None if mine is None else _problem(mine[1], device, limit_s)
        assert dist.group.WORLD is not None
        found = gather_json([problem, socket.gethostname()], dist.group.WORLD)
        hosts = [host for _, host in found]
        # A rank's own error says more than that others wait for it.
        by_worth = sorted(enumerate(found), key=lambda each: str(each[1][0]).startswith(SILENCE))
        raise_first([_error(groups, rank, hosts, problem) for rank, (problem, _) in by_worth])
        if mine is not None:
            dist.destroy_process_group(mine[1])


def _problem(group: dist.ProcessGroup, device: torch.device, limit_s: float) -> str | None:
    """Return why the ranks of a group did not exchange a number, or None. A thread does it: NCCL's waiting has no end."""
    outcome: list[str | None] = []

    def exchange() -> None:
        try:
            _exchange(group, device)
            outcome.append(None)
        except Exception as error:
            outcome.append(described(error))

    thread = threading.Thread(target=exchange, name="reach", daemon=True)
    thread.start()
    thread.join(limit_s)
    return outcome[0] if outcome else f"{SILENCE} within {limit_s:g} s"


def _exchange(group: dist.ProcessGroup, device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.set_device(device)  # a thread has a device of its own
    total = torch.ones(1, device=device)
    dist.all_reduce(total, group=group)
    assert total.item() == group.size()


def _error(groups: list[list[int]], rank: int, hosts: list[str], problem: str | None) -> list[str | None] | None:
    """Return the parts of the ``UserError`` for what a rank found, as ``error_to_json`` gives them."""
    if problem is None:
        return None
    ranks = next(ranks for ranks in groups if rank in ranks)
    there = list(dict.fromkeys(hosts[rank] for rank in ranks))
    if len(there) == 1:
        rule = f"does not connect the GPUs of {there[0]}: {problem}"
        fix = "give a container more shared memory (--ipc=host, or --shm-size=16g)"
    else:
        rule = f"does not connect {there[0]} (rank {ranks[0]}) and {there[1]} (rank {ranks[1]}): {problem}"
        fix = "name the interface between the nodes (NCCL_SOCKET_IFNAME), open its ports in their firewalls, and set "
        fix += "NCCL_IB_DISABLE=1 where InfiniBand is not set up"
    return ["NCCL", None, rule, f"{fix}; NCCL_DEBUG=INFO shows what it tries"]

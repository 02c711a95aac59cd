"""From a checked config to running ranks: the torchrun command, and the small process that runs it on each node.

``python -m megatron_rl.launch <torchrun arguments>`` is torchrun itself, less its traceback when a rank fails: the rank has
already said why. With several nodes, every node runs one; they meet at node 0, and watch each other while they run:

    node 0                                  node 1, 2, ...
    holds the store at HOST:PORT            connect to it, and wait for it to appear
    ranks 0 .. devices-1; the console       the next ranks; their logs
    judges all other nodes                  judge node 0

A node is given up when it gives no sign of life for ``LOST_S``, whatever its ranks or ours are doing at the time: a
collective over NCCL, or a rollout of minutes, would notice a dead node late or never.
"""

from __future__ import annotations

import argparse
import os
import re
import shlex
import signal
import socket
import sys
import threading
import time
from collections.abc import Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass
from datetime import timedelta
from typing import TYPE_CHECKING

from megatron_rl.config import Config
from megatron_rl.errors import UserError
from megatron_rl.lifetime import PARENT_VARIABLE
from megatron_rl.watchdog import HANG

if TYPE_CHECKING:
    from torch.distributed.elastic.multiprocessing.errors import ProcessFailure

ALLOCATOR = {
    # glibc returns large blocks to the kernel at once, and touching them anew can be slow. What keeping them is worth
    # depends on the machine: benchmarks/results/cpu_step.md.
    "MALLOC_MMAP_THRESHOLD_": "4294967296",
    "MALLOC_TRIM_THRESHOLD_": "4294967296",
    "MALLOC_TOP_PAD_": "67108864",
}

DEFAULT_PORT = 29500
"""torchrun's own."""
BEAT_S = 1.0
"""Between two signs of life of a node."""
LOST_S = 20.0
"""Silence after which a node counts as dead. Far above a slow file system or a busy machine, which would be false alarms."""
GRACE_S = 5.0
"""For our own ranks to end, once another node has: mostly they fail too, and say more about it."""

# ---------------------------------------------------------------------------------------------------- the command


@dataclass(frozen=True)
class Meeting:
    """Where the nodes of a run meet, and which of them this is."""

    host: str
    """Of node 0, as the others reach it."""
    port: int
    node_rank: int


def find_meeting(
    config: Config, endpoint: str | None, node_rank: int | None, environment: Mapping[str, str]
) -> Meeting | None:
    """The meeting point and this node's rank: options first, then MASTER_ADDR, MASTER_PORT, NODE_RANK, then Slurm.

    Args:
        config: ``trainer.num_nodes`` is the number of nodes; with one there is nobody to meet.
        endpoint: ``HOST:PORT`` or ``HOST`` of ``--rdzv-endpoint``.
        node_rank: of ``--node-rank``.
        environment: usually ``os.environ``.

    Raises:
        UserError: several nodes and no meeting point or rank, or options that the number of nodes contradicts.
    """
    num_nodes = config.trainer.num_nodes
    if num_nodes == 1:
        if endpoint is not None or node_rank is not None:  # else a forgotten num_nodes starts one whole run a node
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
    """The first name of a Slurm node list: ``gpu[03-05,9],login`` is ``gpu03``. ``scontrol`` may be missing in a container."""
    first = re.split(r",(?![^\[]*\])", nodes)[0]
    return re.sub(r"\[([^\],-]+)[^\]]*\]", r"\1", first)


def torchrun_arguments(
    config: Config, config_path: str, overrides: Sequence[str], meeting: Meeting | None = None
) -> list[str]:
    """Arguments of torchrun for this node.

    The meeting is static, not torchrun's elastic one: the node ranks that the user gives then decide the ranks, so that
    rank 0, with console, metrics and server addresses, is where the user put it. Nothing is restarted: a run goes on when
    the same command is given again.
    """
    trainer = config.trainer
    nodes = ["--standalone"]
    if meeting is not None:
        nodes = [
            f"--nnodes={trainer.num_nodes}",
            f"--node-rank={meeting.node_rank}",
            f"--master-addr={meeting.host}",
            f"--master-port={meeting.port}",
            f"--rdzv-conf=timeout={max(1, int(trainer.timeout_s))}",
        ]
    return [
        *nodes,
        "--max-restarts=0",
        f"--nproc-per-node={trainer.devices}",
        "-m",
        "megatron_rl.train",
        "--config",
        config_path,
        *overrides,
    ]


def start(config: Config, config_path: str, overrides: Sequence[str], meeting: Meeting | None = None) -> None:
    """Print the torchrun command and become it. Does not return.

    Nodes other than 0 print where their ranks' logs are instead.
    """
    arguments = torchrun_arguments(config, config_path, overrides, meeting)
    if meeting is None or meeting.node_rank == 0:
        print(f"$ torchrun {shlex.join(arguments)}", flush=True)
    else:
        first = meeting.node_rank * config.trainer.devices
        ranks = f"rank_N.log, N from {first} to {first + config.trainer.devices - 1}"
        logs = config.exp_manager.run_dir / "logs"
        print(f"node {meeting.node_rank} of {config.trainer.num_nodes}: logs in {logs}/{ranks}", flush=True)
    threads = config.trainer.threads_per_rank or max(1, len(os.sched_getaffinity(0)) // config.trainer.devices)
    environment = {"OMP_NUM_THREADS": str(threads), "TOKENIZERS_PARALLELISM": "false", **ALLOCATOR, **os.environ}
    command = [sys.executable, "-m", "megatron_rl.launch", *arguments]
    os.execve(sys.executable, command, environment)


# ---------------------------------------------------------------------------------------------------- the launcher


class NodeWatch:
    """The launchers of a run's nodes, each giving signs of life in the store of node 0, and its status when it ends.

    Two threads, because a store on a machine that has vanished does not answer, nor refuse: one talks to it and may get
    stuck, the other judges by the time of the last news.
    """

    def __init__(self, meeting: Meeting, num_nodes: int, timeout_s: float) -> None:
        """Args: where the store is; how many nodes; how long it may take to appear."""
        self._meeting, self._timeout_s = meeting, timeout_s
        # Everyone judging everyone would grow with the square of the nodes; by way of node 0 all learn the same.
        watched = range(1, num_nodes) if meeting.node_rank == 0 else [0]
        self._num_beats = dict.fromkeys(watched, 0)
        self._heard_at: dict[int, float] = {}
        """Since a node's first sign: until then, torchrun's own time limit counts."""
        self._ended_with: dict[int, int] = {}
        self._status: int | None = None
        self._has_left = threading.Event()
        self._is_over = False
        self.verdict: str | None = None
        """Why this node has to end, once it has to."""
        for work in (self._talk, self._judge):
            threading.Thread(target=work, daemon=True).start()

    def leave(self, status: int) -> None:
        """Tell the others how this node ends; node 0 stays until they can have heard, as the store ends with it."""
        self._is_over, self._status = True, status
        if self._heard_at:
            self._has_left.wait(2 * BEAT_S)
            if self._meeting.node_rank == 0:
                time.sleep(2 * BEAT_S)

    def first_lost(self) -> str | None:
        """Wait until every other node has ended by itself or is known to be lost; the first of the lost, as a sentence.

        For after a failure here that a node's death may have caused.
        """
        while pending := [node for node in self._heard_at if node not in self._ended_with]:
            for node in pending:
                if self._silence_s(node) > LOST_S:
                    return self._lost(node)
            time.sleep(BEAT_S / 4)
        return None

    def _silence_s(self, node: int) -> float:
        return time.monotonic() - self._heard_at[node]

    def _lost(self, node: int) -> str:
        return f"node {node} is lost: no sign of life for {LOST_S:.0f} s"

    def _talk(self) -> None:
        from torch.distributed import PrefixStore, TCPStore

        me = self._meeting.node_rank
        with suppress(Exception):  # a store that is gone; what follows from that is for _judge to say
            store = PrefixStore(
                "launchers",
                TCPStore(
                    self._meeting.host,
                    self._meeting.port,
                    is_master=False,
                    wait_for_workers=False,
                    timeout=timedelta(seconds=self._timeout_s),
                ),
            )
            while True:
                store.add(f"beats of {me}", 1)
                if self._status is not None and not self._has_left.is_set():
                    store.set(f"status of {me}", str(self._status))
                    self._has_left.set()
                for node, beats in self._num_beats.items():
                    self._num_beats[node] = store.add(f"beats of {node}", 0)
                    if self._num_beats[node] > beats:
                        self._heard_at[node] = time.monotonic()
                    if store.check([f"status of {node}"]):
                        self._ended_with[node] = int(store.get(f"status of {node}"))
                time.sleep(BEAT_S)

    def _judge(self) -> None:
        while True:
            time.sleep(BEAT_S / 4)
            ended = next(((node, status) for node, status in self._ended_with.items() if status != 0), None)
            lost = next((node for node in list(self._heard_at) if self._silence_s(node) > LOST_S), None)
            if self._is_over:
                return
            if ended is not None:
                time.sleep(GRACE_S)
                how = "with an error that its console shows" if ended[1] == 2 else f"with status {ended[1]}"
                self._end(f"node {ended[0]} ended {how}")
            elif lost is not None and lost not in self._ended_with:
                self._end(self._lost(lost))

    def _end(self, verdict: str) -> None:
        """End this launcher as a signal from outside would: torchrun then ends the ranks."""
        if self._is_over:
            return
        self.verdict = verdict
        os.kill(os.getpid(), signal.SIGTERM)
        time.sleep(2 * GRACE_S)
        if not self._is_over:  # the main thread is not in a place where it notices; ranks die with this process
            print(f"error: {verdict}", file=sys.stderr, flush=True)
            os._exit(1)


def main() -> int:
    """torchrun, with one line instead of a traceback when ranks fail or nodes do not meet."""
    os.environ[PARENT_VARIABLE] = str(os.getpid())  # ranks end with us from their first second on
    meeting, num_nodes, timeout_s = _meeting_of(sys.argv[1:])
    watch = None
    if meeting is not None:
        _import_torch_quietly()
        watch = NodeWatch(meeting, num_nodes, timeout_s)
    status, message = _run_torchrun(watch)
    if message:
        print(f"error: {message}", file=sys.stderr, flush=True)
    if watch is not None:
        watch.leave(status)
        if status not in (0, 2) and watch.verdict is None and (lost := watch.first_lost()):
            print(f"error: {lost}", file=sys.stderr, flush=True)
    return status


def _import_torch_quietly() -> None:
    """A store that ends with its node is nothing that torch's C++ side need report, with its stack, from the launchers.

    It reads its level when it is loaded; ranks keep theirs.
    """
    name = "TORCH_CPP_LOG_LEVEL"
    before = os.environ.get(name)
    os.environ[name] = before or "ERROR"
    import torch  # noqa: F401

    if before is None:
        del os.environ[name]


def _run_torchrun(watch: NodeWatch | None) -> tuple[int, str | None]:
    """Exit status, and what there is to say about it."""
    import logging

    from torch.distributed import DistError
    from torch.distributed.elastic.multiprocessing.api import SignalException
    from torch.distributed.elastic.multiprocessing.errors import ChildFailedError
    from torch.distributed.elastic.rendezvous.api import RendezvousError
    from torch.distributed.run import main as torchrun

    logging.getLogger("torch.distributed.elastic").setLevel(logging.CRITICAL)
    # These have levels of their own. The first complains that torchrun has no parent to hand our message on to, the second
    # repeats the signal that we report.
    for name in ("multiprocessing.errors.error_handler", "agent.server.api"):
        logging.getLogger(f"torch.distributed.elastic.{name}").setLevel(logging.CRITICAL)
    try:
        torchrun(sys.argv[1:])
    except ChildFailedError as error:
        rank, failure = min(error.failures.items(), key=lambda item: _distance_from_cause(item[1]))
        status = failure.exitcode if failure.exitcode > 0 else 1
        if status == 2:  # a UserError, which the first rank of each node has printed, unless it was another's alone
            has_spoken = any(each.exitcode == 2 and each.local_rank == 0 for each in error.failures.values())
            return status, None if has_spoken else f"rank {rank} stopped: see logs/rank_{rank}.log in the run's folder"
        return status, _describe(rank, failure)
    except SignalException as error:
        if watch is not None and watch.verdict is not None:
            return 1, watch.verdict
        return 128 + error.sigval, f"ended by {signal.Signals(error.sigval).name}"
    except (DistError, RendezvousError) as error:
        reason = str(error).splitlines()[0]
        fix = "start all nodes within trainer.timeout_s, with a free port of node 0 in --rdzv-endpoint"
        return 1, f"the nodes did not meet, says {socket.gethostname()}: {reason.rstrip('.')}. Fix: {fix}."
    return 0, None


def _distance_from_cause(failure: ProcessFailure) -> tuple[int, float]:
    """Smallest for the failure that the others follow from, of those that torchrun saw in one look.

    A hang is told by whoever noticed it. Who dies by a signal does not die of another's end, unless torchrun sent it: that
    is SIGTERM. Who raised has left the time.
    """
    if failure.message.startswith(HANG):
        return 0, 0.0
    if failure.exitcode < 0:
        return (3 if failure.exitcode == -signal.SIGTERM else 1), 0.0
    return 2, failure.error_file_data.get("timestamp", failure.timestamp)


def _describe(rank: int, failure: ProcessFailure) -> str:
    if "timestamp" in failure.error_file_data:  # written by the watchdog or the rank itself
        text = failure.message
        return text if text.startswith(HANG) else f"{text}\n  traceback: logs/ in the run's folder (rank 0: above)"
    how = f"signal {failure.signal_name()}" if failure.exitcode < 0 else f"status {failure.exitcode}"
    return f"rank {rank} ended with {how}; see logs/ in the run's folder"


def _meeting_of(arguments: Sequence[str]) -> tuple[Meeting | None, int, float]:
    """Read back from torchrun's arguments what ``torchrun_arguments`` put there."""
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


if __name__ == "__main__":
    sys.exit(main())

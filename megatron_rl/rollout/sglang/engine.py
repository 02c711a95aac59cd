"""Engine ``sglang``: every rank calls, rank 0 drives the servers, every rank gets the result.

rank 0        requests -> Dispatch (event loop) -> completions --broadcast--> all ranks
other ranks   meet rank 0 once a second, so that an error reaches them soon, and so that all ranks can deliver the
              current weights to a server that came back without them
first rank of each node   Supervisor (thread): starts, watches and restarts the servers of the node

Servers on the trainer's GPUs start only while the trainer has released its memory: between ``resume_memory`` and
``release_memory``. Others start at once.
"""

from __future__ import annotations

import os
import secrets
import tempfile
from collections.abc import Mapping, Sequence
from concurrent.futures import Future
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist

from megatron_rl.config import Config
from megatron_rl.errors import UserError, described
from megatron_rl.metrics import progress
from megatron_rl.parallel.agree import all_ranks_agree, broadcast_json, error_to_json, gather_json, raise_first
from megatron_rl.process import activity
from megatron_rl.process.child import ChildProcess
from megatron_rl.process.network import HeldPort, free_port, own_address
from megatron_rl.rollout.engine import ServedModel, WeightSource
from megatron_rl.rollout.growth import Branch, Expand, Key, from_list, in_order
from megatron_rl.rollout.sglang.driver import Driver, together
from megatron_rl.rollout.sglang.flags import ServerPart, server_command, server_environment
from megatron_rl.rollout.sglang.port import SGLangPort
from megatron_rl.rollout.sglang.supervisor import Managed, Supervisor
from megatron_rl.rollout.share import broadcast_completions
from megatron_rl.types import Completion, Request


class SGLangEngine:
    """Rollouts from SGLang servers: our own, or given by URL. A ``RolloutEngine``."""

    def __init__(
        self, config: Config, model: ServedModel, *, device: torch.device, cpu_group: dist.ProcessGroup
    ) -> None:
        """Start the servers, colocated ones at the first ``resume_memory``, and return at once.

        The first ``update_weights`` waits for them.

        Args:
            config: of the run.
            model: what to serve.
            device: of this rank; servers run on the same kind.
            cpu_group: all ranks, over gloo.

        Raises:
            UserError: on all ranks; a port is taken.
        """
        self.weight_version = -1
        self._config, self._model, self._group = config, model, cpu_group
        self._rank, self._is_first = dist.get_rank(cpu_group), dist.get_rank(cpu_group) == 0
        self._is_cpu = device.type == "cpu"
        self._source: WeightSource | None = None
        self._supervisor: Supervisor | None = None
        self._ports: list[HeldPort] = []
        self._driver: Driver | None = None
        self._key: str | None
        urls, logs = config.rollout.servers.urls, []
        if urls is not None:
            with all_ranks_agree(cpu_group):
                self._key = _read_key(config.rollout.servers.key_file)
        else:
            self._key = str(broadcast_json(secrets.token_hex(32), cpu_group))
            mine, error = self._start_servers()
            by_rank = gather_json([mine, error], cpu_group)
            raise_first([error for _, error in by_rank])
            urls = [url for servers, _ in by_rank for url, _ in servers]
            logs = [log for servers, _ in by_rank for _, log in servers]
        if self._is_first:
            self._driver = Driver(config, model, urls, logs, key=self._key)
            self._driver.fleet.may_start = not config.rollout.is_colocated

    # ------------------------------------------------------------------------------------------------ RolloutEngine

    def generate(
        self, requests: Sequence[Request], *, group_size: int = 1, num_groups: int | None = None
    ) -> list[Completion | None]:
        """Complete requests on the servers. Sampling is SGLang's own: request seeds have no effect.

        Raises:
            UserError: on all ranks; no server can be had, or a request failed too often.
        """
        assert self._source is not None, "generate before the first update_weights"
        future: Future[list[Completion | None]] | None = None
        if self._driver is not None:
            wanted = len(requests) // group_size if num_groups is None else num_groups
            work = self._driver.dispatch.run(requests, group_size=group_size, num_groups=wanted)
            future = self._driver.loop.submit(work)
        self._wait(future, len(requests))
        results = future.result() if future is not None else None
        whole = None if results is None else [index for index, result in enumerate(results) if result is not None]
        indices = broadcast_json(whole, self._group)
        mine = None if results is None else [result for result in results if result is not None]
        completions: list[Completion | None] = [None] * len(requests)
        for index, completion in zip(indices, broadcast_completions(mine, self._group)):
            completions[index] = completion
        return completions

    def grow(self, seeds: Sequence[Branch], expand: Expand) -> dict[Key, Completion]:
        """Complete branches and their descendants. Only rank 0 expands while servers work; other ranks repeat it afterwards.

        Raises:
            UserError: as ``generate``.
        """
        assert self._source is not None, "grow before the first update_weights"
        future = None
        if self._driver is not None:
            future = self._driver.loop.submit(self._driver.dispatch.grow(seeds, expand))
        self._wait(future, None)
        mine = None
        if future is not None:
            grown = future.result()
            mine = [grown[key] for key in in_order(seeds, expand, lambda branch: grown[branch.key])]
        return from_list(seeds, expand, broadcast_completions(mine, self._group))

    def _wait(self, future: Future[Any] | None, total: int | None) -> None:
        """Meet the other ranks until the servers are done."""
        with progress(total, "generation") as bar:
            while self._meet(future) != "done":
                if self._driver is not None:
                    bar.advance_to(self._driver.dispatch.num_done)
                    activity.note(self._driver.fleet.describe())
        activity.note("")

    def update_weights(self, source: WeightSource, version: int) -> None:
        """Withdraw all servers from service, and return once servers with the new weights serve.

        Raises:
            UserError: on all ranks; no server answers in time, one refuses the weights, or has others than were sent.
        """
        self._source, self.weight_version = source, version
        if self._driver is not None:
            self._driver.loop.run(self._driver.fleet.withdraw(version))
        with progress(None, "waiting for servers"):
            while self._meet(None) != "serving":
                activity.beat()  # servers have deadlines of their own

    def release_memory(self) -> None:
        """Release the memory of colocated servers, which start no more until ``resume_memory``; separate ones keep theirs.

        A server that is starting is waited for, because only one that answers can be asked for its memory.

        Raises:
            UserError: on all ranks; a server does not start, or refuses.
        """
        if self._config.rollout.servers.placement != "colocated":
            return
        if self._supervisor is not None:
            self._supervisor.hold_starts()
        self._wait_for_starting()
        if self._supervisor is not None:
            self._supervisor.set_busy(True)  # until new weights are in
        dist.barrier(self._group)
        together(self._driver, lambda driver: driver.fleet.release_memory(), self._group, what="release of memory")

    def _wait_for_starting(self) -> None:
        """Wait until every server with a process answers. The supervisor ends those that never will."""
        with progress(None, "waiting for servers that start"):
            while True:
                mine = self._supervisor
                self._start_parts_together()
                by_rank = gather_json(
                    [error_to_json(mine.failure), mine.running(), mine.has_halves()] if mine else [None, {}, False],
                    self._group,
                )
                raise_first([error for error, *_ in by_rank])
                running = {url: is_up for _, servers, _ in by_rank for url, is_up in servers.items()}
                has_halves = any(halves for *_, halves in by_rank)
                verdict = self._driver.wait_for_answers(running) if self._driver is not None else None
                is_done, error = broadcast_json(verdict, self._group)
                raise_first([error])
                if is_done and all(running.values()) and not has_halves:
                    return
                activity.beat()

    def resume_memory(self) -> None:
        """Give colocated servers their memory back, and let those start that are down.

        The trainer has released its own on every rank by then: a server takes what is free.
        """
        if self._config.rollout.servers.placement != "colocated":
            return
        self._start_parts_together()  # behind the gate, what has lost a part ends, and all parts start at once
        dist.barrier(self._group)
        if self._supervisor is not None:
            self._supervisor.allow_starts()
        together(self._driver, lambda driver: driver.fleet.resume_memory(), self._group, what="resumption of memory")

    def metrics(self) -> dict[str, float]:
        """Return counts of mended failures since the last call, and the share of prompt tokens from prefix caches."""
        restarts = sum(gather_json(self._supervisor.take_restarts() if self._supervisor else 0, self._group))
        counts = broadcast_json(self._driver.take_counts() if self._driver else None, self._group)
        mended = {f"rollout/{name}": float(count) for name, count in {**counts, "server_restarts": restarts}.items()}
        share = broadcast_json(self._driver.take_cached_share() if self._driver else None, self._group)
        if share is not None:
            mended["rollout/cached_prompt_frac"] = share
        return mended

    def close(self) -> None:
        """Stop the servers that we started. Safe to call twice, and by one rank alone."""
        if self._driver is not None:
            self._driver.close()
        if self._supervisor is not None:
            self._supervisor.close()
        for port in self._ports:
            port.close()

    # ------------------------------------------------------------------------------------------------ the meeting

    def _meet(self, future: Future[Any] | None) -> str:
        """Hold one meeting of all ranks: an error is raised on all of them, stale servers get weights.

        Returns:
            ``done`` (the future is done), ``serving`` (no future, and servers serve) or ``wait``.
        """
        verdict: dict[str, Any] = {}
        self._start_parts_together()
        if self._driver is not None:
            verdict = self._driver.verdict(future)
        failure = self._supervisor.failure if self._supervisor else None
        reports = gather_json([error_to_json(failure), verdict], self._group)
        raise_first([report[0] for report in reports])
        verdict = reports[0][1]
        raise_first([verdict["error"]])
        if verdict["stale"]:
            self._deliver(verdict["stale"])
            return "wait"
        return str(verdict["state"])

    def _deliver(self, targets: Sequence[int]) -> None:
        """Bring the current weights to servers that came up without them."""
        assert self._source is not None
        port = SGLangPort(targets, driver=self._driver, supervisor=self._supervisor, cpu_group=self._group)
        self._source.deliver(port, self.weight_version)

    def _start_parts_together(self) -> None:
        """Let the parts of a server over several nodes follow the one that was started most often."""
        if self._config.rollout.servers.nodes_per_server > 1 and self._config.rollout.starts_servers:
            counts: dict[str, int] = {}
            mine = self._supervisor
            by_rank = gather_json([mine.starts(), mine.down()] if mine else [{}, []], self._group)
            for starts, _ in by_rank:
                counts |= {name: max(count, counts.get(name, 0)) for name, count in starts.items()}
            if mine is not None:
                mine.follow(counts, {name for _, down in by_rank for name in down})

    # ------------------------------------------------------------------------------------------------ starting

    def _start_servers(self) -> tuple[list[tuple[str, str]], list[str] | None]:
        """Start a node's servers on its first rank: (url and log of each server, error). Other ranks start none."""
        config, servers = self._config, self._config.rollout.servers
        node, local_rank = divmod(self._rank, config.trainer.devices)
        host = own_address(config.trainer.num_nodes)
        part = self._part(node, host)
        if local_rank != 0:
            return [], None
        managed = []
        for index in range(servers.num_per_node):
            wanted = 0 if servers.base_port is None else servers.base_port + index
            try:
                port = self._hold_port(host, wanted)
            except OSError:
                error = UserError(
                    "rollout.servers.base_port",
                    servers.base_port,
                    f"something listens on {host}:{wanted} already",
                    "end it, choose another port, or leave the field null to take free ones",
                )
                return [], error_to_json(error)
            number = node // servers.nodes_per_server * servers.num_per_node + index
            managed.append(self._managed(number, index, host, port, part))
        is_colocated = config.rollout.is_colocated
        self._supervisor = Supervisor(managed, servers, key=str(self._key), may_start=not is_colocated)
        return [(server.url, str(server.log)) for server in managed if server.is_answering], None

    def _part(self, node: int, host: str) -> ServerPart | None:
        """Return this node's part of a server over several nodes; None where a server has one. Collective."""
        size, devices = self._config.rollout.servers.nodes_per_server, self._config.trainer.devices
        if size == 1:
            return None
        index = node % size
        meeting = f"{host}:{free_port(host)}" if index == 0 and self._rank == node * devices else None
        return ServerPart(index, size, gather_json(meeting, self._group)[(node - index) * devices])

    def _managed(self, number: int, index: int, host: str, port: int, part: ServerPart | None) -> Managed:
        config, servers = self._config, self._config.rollout.servers
        first_gpu = config.trainer.devices if servers.placement == "separate" else 0
        key = str(self._key)
        index_of_part = 0 if part is None else part.index
        suffix = f"_part_{index_of_part}" if index_of_part else ""
        log = config.exp_manager.run_dir / "logs" / f"server_{number}{suffix}.log"

        def start(variables: Mapping[str, str]) -> ChildProcess:
            command = server_command(
                config.rollout.sglang_cfg,
                model_path=str(self._model.path),
                dtype=self._model.dtype,
                records_experts=self._model.records_experts,
                overrides=self._model.overrides,
                is_cpu=self._is_cpu,
                host=host,
                port=port,
                base_gpu_id=first_gpu + index * config.rollout.gpus_per_server,
                releases_memory=servers.placement == "colocated",
                seed=config.trainer.seed + number,
                part=part,
            )
            environment = server_environment(
                key=key,
                port=port,
                meeting=Path(tempfile.mkdtemp(prefix="megatron_rl_meeting_")) / "store",
                is_cpu=self._is_cpu,
                tensor_parallel_size=int(config.rollout.sglang_cfg.get("tp_size", 1)),
                num_servers=servers.num_per_node,
                num_cores=len(os.sched_getaffinity(0)),
                part=part,
            )
            return ChildProcess(command, log=log, environment=environment | dict(variables))

        return Managed(f"server {number}", f"http://{host}:{port}", log, start, is_answering=not index_of_part)

    def _hold_port(self, host: str, number: int = 0) -> int:
        self._ports.append(HeldPort(host, number))
        return self._ports[-1].number


def _read_key(path: str | None) -> str | None:
    """Return the key in a file; None without a file."""
    if path is None:
        return None
    field = "rollout.servers.key_file"
    try:
        key = Path(path).read_text().strip()
    except (OSError, UnicodeDecodeError) as error:
        raise UserError(
            field, path, f"cannot be read ({described(error)})", "give a file that every node can read"
        ) from error
    if not key.isascii() or not key.isprintable() or not key or " " in key:
        raise UserError(field, path, "must hold one key, printable and without spaces", "correct the file")
    return key

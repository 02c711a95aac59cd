"""Delivery of new weights to servers: all transports, and the choice among them.

    ThroughLoader     trainer ranks -> server ranks: shards, with digests compared; or whole    servers with our weight loader
    OverHttp          rank 0 -> each server, whole tensors as text                             any server
    SharedDirectory   rank 0 -> files -> each server                                           servers that see the files

A delivery pauses its servers and stamps them ``updating:N`` before the first byte, goes through the transports until none of
the servers is left, and puts the servers into service. An engine asks for one after each ``update_weights``, and again
whenever a server comes back without the current weights. A new transport of ours is a class, its branch of
``choose_transports`` and its name in ``config/rollout.py``; one from outside needs no change here.
"""

from __future__ import annotations

import atexit
import logging
import shutil
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Protocol, runtime_checkable

import torch.distributed as dist
from torch import Tensor

from megatron_rl import plugins
from megatron_rl.config import Config
from megatron_rl.convert.architecture.shape import ModelShape
from megatron_rl.errors import UserError
from megatron_rl.parallel.agree import all_ranks_agree, broadcast_json, error_to_json, raise_first
from megatron_rl.parallel.groups import Groups
from megatron_rl.process.lock import FolderLock, take_lock
from megatron_rl.process.network import own_address
from megatron_rl.rollout.engine import ServerPort
from megatron_rl.rollout.sglang.flags import WEIGHT_LOADER
from megatron_rl.weight_sync import disk
from megatron_rl.weight_sync.layouts import places_of, served_form, training_layout
from megatron_rl.weight_sync.meeting import Delivery, Post, Rendezvous, ServerMeeting
from megatron_rl.weight_sync.served import RolloutLayout
from megatron_rl.weight_sync.shards import ShardSender
from megatron_rl.weight_sync.whole import WholeSender

NUM_RESENDS = 1
"""Repeats of a transfer that did not arrive as it was sent."""

NamedTensors = Iterable[tuple[str, Tensor]]
"""(Hugging Face name, full tensor); collectives stand behind it, so every rank reads it to the end."""

FIELD = "weight_sync.transport"

logger = logging.getLogger(__name__)


@runtime_checkable
class Transport(Protocol):
    """One way to bring the current weights to servers. Every method is a collective."""

    @property
    def metrics(self) -> Mapping[str, float]:
        """Figures of the last ``send``, by full name."""
        ...

    def send(self, port: ServerPort, servers: Sequence[int], version: int) -> list[int]:
        """Bring the weights to servers that are paused.

        Returns:
            The servers that need another transport, the same on every rank. If there is none left, the run ends.

        Raises:
            UserError: on all ranks; the weights cannot be brought there.
        """
        ...


class TransportBuilder(Protocol):
    """A function or class that makes a transport; ``weight_sync.transport: package.module:NAME`` names one from outside."""

    def __call__(
        self,
        config: Config,
        shape: ModelShape,
        groups: Groups,
        *,
        tensors: Callable[[], NamedTensors],
        parameters: Callable[[], Mapping[str, Tensor]],
    ) -> Transport:
        """Make the transport; every rank calls. Arguments as ``choose_transports``."""
        ...


@dataclass(frozen=True)
class WeightDelivery:
    """The weights of a model and the transports that bring them to servers. A ``rollout.engine.WeightSource``."""

    tensors: Callable[[], NamedTensors]
    """Yields the current weights, each time it is called."""
    transports: Sequence[Transport] = ()
    """Transports in order of preference; an engine without servers needs none."""

    @property
    def metrics(self) -> dict[str, float]:
        """Figures of the last delivery, as ``weight_sync/<what>``."""
        return {name: value for transport in self.transports for name, value in transport.metrics.items()}

    def deliver(self, port: ServerPort, version: int) -> None:
        """Bring the current weights to the port's targets and put those into service.

        Raises:
            UserError: on all ranks; no transport has brought the weights to some of them, which are not put into service.
        """
        port.begin_update()
        servers = list(port.targets)
        for transport in self.transports:
            if servers:
                servers = transport.send(port, servers, version)
        if servers:
            tried = ", ".join(type(transport).__name__ for transport in self.transports) or "none"
            raise UserError(
                FIELD,
                None,
                f"left servers {', '.join(map(str, servers))} without the current weights (transports: {tried})",
                "use a transport that can serve them all; weight_sync.transport=tensors sends whole tensors to any server",
            )
        port.end_update()


def choose_transports(
    config: Config,
    shape: ModelShape,
    groups: Groups,
    *,
    tensors: Callable[[], NamedTensors],
    parameters: Callable[[], Mapping[str, Tensor]],
) -> list[Transport]:
    """Return the transports that ``weight_sync.transport`` names; a collective.

    Args:
        config: of the run.
        shape: of the model.
        groups: of the trainer.
        tensors: yields the current weights whole.
        parameters: gives this rank's shards by global Megatron name.

    Raises:
        UserError: ``weight_sync.transport`` names none.
    """
    sync = config.weight_sync
    if plugins.is_path(sync.transport):
        with all_ranks_agree(groups.cpu_group):  # a module from outside may fail on one machine alone
            build: TransportBuilder = plugins.load(sync.transport, field=FIELD, what="a transport")
            arguments = ("config", "shape", "groups")
            plugins.check_call(build, sync.transport, arguments, ("tensors", "parameters"), field=FIELD)
        transport = build(config, shape, groups, tensors=tensors, parameters=parameters)
        if not isinstance(transport, Transport):
            raise UserError(
                FIELD,
                sync.transport,
                f"built {plugins.kind_of(transport)}, which is not a transport",
                "give it the members of megatron_rl.weight_sync.delivery.Transport: metrics and send",
            )
        return [transport]
    if sync.transport == "disk":
        base, directory = config.policy.model_dir, Path(str(sync.directory)).absolute()
        return [SharedDirectory(tensors, directory, base, full_every=sync.full_every, cpu_group=groups.cpu_group)]
    over_http = OverHttp(tensors, bucket_bytes=sync.bucket_bytes, cpu_group=groups.cpu_group)
    # SGLang's servers have our weight loader. Those of an engine from outside are asked if the config wants shards of them.
    if config.rollout.engine != "sglang" and sync.transport != "shards":
        return [over_http]
    form, layout = served_form(config), training_layout(config, shape)
    meeting = ServerMeeting(_rendezvous(config, is_cpu=groups.device.type == "cpu"), groups.cpu_group)
    whole = WholeSender(tensors, shape, layout, meeting, form=form, device=groups.device)
    fallbacks: list[Transport] = [
        ThroughLoader(whole, name="tensors", has_fallback=True, cpu_group=groups.cpu_group),
        over_http,
    ]
    # SGLang turns weights with one scale a tensor around as it loads them: no shard of ours would fit.
    has_form = form.fp8 is None or form.fp8.granularity == "block"
    if sync.transport == "tensors" or not has_form:
        return fallbacks
    shards = ShardSender(parameters, shape, layout, meeting, form=form, device=groups.device)
    is_auto = sync.transport == "auto"
    return [
        ThroughLoader(shards, name="shards", has_fallback=is_auto, cpu_group=groups.cpu_group),
        *(fallbacks if is_auto else ()),
    ]


def _rendezvous(config: Config, *, is_cpu: bool) -> Rendezvous:
    sync = config.weight_sync
    return Rendezvous(
        host=own_address(config.trainer.num_nodes, *config.rollout.servers.hosts),
        network="gloo" if is_cpu else "nccl",
        timeout_s=sync.timeout_s,
        bucket_bytes=sync.bucket_bytes,
        places=partial(places_of, config, is_cpu=is_cpu),
    )


class Sender(Protocol):
    """An object that hands weights to servers with our weight loader: ``ShardSender``, ``WholeSender``."""

    metrics: dict[str, float]

    def send(self, servers: Sequence[int], layout: RolloutLayout, *, post: Post | None) -> dict[int, Delivery]:
        """Send the current weights; return the outcome by server. A collective."""
        ...


class ThroughLoader:
    """The trainer's ranks hand weights to our loader in the servers' ranks. A ``Transport``."""

    def __init__(self, sender: Sender, *, name: str, has_fallback: bool, cpu_group: dist.ProcessGroup) -> None:
        """Args:
        sender: of this trainer.
        name: of the transport in the config, for messages.
        has_fallback: servers that cannot take weights so get them another way; else they end the run.
        cpu_group: all ranks, over gloo.
        """
        self._sender, self._name, self._has_fallback = sender, name, has_fallback
        self._is_first = dist.get_rank(cpu_group) == 0
        self._unfit: set[int] = set()
        """Servers whose parameters turned out not to be cut as the plan says."""

    @property
    def metrics(self) -> Mapping[str, float]:
        """Bytes, seconds, and the number of servers that were proven."""
        return self._sender.metrics

    def send(self, port: ServerPort, servers: Sequence[int], version: int) -> list[int]:
        """Send weights, once more where they did not arrive, and return servers that cannot take them."""
        others: list[int] = []
        failed, deliveries = list(servers), dict[int, Delivery]()
        for _ in range(1 + NUM_RESENDS):
            fit, unfit, layout = self._choose(port, failed)
            others += unfit
            if not fit:
                break
            deliveries = self._sender.send(fit, layout, post=port.post if self._is_first else None)
            self._note(port, deliveries)
            others += [server for server, delivery in deliveries.items() if delivery.state == "unfit"]
            failed = [server for server, delivery in deliveries.items() if delivery.state in ("failed", "mismatch")]
        lost = [f"server {server}: {deliveries[server].detail}" for server in self._choose(port, failed)[0]]
        if lost:
            raise UserError(
                FIELD,
                self._name,
                f"weights did not arrive as they were sent, {1 + NUM_RESENDS} times over; nothing is sampled from them "
                f"({'; '.join(lost)})",
                "see the servers' logs"
                + ("; weight_sync.transport=tensors sends whole tensors" if self._name == "shards" else ""),
            )
        if others and not self._has_fallback:
            reasons = "; ".join(f"server {s}: {deliveries[s].detail}" for s in others if s in deliveries)
            raise UserError(
                FIELD,
                self._name,
                f"a server cannot take shards ({reasons or 'it was started without our weight loader'})",
                f"start it with --custom-weight-loader {WEIGHT_LOADER}, or use weight_sync.transport=auto",
            )
        return others

    def _choose(self, port: ServerPort, servers: Sequence[int]) -> tuple[list[int], list[int], RolloutLayout]:
        """Divide the servers that are up into those that have our loader and others; the first all have the layout's sizes."""
        known = port.servers()
        fit = [server for server in known if server.takes_payloads and server.number not in self._unfit]
        size = min(((server.tp_size, server.ep_size) for server in fit), default=(1, 1))
        takers = {server.number for server in fit if (server.tp_size, server.ep_size) == size}
        up = {server.number for server in known if server.is_up}
        there = [number for number in servers if number in up]
        return (
            [number for number in there if number in takers],
            [number for number in there if number not in takers],
            RolloutLayout(len(known), *size),
        )

    def _note(self, port: ServerPort, deliveries: Mapping[int, Delivery]) -> None:
        """Count and remember what did not go well."""
        for server, delivery in deliveries.items():
            if delivery.state == "unfit":
                self._unfit.add(server)
            if not delivery.is_good and self._is_first:
                port.count(f"sync_{delivery.state}")
                logger.warning("weights to server %d: %s (%s)", server, delivery.state, delivery.detail)


class OverHttp:
    """Rank 0 posts every tensor, whole, to each server: for servers without our loader. A ``Transport``.

    SGLang takes them as text, once for each of its ranks: slow, and meant for small models.
    """

    metrics: Mapping[str, float] = {}

    def __init__(self, tensors: Callable[[], NamedTensors], *, bucket_bytes: int, cpu_group: dist.ProcessGroup) -> None:
        """Args:
        tensors: yields the current weights.
        bucket_bytes: size of a request; a larger tensor goes alone.
        cpu_group: all ranks, over gloo.
        """
        self._tensors, self._bucket_bytes, self._group = tensors, bucket_bytes, cpu_group
        self._is_first = dist.get_rank(cpu_group) == 0

    def send(self, port: ServerPort, servers: Sequence[int], version: int) -> list[int]:
        """Load all tensors on servers, bucket by bucket."""
        error: UserError | None = None
        for bucket in _buckets(self._tensors(), self._bucket_bytes):
            # After an error the tensors are still gathered to the end: the other ranks are in those collectives.
            if self._is_first and error is None:
                error = port.send_bucket(servers, bucket)
        raise_first([broadcast_json(error_to_json(error), self._group)])
        return []


class SharedDirectory:
    """Rank 0 writes what has changed and the checkpoint that it makes; servers load that. A ``Transport``.

    Versions of another run are removed as leftovers, so rank 0 holds the directory's lock until the process ends.
    """

    metrics: Mapping[str, float] = {}

    def __init__(
        self,
        tensors: Callable[[], NamedTensors],
        directory: Path,
        base: Path,
        *,
        full_every: int,
        cpu_group: dist.ProcessGroup,
    ) -> None:
        """Args:
        tensors: yields the current weights.
        directory: that trainer and servers share.
        base: checkpoint that training started from.
        full_every: versions from one full copy to the next.
        cpu_group: all ranks, over gloo.

        Raises:
            UserError: on all ranks; another run has the directory.
        """
        self._tensors, self._directory, self._base, self._group = tensors, directory, base, cpu_group
        self._is_writer = dist.get_rank(cpu_group) == 0
        with all_ranks_agree(cpu_group):
            if self._is_writer:
                atexit.register(_take_directory(directory).release)
        self._publisher = disk.DiskPublisher(directory, full_every=full_every)
        self._written: tuple[int, str] | None = None

    def send(self, port: ServerPort, servers: Sequence[int], version: int) -> list[int]:
        """Write the version unless that is done already, and let servers load it."""
        if self._written is None or self._written[0] != version:
            tensors = iter(self._tensors())
            with all_ranks_agree(self._group):
                try:
                    path = self._write(tensors, version) if self._is_writer else ""
                finally:
                    _consume(tensors)  # the other ranks are in the collectives behind it
            self._written = (version, str(broadcast_json(path, self._group)))
        port.load_checkpoint(servers, self._written[1])
        return []

    def _write(self, tensors: NamedTensors, version: int) -> str:
        target = self._directory / f"served_{version:08d}"
        base = Path(self._written[1]) if self._written is not None else self._base
        self._publisher.publish(tensors, version)
        shutil.rmtree(target, ignore_errors=True)  # of an earlier run
        path = disk.apply(self._directory, base, version, into=target)
        for old in self._directory.glob("served_*"):
            if old not in (path, base):
                shutil.rmtree(old, ignore_errors=True)
        return str(path)


def _take_directory(directory: Path) -> FolderLock:
    field = "weight_sync.directory"
    try:
        return take_lock(directory, field=field)
    except UserError as error:
        raise UserError(field, str(directory), error.rule, error.fix.replace("exp_manager.name", field)) from error


def _consume(tensors: NamedTensors) -> None:
    for _ in tensors:
        pass


def _buckets(tensors: NamedTensors, num_bytes: int) -> Iterator[list[tuple[str, Tensor]]]:
    """Group consecutive tensors of up to ``num_bytes`` together; a larger one goes alone."""
    bucket: list[tuple[str, Tensor]] = []
    size = 0
    for name, tensor in tensors:
        if bucket and size + tensor.nbytes > num_bytes:
            yield bucket
            bucket, size = [], 0
        bucket.append((name, tensor))
        size += tensor.nbytes
    if bucket:
        yield bucket

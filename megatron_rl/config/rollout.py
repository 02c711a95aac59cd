"""Sections ``rollout`` and ``weight_sync``: how responses are sampled, by which servers, and how those get new weights."""

from __future__ import annotations

from typing import Any, Literal
from urllib.parse import urlsplit

from pydantic import Field, NonNegativeInt, PositiveInt

from megatron_rl import plugins
from megatron_rl.config import upstream
from megatron_rl.config.section import MAX_PORT, PathText, PerMachine, Port, Seconds, Temperature, section
from megatron_rl.errors import UserError

ENGINES = ("transformers", "sglang", "recorded")
"""Our engines; ``rollout.build`` builds them."""
TRANSPORTS = ("auto", "shards", "tensors", "disk")
"""Our ways of bringing weights to servers; ``weight_sync.delivery`` chooses among them."""


@section
class ServersConfig:
    """SGLang servers: how many, where, and how long anything may take (``rollout.engine: sglang``)."""

    urls: list[str] | None = None
    """Servers that run already, each ``http://host:port``; null starts our own."""
    key_file: PathText | None = None
    """File with the key that the servers of ``urls`` ask for, on one line; null: they ask for none. Our own servers get a key
    that is drawn at every start."""
    num_per_node: PerMachine = 1
    """Servers started on each node."""
    nodes_per_server: PositiveInt = 1
    """Nodes over which one server spreads, each with an equal share of its ranks: for models that one node cannot hold."""
    placement: Literal["separate", "colocated"] = "separate"
    """``separate``: servers take the GPUs after the trainer's. ``colocated``: they share the trainer's, and give their
    memory back while it trains."""
    base_port: Port | None = None
    """Port of a node's first server, the others count on; null takes free ones."""
    start_timeout_s: Seconds = 600.0
    """Time from a start, or from a failure, until a server must serve."""
    request_timeout_s: Seconds = 1200.0
    """Deadline of one attempt at one request."""
    max_retries: NonNegativeInt = 5
    """Further attempts at a request before the run ends."""
    max_restarts: NonNegativeInt = 20
    """Restarts of one server before the run ends."""
    max_in_flight: PositiveInt = 512
    """Requests under way at one server; the others wait with us."""
    health_interval_s: Seconds = 5.0
    health_timeout_s: Seconds = 60.0
    """A server that gives no sign of life for so long is restarted (ours) or avoided until it answers (given by URL)."""

    def __post_init__(self) -> None:
        if self.urls == []:
            raise UserError("rollout.servers.urls", [], "is empty", "give http://host:port of each server, or null")
        for url in self.urls or []:
            if not _is_address(url):
                raise UserError("rollout.servers.urls", url, "must be http://host:port", "correct it")
        if self.nodes_per_server > 1 and (self.urls is not None or self.num_per_node > 1):
            rule = "is for servers that we start, one on each so many nodes"
            fix = "set rollout.servers.num_per_node=1 and leave urls out, or leave this out"
            raise UserError("rollout.servers.nodes_per_server", self.nodes_per_server, rule, fix)
        last_port = (self.base_port or 0) + self.num_per_node - 1
        if last_port > MAX_PORT:
            rule = f"is too high for {self.num_per_node} servers a node: the last port would be {last_port}, above {MAX_PORT}"
            raise UserError("rollout.servers.base_port", self.base_port, rule, "lower it")
        if 2 * self.health_interval_s > self.health_timeout_s:
            raise UserError(
                "rollout.servers.health_interval_s",
                self.health_interval_s,
                f"must be at most half of rollout.servers.health_timeout_s = {self.health_timeout_s:g}",
                "ask several times within the limit",
            )
        if self.key_file is not None and self.urls is None:
            rule = "is for servers that run already; our own get a key that is drawn at every start"
            raise UserError(
                "rollout.servers.key_file", self.key_file, rule, "leave it out, or set rollout.servers.urls"
            )

    @property
    def hosts(self) -> list[str]:
        """Hosts of ``urls``."""
        return [str(urlsplit(url).hostname) for url in self.urls or ()]


def _is_address(url: str) -> bool:
    """Tell ``http://host`` and ``http://host:port`` from other texts."""
    try:
        parts = urlsplit(url)
        return parts.scheme in ("http", "https") and bool(parts.hostname) and parts.port != 0 and url.isprintable()
    except ValueError:  # of a port that is no number, or too large
        return False


@section
class RolloutConfig:
    """Sampling of responses in training."""

    engine: str = "transformers"
    """``transformers`` generates in process, each rank its share; ``sglang`` asks SGLang servers; ``recorded`` replays
    the files of ``record``. ``package.module:BUILD`` is an engine from outside: see ``rollout.build.EngineBuilder``."""
    servers: ServersConfig = Field(default_factory=ServersConfig)
    sglang_cfg: dict[str, Any] = Field(default_factory=dict)
    """Arguments of SGLang's server under its own names: tp_size, mem_fraction_static, max_total_tokens, ..."""
    temperature: Temperature = 1.0
    top_p: float = Field(default=1.0, gt=0, le=1)
    top_k: NonNegativeInt = 0
    max_new_tokens: PositiveInt = 1024
    max_batch_size: PositiveInt = 256
    """Sequences that one rank generates at once (``transformers``)."""
    over_sampling: float = Field(default=1.0, ge=1)
    """Prompts started for each that a step needs (``sglang``). As soon as enough groups are whole the others are stopped,
    and their prompts come again in the next step. Above 1 nobody waits for the slowest response, and short responses are
    favoured a little."""
    record: bool = False
    """Keep every step's rollouts in ``<run>/rollouts/``."""
    recorded_dir: PathText | None = None
    """Folder that ``engine: recorded`` reads."""

    def __post_init__(self) -> None:
        plugins.check_name(self.engine, ENGINES, field="rollout.engine", what="an engine")
        if (self.engine == "recorded") != (self.recorded_dir is not None):
            raise UserError(
                "rollout.recorded_dir",
                self.recorded_dir,
                "is given exactly when rollout.engine is recorded",
                "set both or neither",
            )
        if self.engine == "transformers" and self.over_sampling > 1:
            raise UserError(
                "rollout.over_sampling",
                self.over_sampling,
                "rollout.engine transformers cannot stop early, so more prompts would only cost time",
                "set it to 1, or use rollout.engine=sglang",
            )
        if self.servers.urls is not None and self.sglang_cfg:
            raise UserError(
                "rollout.sglang_cfg",
                sorted(self.sglang_cfg),
                "has no effect on the servers of rollout.servers.urls, which run already",
                "remove one of the two",
            )
        upstream.check_sglang(self.sglang_cfg)

    @property
    def starts_servers(self) -> bool:
        """The run starts and stops SGLang servers of its own."""
        return self.engine == "sglang" and self.servers.urls is None

    @property
    def gpus_per_server(self) -> int:
        """GPUs of one server of ours."""
        return int(self.sglang_cfg.get("tp_size", 1)) * int(self.sglang_cfg.get("pp_size", 1))

    @property
    def gpus_per_node(self) -> int:
        """GPUs that our servers take on each node."""
        return self.servers.num_per_node * self.gpus_per_server // self.servers.nodes_per_server

    @property
    def is_colocated(self) -> bool:
        """Our servers and the trainer use the same GPUs, in turn."""
        return self.starts_servers and self.servers.placement == "colocated"


@section
class WeightSyncConfig:
    """Ways of giving servers new weights. The in-process engine copies."""

    transport: str = "auto"
    """``shards``: each trainer rank sends server ranks what they lack of its shards, and digests of both ends are compared
    before a server serves. ``tensors``: rank 0 gives each server whole tensors. ``disk``: rank 0 writes what has changed into
    ``directory``, and servers load the checkpoint that it makes there. ``auto``: shards to servers that can take them, whole
    tensors to others. ``package.module:BUILD`` is a transport from outside: see ``weight_sync.delivery.TransportBuilder``."""
    directory: PathText | None = None
    """Directory of ``disk``, on a file system that the servers share."""
    full_every: PositiveInt = 20
    """Versions of ``disk`` from one full copy to the next; between them only differences are written."""
    quantization: Literal["fp8_block", "fp8_tensor"] | None = None
    """Servers get their linear layers in eight bits: e4m3 with a scale for each block of 128 x 128, or for each layer. Blocks
    go by shards or as whole tensors, ``fp8_tensor`` as whole tensors."""
    power_of_two_scales: bool = False
    """Scales of ``quantization`` are powers of two, which e8m0 can hold."""
    pause_mode: Literal["abort", "retract", "in_place"] = "retract"
    """Fate of requests under way, under SGLang's names. ``retract``: they start again from their tokens so far,
    with a fresh cache. ``in_place``: they go on with the old cache, so their next tokens belong to neither version.
    ``abort``: they end and are asked again."""
    bucket_bytes: PositiveInt = 512 * 2**20
    """Most bytes that a rank hands on at once; a sender has two such buffers while it sends (on a CPU at most 4 MiB each)."""
    timeout_s: Seconds = 600.0
    """Deadline of each request of an update."""

    def __post_init__(self) -> None:
        plugins.check_name(self.transport, TRANSPORTS, field="weight_sync.transport", what="a transport")
        if (self.transport == "disk") != (self.directory is not None):
            raise UserError(
                "weight_sync.directory",
                self.directory,
                "must be given if weight_sync.transport is disk, and only then",
                "name a directory that trainer and servers share, or use another transport",
            )
        unfit = {"disk": ("fp8_block", "fp8_tensor"), "shards": ("fp8_tensor",)}
        if self.quantization in unfit.get(self.transport, ()):
            raise UserError(
                "weight_sync.quantization",
                self.quantization,
                f"goes by whole tensors; weight_sync.transport is {self.transport}",
                "set weight_sync.transport to auto or tensors",
            )

"""Delivery over a port that records its calls: order, fallbacks, repeats, and errors that are equal on all ranks."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import Future
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import Tensor

from megatron_rl.config import load_config
from megatron_rl.errors import UserError
from megatron_rl.rollout.engine import ServerInfo
from megatron_rl.weight_sync.delivery import OverHttp, ThroughLoader, WeightDelivery, choose_transports
from megatron_rl.weight_sync.served import RolloutLayout
from megatron_rl.weight_sync.shards import Delivery
from tests.forked import run_ranks

TINY = Path(__file__).parents[2] / "tiny.yaml"
TENSORS = [(name, torch.full((4,), float(number))) for number, name in enumerate("abcde")]
BUCKET_BYTES = 40
"""Two tensors of 16 bytes, but not three."""


class Port:
    """Servers of given sizes that keep what they get; ``refuses`` names a tensor that they do not take."""

    def __init__(self, *servers: ServerInfo, refuses: str = "") -> None:
        self.targets = [server.number for server in servers if server.is_up]
        self._servers, self._refuses = list(servers), refuses
        self.calls: list[Any] = []

    def servers(self) -> list[ServerInfo]:
        return self._servers

    def begin_update(self) -> None:
        self.calls.append("begin")

    def end_update(self) -> None:
        self.calls.append("end")

    def send_bucket(self, servers: Sequence[int], bucket: Sequence[tuple[str, Tensor]]) -> UserError | None:
        names = [name for name, _ in bucket]
        self.calls.append((list(servers), names))
        return UserError("rollout.engine", "sglang", "refused", "none") if self._refuses in names else None

    def post(self, server: int, payload: bytes) -> Future[str | None]:
        raise AssertionError("the scripted sender posts nothing")

    def load_checkpoint(self, servers: Sequence[int], path: str) -> None:
        self.calls.append((list(servers), path))

    def count(self, name: str) -> None:
        self.calls.append(name)


class ScriptedSender:
    """A ``ShardSender`` whose outcomes are known: one entry a ``send``, server -> state."""

    def __init__(self, *script: dict[int, str]) -> None:
        self.metrics = {"weight_sync/servers_proven": 1.0}
        self._script, self.asked = list(script), list[tuple[list[int], RolloutLayout]]()

    def send(self, servers: Sequence[int], layout: RolloutLayout, *, post: object) -> dict[int, Delivery]:
        self.asked.append((list(servers), layout))
        return {server: Delivery(state, f"detail {server}") for server, state in self._script.pop(0).items()}  # type: ignore[arg-type]


def server(number: int, *, tp: int = 2, takes: bool = True, up: bool = True) -> ServerInfo:
    return ServerInfo(number, up, tp, 1, takes)


def whole(tensors: Callable[[], Iterator[tuple[str, Tensor]]] = lambda: iter(TENSORS)) -> OverHttp:
    assert dist.group.WORLD is not None
    return OverHttp(tensors, bucket_bytes=BUCKET_BYTES, cpu_group=dist.group.WORLD)


def outcome(port: Port, *script: dict[int, str], has_fallback: bool = True) -> tuple[list[Any], list[Any], str]:
    """Calls of the port, of the sender, and the error."""
    assert dist.group.WORLD is not None
    sender = ScriptedSender(*script)
    shards = ThroughLoader(sender, name="shards", has_fallback=has_fallback, cpu_group=dist.group.WORLD)
    delivery = WeightDelivery(lambda: iter(TENSORS), [shards, whole()] if has_fallback else [shards])
    error = ""
    try:
        delivery.deliver(port, 3)
    except UserError as failure:
        error = str(failure)
    return port.calls, sender.asked, error


def alone(case: Callable[..., Any], *arguments: Any) -> Any:
    return run_ranks(case, 1, *arguments)[0]


def test_whole_tensors_go_in_buckets_between_begin_and_end() -> None:
    calls = alone(send_whole, "")
    assert calls == ["begin", ([0, 1], ["a", "b"]), ([0, 1], ["c", "d"]), ([0, 1], ["e"]), "end"]


def send_whole(refuses: str) -> list[Any]:
    port = Port(server(0), server(1), refuses=refuses)
    WeightDelivery(lambda: iter(TENSORS), [whole()]).deliver(port, 1)
    return port.calls


def test_a_refusal_is_raised_on_all_ranks_after_all_have_read_all_tensors() -> None:
    for read, error, calls in run_ranks(refused_on_each, 2):
        assert read == list("abcde") and "refused" in error
        assert calls in (["begin", ([0], ["a", "b"])], ["begin"]), "no end, and nothing after the refusal"


def refused_on_each() -> tuple[list[str], str, list[Any]]:
    read: list[str] = []

    def tensors() -> Iterator[tuple[str, Tensor]]:
        for name, tensor in TENSORS:
            read.append(name)
            yield name, tensor

    port = Port(server(0), refuses="b")
    with pytest.raises(UserError) as caught:
        WeightDelivery(tensors, [whole(tensors)]).deliver(port, 1)
    return read, str(caught.value), port.calls


def test_servers_of_another_kind_get_whole_tensors_and_those_that_are_down_nothing() -> None:
    port = Port(server(0, tp=4), server(1), server(2, takes=False), server(3, up=False))
    port.targets = [0, 1, 2, 3]
    calls, asked, error = alone(outcome, port, {1: "proven"})
    assert error == "" and asked == [([1], RolloutLayout(4, 2, 1))]
    assert calls == ["begin", ([0, 2], ["a", "b"]), ([0, 2], ["c", "d"]), ([0, 2], ["e"]), "end"]


def test_what_did_not_arrive_is_sent_once_more() -> None:
    first = {0: "mismatch", 1: "proven"}
    calls, asked, error = alone(outcome, Port(server(0), server(1)), first, {0: "proven"})
    assert error == "" and [servers for servers, _ in asked] == [[0, 1], [0]]
    assert calls == ["begin", "sync_mismatch", "end"]


def test_what_does_not_arrive_twice_ends_the_run_before_the_server_serves() -> None:
    calls, _, error = alone(outcome, Port(server(0)), {0: "mismatch"}, {0: "failed"})
    assert "detail 0" in error and "2 times over" in error
    assert calls == ["begin", "sync_mismatch", "sync_failed"]


def test_an_unfit_server_gets_whole_tensors_from_then_on() -> None:
    assert alone(unfit_twice) == [
        1,
        ["begin", "sync_unfit", ([0], ["a", "b"]), ([0], ["c", "d"]), ([0], ["e"]), "end"],
        True,
    ]


def unfit_twice() -> list[Any]:
    assert dist.group.WORLD is not None
    sender = ScriptedSender({0: "unfit"})
    shards = ThroughLoader(sender, name="shards", has_fallback=True, cpu_group=dist.group.WORLD)
    delivery = WeightDelivery(lambda: iter(TENSORS), [shards, whole()])
    first, second = Port(server(0)), Port(server(0))
    delivery.deliver(first, 1)
    delivery.deliver(second, 2)
    return [len(sender.asked), first.calls, "sync_unfit" not in second.calls and "end" in second.calls]


def test_without_a_fallback_an_unfit_server_ends_the_run() -> None:
    port = Port(server(0))
    calls, _, error = alone(lambda: outcome(port, {0: "unfit"}, has_fallback=False))
    assert "weight_sync.transport" in error and "detail 0" in error and "end" not in calls


OUTSIDE = """
from types import SimpleNamespace
class Pigeon:
    metrics = {}
    def __init__(self, config, shape, groups, *, tensors, parameters):
        self.tensors = tensors
    def send(self, port, servers, version):
        port.send_bucket(servers, [*self.tensors()])
        return []
class Lazy(Pigeon):
    def send(self, port, servers, version):
        return servers[1:]
def nothing(*args, **kwargs):
    return SimpleNamespace()
def short(config):
    return SimpleNamespace()
NUMBER = int("3")
"""


def transported(name: str) -> tuple[list[Any], str]:
    """Calls of a port whose weights an outside transport brings, and the error of choosing or using it."""
    config = load_config(TINY, ["policy.model_path=m", "rollout.engine=sglang", f"weight_sync.transport={name}"])
    groups: Any = SimpleNamespace(cpu_group=dist.group.WORLD, device=torch.device("cpu"))
    port = Port(server(0), server(1))
    try:
        shape: Any = None
        ways = choose_transports(config, shape, groups, tensors=lambda: iter(TENSORS), parameters=dict)
        WeightDelivery(lambda: iter(TENSORS), ways).deliver(port, 3)
    except UserError as error:
        return port.calls, str(error)
    return port.calls, ""


def test_a_transport_from_outside_is_the_only_one(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "pigeons.py").write_text(OUTSIDE)
    monkeypatch.syspath_prepend(tmp_path)
    assert run_ranks(transported, 1, "pigeons:Pigeon") == [(["begin", ([0, 1], list("abcde")), "end"], "")]
    (_, error), _ = run_ranks(transported, 2, "pigeons:nothing")
    assert "built a SimpleNamespace, which is not a transport" in error
    with pytest.raises(UserError, match=r"weight_sync.transport = 'pigeons:Pigon'.*did you mean Pigeon"):
        load_config(TINY, ["policy.model_path=m", "rollout.engine=sglang", "weight_sync.transport=pigeons:Pigon"])


@pytest.mark.parametrize(
    ("name", "words"),
    [
        ("short", r"cannot be called as f(config, shape, groups, tensors=..., parameters=...)"),
        ("NUMBER", "is an int, not a function or a class"),
    ],
)
def test_what_cannot_be_a_transport_is_one_error(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, name: str, words: str
) -> None:
    (tmp_path / "pigeons.py").write_text(OUTSIDE)
    monkeypatch.syspath_prepend(tmp_path)
    ((calls, error),) = run_ranks(transported, 1, f"pigeons:{name}")
    assert calls == [] and error.startswith(f"weight_sync.transport = 'pigeons:{name}': {words}")


def test_a_server_that_no_transport_serves_ends_the_run_before_any_serves(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "pigeons.py").write_text(OUTSIDE)
    monkeypatch.syspath_prepend(tmp_path)
    for calls, error in run_ranks(transported, 2, "pigeons:Lazy"):
        assert calls == ["begin"], "end would stamp the server with a version that it does not have"
        assert error.startswith("weight_sync.transport: left servers 1 without the current weights (transports: Lazy)")


class Asked(ScriptedSender):
    """A sender that is made as ``ShardSender`` is."""

    def __init__(self, *args: object, **kwargs: object) -> None:
        super().__init__()


def sent_by_an_engine_from_outside(transport: str) -> str:
    overrides = ["policy.model_path=m", "rollout.engine=pigeons:nothing", f"weight_sync.transport={transport}"]
    groups: Any = SimpleNamespace(cpu_group=dist.group.WORLD, device=torch.device("cpu"))
    shape: Any = SimpleNamespace(num_experts=0)
    ways = choose_transports(
        load_config(TINY, overrides), shape, groups, tensors=lambda: iter(TENSORS), parameters=dict
    )
    port = Port(server(0, takes=False))
    try:
        WeightDelivery(lambda: iter(TENSORS), ways).deliver(port, 3)
    except UserError as error:
        return str(error)
    return "+".join(type(way).__name__ for way in ways)


def test_servers_of_an_engine_from_outside_get_shards_only_where_these_are_asked_for(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "pigeons.py").write_text(OUTSIDE)
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.setattr("megatron_rl.weight_sync.delivery.ShardSender", Asked)
    assert alone(sent_by_an_engine_from_outside, "auto") == "OverHttp"
    assert "a server cannot take shards" in alone(sent_by_an_engine_from_outside, "shards")


def two_runs_over(directory: Path) -> tuple[list[str], str]:
    """Names in the directory after a second run has come, and what it says."""
    disk = ["rollout.engine=sglang", "weight_sync.transport=disk", f"weight_sync.directory={directory}"]
    groups: Any = SimpleNamespace(cpu_group=dist.group.WORLD, device=torch.device("cpu"))
    shape: Any = None
    config = load_config(TINY, ["policy.model_path=m", *disk])
    error = ""
    for _ in range(2):
        try:
            choose_transports(config, shape, groups, tensors=lambda: iter(TENSORS), parameters=dict)
        except UserError as failure:
            error += str(failure)
    return sorted(path.name for path in directory.iterdir()), error


def test_a_second_run_over_a_directory_ends_before_it_removes_anything(tmp_path: Path) -> None:
    for name in ("served_00000003", "00000003.full"):
        (tmp_path / name).mkdir()
    for names, error in run_ranks(two_runs_over, 2, tmp_path):
        assert names == [".lock", "00000003.full", "served_00000003"]
        assert error.startswith(f"weight_sync.directory = '{tmp_path}': is in use by process ")
        assert error.endswith("or choose another weight_sync.directory.") and "\n" not in error

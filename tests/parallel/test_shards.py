"""Shards from real Megatron ranks to processes that stand where a server's ranks do: same loader, same groups, no SGLang.

What real servers make of it is in tests/servers/test_shards_server.py.
"""

from __future__ import annotations

import math
import multiprocessing
import os
import signal
import threading
import time
from collections.abc import Callable, Iterator
from concurrent.futures import Future
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor

from megatron_rl.convert.architecture.shape import read_shape
from megatron_rl.weight_sync.messages import box
from megatron_rl.weight_sync.served import RolloutLayout, served_parameters
from megatron_rl.weight_sync.shards import Delivery
from tests.forked import run_ranks
from tests.policy_case import build_policy, tiny_config
from tests.tiny_models import make_tiny_model

BUCKET_BYTES = 20_000
"""Small, so that even a tiny model needs many messages."""


class Held(torch.nn.Module):
    """Parameters with dots in their names, all wrong at first."""

    def __init__(self, shapes: dict[str, tuple[int, ...]]) -> None:
        super().__init__()
        self.held = {name: torch.nn.Parameter(torch.full(shape, 7.0)) for name, shape in shapes.items()}

    def named_parameters(self, *_: object, **__: object) -> Iterator[tuple[str, Tensor]]:  # type: ignore[override]
        yield from self.held.items()


def be_a_server_rank(folder: Path, shapes: dict[str, tuple[int, ...]], tp_rank: int) -> None:
    """Take every recipe that appears, and save what is held then."""
    from megatron_rl.weight_sync.receiver import take

    torch.set_num_threads(1)
    model, number = Held(shapes), 0
    while True:
        recipe = folder / f"recipe_{number}"
        if not recipe.exists():
            time.sleep(0.01)
            continue
        take(model, recipe.read_bytes(), tp_rank)
        torch.save({name: p.data for name, p in model.held.items()}, folder / f"held_{number}_{tp_rank}.part")
        os.replace(folder / f"held_{number}_{tp_rank}.part", folder / f"held_{number}_{tp_rank}")
        number += 1


class Servers:
    """Processes of all server ranks, and how rank 0 of the trainer reaches them."""

    def __init__(self, root: Path, model: Path, layout: RolloutLayout, *, spoil: str = "") -> None:
        self.root, self.layout, self.shape = root, layout, read_shape(model)
        self.processes = []
        for server in range(layout.num_servers):
            (root / str(server)).mkdir(parents=True)
            for tp_rank in range(layout.tp_size):
                shapes = {p.name: p.shape for p in served_parameters(self.shape, layout, tp_rank)}
                if self.shape.tied:
                    shapes.pop("lm_head.weight", None)
                if spoil:
                    shapes[spoil] = (3, *shapes[spoil][1:])
                arguments = (root / str(server), shapes, tp_rank)
                process = multiprocessing.get_context("fork").Process(
                    target=be_a_server_rank, args=arguments, daemon=True
                )
                process.start()
                self.processes.append(process)

    def close(self) -> None:
        for process in self.processes:
            process.kill()
            process.join()

    def held(self, server: int, number: int, tp_rank: int) -> dict[str, Tensor]:
        return torch.load(self.root / str(server) / f"held_{number}_{tp_rank}")

    def poster(self) -> Callable[[int, bytes], Future[str | None]]:
        """To be called in the trainer's rank 0."""
        counts: dict[int, int] = {}

        def post(server: int, payload: bytes) -> Future[str | None]:
            folder, number = self.root / str(server), counts.get(server, 0)
            counts[server] = number + 1
            (folder / "new").write_bytes(payload)
            os.replace(folder / "new", folder / f"recipe_{number}")
            future: Future[str | None] = Future()

            def wait() -> None:
                ranks = range(self.layout.tp_size)
                pids = [self.processes[server * self.layout.tp_size + rank].pid for rank in ranks]
                while not all((folder / f"held_{number}_{rank}").exists() for rank in ranks):
                    if any(is_gone(pid) for pid in pids):
                        future.set_result("a process of it is gone")
                        return
                    time.sleep(0.01)
                future.set_result(None)

            threading.Thread(target=wait, daemon=True).start()
            return future

        return post


def is_gone(pid: int | None) -> bool:
    """A killed child of the test process is a zombie, which still has a number."""
    return "\nState:\tZ" in Path(f"/proc/{pid}/status").read_text()


@pytest.fixture
def servers(tmp_path: Path) -> Iterator[Callable[..., Servers]]:
    made: list[Servers] = []

    def make(model: Path, layout: RolloutLayout, **options: str) -> Servers:
        made.append(Servers(tmp_path / f"servers{len(made)}", model, layout, **options))
        return made[-1]

    yield make
    for each in made:
        each.close()


Script = Callable[..., object]


def as_trainer(model: Path, training: dict, servers: Servers, script: Script, backend: str = "gloo") -> object:
    """On each trainer rank: build the policy and its sender, and follow the script."""
    import torch.distributed as dist

    from megatron_rl.weight_sync.layouts import training_layout
    from megatron_rl.weight_sync.publish import shards_of
    from megatron_rl.weight_sync.shards import Rendezvous, ShardSender

    config = tiny_config(
        model, *training.get("overrides", ()), **{k: v for k, v in training.items() if k != "overrides"}
    )
    policy = build_policy(config)
    sender = ShardSender(
        lambda: shards_of(policy.trainable),
        policy.shape,
        training_layout(config, policy.shape),
        Rendezvous("127.0.0.1", backend, timeout_s=20.0, bucket_bytes=BUCKET_BYTES),
        dtype=torch.float32,
        cpu_group=policy.groups.cpu_group,
    )
    layout = servers.layout
    post = servers.poster() if dist.get_rank() == 0 else None

    def send(*numbers: int) -> dict[int, Delivery]:
        return sender.send(numbers, layout, post=post)

    return script(policy, sender, send, servers)


def twice(policy, sender, send, servers) -> list:  # type: ignore[no-untyped-def]
    first = send(*range(servers.layout.num_servers))
    names = {server: name for server, (name, _) in sender._groups.items()}
    with torch.no_grad():
        for chunk in policy.chunks:
            for parameter in chunk.parameters():
                parameter.mul_(2)
    second = send(*range(servers.layout.num_servers))
    assert {server: name for server, (name, _) in sender._groups.items()} == names, "a healthy group is kept"
    return [first, second, sender.metrics]


@pytest.fixture(scope="session")
def models(tmp_path_factory: pytest.TempPathFactory) -> Callable[..., Path]:
    root, made = tmp_path_factory.mktemp("models"), {}

    def model(family: str, *, tied: bool) -> Path:
        if (family, tied) not in made:
            path = root / f"{family}-{tied}"
            made[family, tied] = make_tiny_model(path, family, tied=tied, seed=11, num_hidden_layers=4)  # type: ignore[arg-type]
        return made[family, tied]

    return model


EXPERTS = ("policy.megatron_cfg.expert_model_parallel_size=2",)


@pytest.mark.parametrize(
    ("family", "tied", "training", "rollout", "backend"),
    [
        ("qwen3", False, {"tp": 2, "pp": 2}, RolloutLayout(num_servers=1, tp_size=2), "gloo"),
        ("qwen2", True, {"pp": 2, "vpp": 2}, RolloutLayout(num_servers=1, tp_size=2), "gloo"),
        ("qwen2", True, {"tp": 4}, RolloutLayout(num_servers=2, tp_size=2), "ipc"),
        (
            "llama",
            True,
            {"dp": 2, "pp": 2},
            RolloutLayout(num_servers=1, tp_size=8),
            "gloo",
        ),  # key-value heads repeated
        (
            "qwen3_moe",
            False,
            {"tp": 2, "dp": 2, "sp": True, "overrides": EXPERTS},
            RolloutLayout(1, tp_size=2, ep_size=2),
            "gloo",
        ),
        ("qwen3_moe", False, {"dp": 2, "overrides": EXPERTS}, RolloutLayout(1, tp_size=2), "ipc"),
    ],
    ids=["tp2-pp2", "vpp", "two-servers", "tp8", "experts", "experts-cut"],
)
def test_servers_hold_what_the_checkpoint_says(
    models: Callable[..., Path], servers: Callable[..., Servers], family: str, tied: bool, training: dict,
    rollout: RolloutLayout, backend: str,
) -> None:  # fmt: skip
    model = models(family, tied=tied)
    receivers = servers(model, rollout)
    world_size = math.prod(training.get(axis, 1) for axis in ("tp", "pp", "dp"))
    for first, second, metrics in run_ranks(as_trainer, world_size, model, training, receivers, twice, backend):
        assert {d.state for d in (*first.values(), *second.values())} == {"proven"}
        assert metrics["weight_sync/servers_proven"] == rollout.num_servers
    checkpoint = load_file(model / "model.safetensors")
    for number, factor in ((0, 1), (1, 2)):
        for server in range(rollout.num_servers):
            for tp_rank in range(rollout.tp_size):
                held = receivers.held(server, number, tp_rank)
                for parameter in served_parameters(receivers.shape, rollout, tp_rank):
                    for part in parameter.boxes:
                        mine = held[parameter.name][box(part.start, part.size)]
                        assert torch.equal(mine, factor * checkpoint[part.hf_name][box(part.hf_start, part.size)])


def under_fused_names(policy, sender, send, servers) -> Delivery:  # type: ignore[no-untyped-def]
    """Transformer Engine is not here, but its names are."""
    from megatron_rl.weight_sync import publish

    honest = publish.named_parameters
    fused = {
        "input_layernorm.weight": "self_attention.linear_qkv.layer_norm_weight",
        "pre_mlp_layernorm.weight": "mlp.linear_fc1.layer_norm_weight",
    }

    def named(*arguments: object) -> Iterator[tuple[str, Tensor]]:
        for name, tensor in honest(*arguments):  # type: ignore[arg-type]
            for plain, other in fused.items():
                name = name.replace(plain, other) if name.endswith(plain) else name
            yield name, tensor

    publish.named_parameters = named  # type: ignore[assignment]
    assert any("linear_fc1.layer_norm_weight" in name for name, _ in named(policy.chunks, policy.shape, policy.groups))
    return send(0)[0]


def test_fused_norms_are_sent_under_their_own_names(
    models: Callable[..., Path], servers: Callable[..., Servers]
) -> None:
    model = models("qwen3", tied=False)
    receivers = servers(model, RolloutLayout(1, 2))
    for delivery in run_ranks(as_trainer, 2, model, {"tp": 2}, receivers, under_fused_names):
        assert delivery.state == "proven"


def with_a_flipped_bit(policy, sender, send, servers) -> list:  # type: ignore[no-untyped-def]
    """One bit of one message of rank 1 is another on the wire, once."""
    from megatron_rl.weight_sync import shards

    honest, count = shards._Connection.send, [0]

    def flip(link: object, flat: Tensor, *rest: object) -> object:
        count[0] += 1
        if count[0] == 3 and sender._rank == 1:
            flat = flat.clone()
            flat.view(torch.int32)[flat.numel() // 2] ^= 1 << 12
        return honest(link, flat, *rest)  # type: ignore[arg-type]

    shards._Connection.send = flip  # type: ignore[method-assign, assignment]
    return [send(0)[0], send(0)[0]]


def test_a_flipped_bit_is_found_and_named_and_sending_again_mends_it(
    models: Callable[..., Path], servers: Callable[..., Servers]
) -> None:
    model = models("qwen3", tied=False)
    receivers = servers(model, RolloutLayout(1, 2))
    for spoiled, again in run_ranks(as_trainer, 4, model, {"tp": 2, "pp": 2}, receivers, with_a_flipped_bit):
        assert spoiled.state == "mismatch"
        assert "trainer rank 1" in spoiled.detail and "has digest" in spoiled.detail and "model." in spoiled.detail
        assert again.state == "proven"


def with_a_dead_rank(policy, sender, send, servers) -> list:  # type: ignore[no-untyped-def]
    """A rank of server 0 dies once the others are sending; server 1 is none the worse."""
    from megatron_rl.weight_sync import shards

    honest, count = shards._Connection.send, [0]

    def kill(link: object, *rest: object) -> object:
        count[0] += 1
        if count[0] == 4 and sender._rank == 0:
            os.kill(servers.processes[1].pid, signal.SIGKILL)
            time.sleep(0.2)
        return honest(link, *rest)  # type: ignore[arg-type]

    shards._Connection.send = kill  # type: ignore[method-assign, assignment]
    started = time.monotonic()
    first = send(0, 1)
    seconds = time.monotonic() - started
    return [first, send(1), seconds]


@pytest.mark.parametrize("backend", ["gloo", "ipc"])
def test_a_server_that_dies_in_between_holds_nobody_up(
    models: Callable[..., Path], servers: Callable[..., Servers], backend: str
) -> None:
    model = models("qwen3", tied=False)
    receivers = servers(model, RolloutLayout(2, 2))
    for first, second, seconds in run_ranks(as_trainer, 2, model, {"tp": 2}, receivers, with_a_dead_rank, backend):
        assert first[0].state == "failed" and first[1].state == "proven" and second[1].state == "proven"
        assert seconds < 15


def once(policy, sender, send, servers) -> Delivery:  # type: ignore[no-untyped-def]
    return send(0)[0]


def test_parameters_that_are_cut_otherwise_are_told_before_anything_is_sent(
    models: Callable[..., Path], servers: Callable[..., Servers]
) -> None:
    model = models("qwen3", tied=False)
    receivers = servers(model, RolloutLayout(1, 2), spoil="model.layers.1.self_attn.qkv_proj.weight")
    for delivery in run_ranks(as_trainer, 2, model, {"tp": 2}, receivers, once):
        assert delivery.state == "unfit" and "layers.1.self_attn.qkv_proj.weight has shape (3, 64)" in delivery.detail


def test_servers_of_an_impossible_size_are_unfit(models: Callable[..., Path], servers: Callable[..., Servers]) -> None:
    model = models("qwen3", tied=False)
    receivers = servers(model, RolloutLayout(0, 2))
    receivers.layout = RolloutLayout(1, 3)
    for delivery in run_ranks(as_trainer, 2, model, {"tp": 2}, receivers, once):
        assert delivery.state == "unfit" and "rollout.sglang_cfg.tp_size" in delivery.detail


def test_a_family_without_a_cut_for_servers_is_unfit(
    models: Callable[..., Path], servers: Callable[..., Servers]
) -> None:
    model = models("deepseek_v3", tied=False)
    receivers = servers(model, RolloutLayout(0, 2))
    receivers.layout = RolloutLayout(1, 2)
    for delivery in run_ranks(as_trainer, 1, model, {}, receivers, once):
        assert delivery.state == "unfit" and "weight_sync.transport=tensors" in delivery.detail

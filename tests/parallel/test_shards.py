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
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import Future
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor

from megatron_rl.convert.architecture.shape import read_shape
from megatron_rl.convert.tables.table import hf_tensors
from megatron_rl.errors import UserError
from megatron_rl.weight_sync.buckets import box
from megatron_rl.weight_sync.fp8_format import Fp8Format
from megatron_rl.weight_sync.meeting import Delivery
from megatron_rl.weight_sync.pieces import ServedForm
from megatron_rl.weight_sync.places import GpuPlace, Places
from megatron_rl.weight_sync.quantize import quantized
from megatron_rl.weight_sync.served import RolloutLayout, served_parameters
from tests.forked import run_ranks
from tests.policy_case import build_policy, tiny_config
from tests.tiny_models import make_tiny_model

PLAIN = ServedForm("float32")
BUCKET_BYTES = 20_000
"""Small, so that even a tiny model needs many messages."""


class Held(torch.nn.Module):
    """Parameters with dots in their names, all wrong at first."""

    def __init__(self, kinds: dict[str, tuple[tuple[int, ...], torch.dtype]]) -> None:
        super().__init__()
        self.held = {
            name: torch.nn.Parameter(torch.full(shape, 7.0).to(dtype), requires_grad=False)
            for name, (shape, dtype) in kinds.items()
        }

    def named_parameters(self, *_: object, **__: object) -> Iterator[tuple[str, Tensor]]:  # type: ignore[override]
        yield from self.held.items()

    def load_weights(self, tensors: Iterable[tuple[str, Tensor]]) -> None:
        """As SGLang's models: copy each tensor as it comes, here whole."""
        for name, tensor in tensors:
            self.held[name].data.copy_(tensor)


def be_a_server_rank(folder: Path, kinds: dict[str, tuple[tuple[int, ...], torch.dtype]], tp_rank: int) -> None:
    """Take every recipe that appears, and save what is held then."""
    from megatron_rl.weight_sync.receiver import take

    torch.set_num_threads(1)
    model, number = Held(kinds), 0
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

    def __init__(
        self,
        root: Path,
        model: Path,
        layout: RolloutLayout,
        form: ServedForm = PLAIN,
        *,
        spoil: str = "",
        is_whole: bool = False,
    ) -> None:
        self.root, self.layout, self.form, self.shape = root, layout, form, read_shape(model)
        self.is_whole = is_whole
        self.processes = []
        for server in range(layout.num_servers):
            (root / str(server)).mkdir(parents=True)
            for tp_rank in range(layout.tp_size):
                if is_whole:
                    kinds = {name: (extent, torch.float32) for name, extent in hf_tensors(self.shape).items()}
                else:
                    kinds = {
                        p.name: (p.shape, getattr(torch, form.dtype_name(p.form)))
                        for p in served_parameters(self.shape, layout, tp_rank, fp8=form.fp8)
                    }
                if self.shape.tied:
                    kinds.pop("lm_head.weight", None)
                if spoil:
                    kinds[spoil] = ((3, *kinds[spoil][0][1:]), kinds[spoil][1])
                arguments = (root / str(server), kinds, tp_rank)
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

    def make(model: Path, layout: RolloutLayout, form: ServedForm = PLAIN, **options: Any) -> Servers:
        made.append(Servers(tmp_path / f"servers{len(made)}", model, layout, form, **options))
        return made[-1]

    yield make
    for each in made:
        each.close()


Script = Callable[..., object]
Where = Callable[[RolloutLayout, int], Places]


def together(layout: RolloutLayout, num_ranks: int) -> Places:
    """All on one machine."""
    return Places((GpuPlace(0),) * num_ranks, (GpuPlace(0),) * layout.num_ranks)


def apart(layout: RolloutLayout, num_ranks: int) -> Places:
    """Servers elsewhere."""
    return Places.apart(num_ranks, layout.num_ranks)


def on_two_nodes(layout: RolloutLayout, num_ranks: int) -> Places:
    """Trainer and servers share two machines, and none of their GPUs is where it could be."""
    return Places(
        tuple(GpuPlace(2 * rank // num_ranks, rank % 2) for rank in range(num_ranks)),
        tuple(GpuPlace(2 * n // layout.num_ranks, n % 2) for n in range(layout.num_ranks)),
    )


def half_apart(layout: RolloutLayout, num_ranks: int) -> Places:
    """Every other server rank elsewhere."""
    return Places((GpuPlace(0),) * num_ranks, tuple(GpuPlace(n % 2) for n in range(layout.num_ranks)))


def as_trainer(model: Path, training: dict, servers: Servers, script: Script, where: Where = together) -> object:
    """On each trainer rank: build the policy and its sender, and follow the script."""
    import torch.distributed as dist

    from megatron_rl.model.weights import iterate_hf_tensors
    from megatron_rl.weight_sync.layouts import training_layout
    from megatron_rl.weight_sync.meeting import Rendezvous, ServerMeeting
    from megatron_rl.weight_sync.publish import shards_of
    from megatron_rl.weight_sync.shards import ShardSender
    from megatron_rl.weight_sync.whole import WholeSender

    config = tiny_config(
        model, *training.get("overrides", ()), **{k: v for k, v in training.items() if k != "overrides"}
    )
    policy = build_policy(config)
    rendezvous = Rendezvous(
        "127.0.0.1", "gloo", 20.0, BUCKET_BYTES, lambda layout: where(layout, dist.get_world_size())
    )
    layout, meeting = training_layout(config, policy.shape), ServerMeeting(rendezvous, policy.groups.cpu_group)
    common = {"form": servers.form, "device": torch.device("cpu")}
    sender: Any
    if servers.is_whole:

        def tensors() -> Iterator[tuple[str, Tensor]]:
            return iterate_hf_tensors(policy.chunks, policy.shape, policy.groups)

        sender = WholeSender(tensors, policy.shape, layout, meeting, **common)
    else:
        sender = ShardSender(lambda: shards_of(policy.trainable), policy.shape, layout, meeting, **common)
    served = servers.layout
    post = servers.poster() if dist.get_rank() == 0 else None

    def send(*numbers: int) -> dict[int, Delivery]:
        return sender.send(numbers, served, post=post)

    return script(policy, sender, send, servers)


def twice(policy, sender, send, servers) -> list:  # type: ignore[no-untyped-def]
    first = send(*range(servers.layout.num_servers))
    names = sender._meeting.group_names()
    with torch.no_grad():
        for chunk in policy.chunks:
            for parameter in chunk.parameters():
                parameter.mul_(2)
    second = send(*range(servers.layout.num_servers))
    assert sender._meeting.group_names() == names, "a healthy group is kept"
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
    ("family", "tied", "training", "rollout", "where"),
    [
        ("qwen3", False, {"tp": 2, "pp": 2}, RolloutLayout(num_servers=1, tp_size=2), apart),
        ("qwen2", True, {"pp": 2, "vpp": 2}, RolloutLayout(num_servers=1, tp_size=2), together),
        ("qwen2", True, {"tp": 4}, RolloutLayout(num_servers=2, tp_size=2), together),
        ("qwen3", False, {"tp": 2, "pp": 2}, RolloutLayout(num_servers=2, tp_size=2), on_two_nodes),
        (
            "llama",
            True,
            {"dp": 2, "pp": 2},
            RolloutLayout(num_servers=1, tp_size=8),
            on_two_nodes,
        ),  # key-value heads repeated
        (
            "qwen3_moe",
            False,
            {"tp": 2, "dp": 2, "sp": True, "overrides": EXPERTS},
            RolloutLayout(1, tp_size=2, ep_size=2),
            apart,
        ),
        ("qwen3_moe", False, {"dp": 2, "overrides": EXPERTS}, RolloutLayout(1, tp_size=2), together),
    ],
    ids=["tp2-pp2", "vpp", "two-servers", "stages-on-two-nodes", "tp8", "experts", "experts-cut"],
)
def test_servers_hold_what_the_checkpoint_says(
    models: Callable[..., Path], servers: Callable[..., Servers], family: str, tied: bool, training: dict,
    rollout: RolloutLayout, where: Where,
) -> None:  # fmt: skip
    model = models(family, tied=tied)
    receivers = servers(model, rollout)
    world_size = math.prod(training.get(axis, 1) for axis in ("tp", "pp", "dp"))
    for first, second, metrics in run_ranks(as_trainer, world_size, model, training, receivers, twice, where):
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


@pytest.mark.parametrize(
    ("family", "training", "rollout", "where", "power_of_two"),
    [
        ("qwen3", {"tp": 4}, RolloutLayout(1, tp_size=2), together, False),  # blocks cut between trainer ranks
        ("qwen3", {"tp": 2, "pp": 2}, RolloutLayout(2, tp_size=1), on_two_nodes, True),
        (
            "qwen3_moe",
            {"tp": 2, "dp": 2, "sp": True, "overrides": EXPERTS},
            RolloutLayout(1, 2, ep_size=2),
            apart,
            False,
        ),
    ],
    ids=["cut-blocks", "two-nodes", "experts"],
)
def test_servers_of_eight_bits_hold_what_the_whole_tensors_would_give(
    tmp_path: Path, servers: Callable[..., Servers], family: str, training: dict, rollout: RolloutLayout, where: Where,
    power_of_two: bool,
) -> None:  # fmt: skip
    sizes = {
        "hidden_size": 256,
        "intermediate_size": 768,
        "num_attention_heads": 8,
        "num_key_value_heads": 4,
        "head_dim": 64,
    }
    if family == "qwen3_moe":
        sizes |= {"moe_intermediate_size": 256}
    model = make_tiny_model(tmp_path / "model", family, tied=False, seed=11, num_hidden_layers=2, **sizes)  # type: ignore[arg-type]
    fmt = Fp8Format("block", power_of_two)
    receivers = servers(model, rollout, ServedForm("float32", fmt))
    world_size = math.prod(training.get(axis, 1) for axis in ("tp", "pp", "dp"))
    for first, second, _ in run_ranks(as_trainer, world_size, model, training, receivers, twice, where):
        assert {d.state for d in (*first.values(), *second.values())} == {"proven"}, first
    checkpoint = load_file(model / "model.safetensors")
    for number, factor in ((0, 1), (1, 2)):
        wanted = dict(quantized(((name, factor * tensor) for name, tensor in checkpoint.items()), fmt))
        for server in range(rollout.num_servers):
            for tp_rank in range(rollout.tp_size):
                held = receivers.held(server, number, tp_rank)
                forms = set()
                for parameter in served_parameters(receivers.shape, rollout, tp_rank, fp8=fmt):
                    forms.add(parameter.form)
                    for part in parameter.boxes:
                        mine = held[parameter.name][box(part.start, part.size)]
                        whole = wanted[part.hf_name][box(part.hf_start, part.size)]
                        assert mine.dtype == whole.dtype
                        assert torch.equal(mine.contiguous().view(torch.uint8), whole.contiguous().view(torch.uint8))
                assert forms == {"trained", "fp8", "scales"}


def with_a_nan(policy, sender, send, servers) -> str:  # type: ignore[no-untyped-def]
    """One rank's weights hold a NaN."""
    if sender._rank == 1:
        with torch.no_grad():
            next(p for chunk in policy.chunks for n, p in chunk.named_parameters() if "linear_proj" in n)[3, 4] = float(
                "nan"
            )
    try:
        send(0)
    except UserError as error:
        return str(error)
    return ""


def test_weights_that_eight_bits_cannot_express_are_an_error_on_all_ranks(
    tmp_path: Path, servers: Callable[..., Servers]
) -> None:
    sizes = {
        "hidden_size": 256,
        "intermediate_size": 512,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "head_dim": 64,
    }
    model = make_tiny_model(tmp_path / "model", "qwen3", tied=False, seed=11, num_hidden_layers=2, **sizes)  # type: ignore[arg-type]
    receivers = servers(model, RolloutLayout(1, 1), ServedForm("float32", Fp8Format("block")))
    for told in run_ranks(as_trainer, 2, model, {"tp": 2}, receivers, with_a_nan):
        assert "o_proj" in told and "not finite" in told


@pytest.mark.parametrize(
    ("family", "training", "rollout", "where"),
    [
        ("qwen2", {"tp": 2, "pp": 2}, RolloutLayout(2, tp_size=2), on_two_nodes),
        ("qwen3_moe", {"dp": 2, "overrides": EXPERTS}, RolloutLayout(1, tp_size=2), apart),
        ("deepseek_v3", {"dp": 2}, RolloutLayout(1, tp_size=2), half_apart),
    ],
    ids=["two-nodes", "apart", "half-apart"],
)
def test_whole_tensors_reach_every_rank(
    models: Callable[..., Path], servers: Callable[..., Servers], family: str, training: dict, rollout: RolloutLayout,
    where: Where,
) -> None:  # fmt: skip
    model = models(family, tied=False)
    receivers = servers(model, rollout, is_whole=True)
    world_size = math.prod(training.get(axis, 1) for axis in ("tp", "pp", "dp"))
    for first, second, _ in run_ranks(as_trainer, world_size, model, training, receivers, twice, where):
        assert {d.state for d in (*first.values(), *second.values())} == {"loaded"}, (first, second)
    checkpoint = load_file(model / "model.safetensors")
    for number, factor in ((0, 1), (1, 2)):
        for server in range(rollout.num_servers):
            for tp_rank in range(rollout.tp_size):
                held = receivers.held(server, number, tp_rank)
                assert held.keys() == checkpoint.keys()
                for name, tensor in checkpoint.items():
                    is_buffer = name.endswith("e_score_correction_bias")  # the updates double parameters only
                    assert torch.equal(held[name], tensor * (1 if is_buffer else factor)), name


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
    """One bit of one bucket of rank 1 is another on the way, once."""
    from megatron_rl.weight_sync import outlets

    honest, count = outlets.LocalOutlet.hand_on, [0]

    def flip(outlet: outlets.LocalOutlet, number: int, num_bytes: int) -> None:
        count[0] += 1
        if count[0] == 3 and sender._rank == 1:
            flat = outlet.room(number)
            flat.view(torch.int32)[num_bytes // 8] ^= 1 << 12
        honest(outlet, number, num_bytes)

    outlets.LocalOutlet.hand_on = flip  # type: ignore[method-assign]
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
    import torch.distributed as dist

    from megatron_rl.process import activity

    honest, count = activity.beat, [0]

    def kill() -> None:
        count[0] += 1
        if count[0] == 4 and dist.get_rank() == 0:
            os.kill(servers.processes[1].pid, signal.SIGKILL)
            time.sleep(0.2)
        honest()

    activity.beat = kill
    started = time.monotonic()
    first = send(0, 1)
    seconds = time.monotonic() - started
    return [first, send(1), seconds]


@pytest.mark.parametrize("where", [apart, together])
@pytest.mark.parametrize("is_whole", [False, True], ids=["shards", "whole"])
def test_a_server_that_dies_in_between_holds_nobody_up(
    models: Callable[..., Path], servers: Callable[..., Servers], where: Where, is_whole: bool
) -> None:
    model = models("qwen3", tied=False)
    receivers = servers(model, RolloutLayout(2, 2), is_whole=is_whole)
    for first, second, seconds in run_ranks(as_trainer, 2, model, {"tp": 2}, receivers, with_a_dead_rank, where):
        good = "loaded" if is_whole else "proven"
        assert first[0].state == "failed" and first[1].state == good and second[1].state == good
        assert seconds < 15


def once(policy, sender, send, servers) -> Delivery:  # type: ignore[no-untyped-def]
    return send(0)[0]


def test_parameters_that_are_cut_otherwise_are_told_before_anything_is_sent(
    models: Callable[..., Path], servers: Callable[..., Servers]
) -> None:
    model = models("qwen3", tied=False)
    receivers = servers(model, RolloutLayout(1, 2), spoil="model.layers.1.self_attn.qkv_proj.weight")
    for delivery in run_ranks(as_trainer, 2, model, {"tp": 2}, receivers, once):
        assert delivery.state == "unfit" and "layers.1.self_attn.qkv_proj.weight is [3, 64] float32" in delivery.detail


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

"""Shards to shards on one machine, against raw copies of the same bytes between the same processes.

    python benchmarks/weight_sync.py [--layers 12] [--repeats 3] [--way memory] [--device cpu]

Ways: ``memory``, as between ranks of one machine: shared memory, or with ``--device cuda`` handles of the first GPU's memory;
``network``, as between machines: gloo, or with ``--device cuda`` NCCL and a GPU for each of the six processes.

Processes stand where the trainer's ranks (TP2 x PP2) and the server's (TP2) do, and hold parameters of Qwen2.5-0.5B's sizes in
bfloat16. In turn: ``raw``, each pair's bytes at once: by memory one copy into a shared buffer and one out of it, by network one
message; ``shards``, a whole update by the code that servers run, which compares digests of both ends. Times are those of the
slowest process. The last line is JSON: ``throughput_vs_raw`` (1 is raw speed), ``digests_equal``, ``digest_vs_transfer``.
"""

from __future__ import annotations

import argparse
import json
import multiprocessing
import os
import queue
import statistics
import sys
import threading
import time
from collections import Counter
from concurrent.futures import Future
from multiprocessing.queues import Queue
from typing import Any

import torch
import torch.distributed as dist

from megatron_rl.convert.architecture.shape import ModelShape
from megatron_rl.convert.tables.kinds import shard_shape
from megatron_rl.convert.tables.table import entries
from megatron_rl.weight_sync.meeting import Rendezvous, ServerMeeting
from megatron_rl.weight_sync.network import make_group, receive, send, wait_for
from megatron_rl.weight_sync.pieces import ServedForm, TrainingLayout
from megatron_rl.weight_sync.places import GpuPlace, Places
from megatron_rl.weight_sync.plan import make_plan
from megatron_rl.weight_sync.receiver import take
from megatron_rl.weight_sync.served import RolloutLayout, served_parameters
from megatron_rl.weight_sync.shards import ShardSender
from megatron_rl.weight_sync.shared import BucketReader, BucketWriter, BufferPool

TRAINING = TrainingLayout(tp_size=2, pp_size=2)
ROLLOUT = RolloutLayout(num_servers=1, tp_size=2)
FORM, DTYPE = ServedForm("bfloat16"), torch.bfloat16
BUCKET_BYTES = 2**26
NUM_RANKS = TRAINING.num_ranks


def model_of(num_layers: int) -> ModelShape:
    """Qwen2.5-0.5B with fewer or more layers."""
    return ModelShape(
        family="qwen2", num_layers=num_layers, hidden_size=896, num_attention_heads=14, num_key_value_heads=2, head_dim=64,
        intermediate_size=4864, vocab_size=151936, tied=True, norm_eps=1e-6, rope_theta=1e6, rope_scaling=None,
        qkv_bias=True, proj_bias=False, mlp_bias=False, qk_norm=False, max_position_embeddings=32768,
        initializer_range=0.02, dtype="bfloat16", bos_token_id=None, eos_token_ids=(), pad_token_id=None,
    )  # fmt: skip


def places_of(way: str, *, is_cpu: bool) -> Places:
    """Put all ranks on one machine, or the server's on another."""
    gpu = None if is_cpu else 0
    far = 1 if way == "network" else 0
    return Places((GpuPlace(0, gpu),) * NUM_RANKS, (GpuPlace(far, gpu),) * ROLLOUT.tp_size)


def trainer_parameters(shape: ModelShape, rank: int) -> dict[str, torch.Tensor]:
    """Random shards of one trainer rank, by global Megatron name; ranks that hold the same have equal ones."""
    found = {}
    for number, entry in enumerate(entries(shape).values()):
        stage = TRAINING.stage_of(entry, shape.num_layers)
        for cut, size, ranks in TRAINING.shards(entry, shape):
            if rank - stage * TRAINING.ranks_per_stage in ranks and not entry.is_copy:
                generator = torch.Generator().manual_seed(100 * number + cut)
                extent = shard_shape(entry.kind, shape, size)
                found[entry.name] = torch.empty(extent, dtype=DTYPE).normal_(generator=generator)
    return found


def pairs_of(shape: ModelShape, places: Places) -> Counter[tuple[int, int]]:
    """Return the bytes of each (trainer rank, server rank)."""
    plan = make_plan(shape, TRAINING, ROLLOUT, places, FORM, bucket_bytes=BUCKET_BYTES)
    found: Counter[tuple[int, int]] = Counter()
    for stream in plan.streams:
        for carried in stream.carried:
            for taker in carried.takers:
                found[stream.sender, taker] += carried.bundle.num_bytes
    return found


class Served(torch.nn.Module):
    """The parameters of a server rank, whose names have dots."""

    def __init__(self, shape: ModelShape, tp_rank: int, device: torch.device) -> None:
        """Fill them with zeros."""
        super().__init__()
        expected = served_parameters(shape, ROLLOUT, tp_rank)
        self.held = {p.name: torch.nn.Parameter(torch.zeros(p.shape, dtype=DTYPE, device=device)) for p in expected}
        if shape.tied:
            self.held.pop("lm_head.weight", None)

    def named_parameters(self, *_: Any, **__: Any) -> Any:
        """Yield them."""
        yield from self.held.items()


def work(
    rank: int,
    port: int,
    shape: ModelShape,
    repeats: int,
    way: str,
    kind: str,
    inbox: list[Any],
    done: Any,
    results: Any,
) -> None:
    """Be one process, a trainer's rank or a server's."""
    torch.set_num_threads(1)
    device = torch.device("cpu") if kind == "cpu" else torch.device("cuda", rank if way == "network" else 0)
    if device.type == "cuda":
        torch.cuda.set_device(device)
    tp_rank, world_size = rank - NUM_RANKS, NUM_RANKS + ROLLOUT.tp_size
    is_trainer = tp_rank < 0
    store = dist.TCPStore("127.0.0.1", port, world_size, is_master=False)
    backend = "gloo" if kind == "cpu" or way == "memory" else "nccl"
    everyone = make_group(backend, store, "all", rank, world_size, host="127.0.0.1", timeout_s=300.0)
    places = places_of(way, is_cpu=kind == "cpu")
    totals = pairs_of(shape, places)
    mine = {pair: n for pair, n in totals.items() if pair[0] == rank or pair[1] == tp_rank}
    flats = {pair: torch.ones(n, dtype=torch.uint8, device=device) for pair, n in mine.items()}
    shared: dict[tuple[int, int], Any] = {}
    if way == "memory":
        for pair, size in mine.items():
            if is_trainer:
                shared[pair] = BucketWriter(1, size, BufferPool(device))
                store.set(f"raw/{pair}", json.dumps(shared[pair].handle()))
            else:
                shared[pair] = BucketReader(json.loads(store.get(f"raw/{pair}")), 0)
    rounds: dict[tuple[int, int], int] = dict.fromkeys(mine, 0)

    def meet(key: str) -> None:
        store.add(key, 1)
        while store.add(key, 0) < world_size:
            time.sleep(0.0005)

    def raw() -> None:
        works = []
        for pair, flat in flats.items():
            number = rounds[pair]
            rounds[pair] += 1
            if way == "network":
                works.append(
                    send(everyone, flat, NUM_RANKS + pair[1], 0) if is_trainer else receive(everyone, flat, pair[0], 0)
                )
            elif is_trainer:
                shared[pair].buffer(number).copy_(flat)
                shared[pair].publish(number)
            else:
                while not shared[pair].is_there(number):
                    time.sleep(0.0002)
                flat.copy_(shared[pair].buffer(number))
                shared[pair].done(number)
        for each in works:
            wait_for(everyone, each, 300.0)
        if device.type == "cuda":
            torch.cuda.synchronize()

    for number in range(1 + repeats):
        meet(f"raw{number}")
        started = time.perf_counter()
        raw()
        results.put(("raw", number, time.perf_counter() - started))
    meet("raw is done")
    flats.clear()
    shared.clear()
    if not is_trainer:
        model = Served(shape, tp_rank, device)
        for _ in range(1 + repeats):
            take(model, inbox[tp_rank].get(), tp_rank)
            done.put(tp_rank)
        return
    dist.init_process_group("gloo", store=dist.PrefixStore("trainer", store), rank=rank, world_size=NUM_RANKS)
    assert dist.group.WORLD is not None
    parameters = {name: tensor.to(device) for name, tensor in trainer_parameters(shape, rank).items()}
    rendezvous = Rendezvous("127.0.0.1", "gloo" if kind == "cpu" else "nccl", 300.0, BUCKET_BYTES, lambda _: places)
    meeting = ServerMeeting(rendezvous, dist.group.WORLD)
    sender = ShardSender(lambda: parameters, shape, TRAINING, meeting, form=FORM, device=device)

    def post(server: int, payload: bytes) -> Future[str | None]:
        for box in inbox:
            box.put(payload)
        future: Future[str | None] = Future()

        def wait() -> None:
            for _ in inbox:
                done.get()
            future.set_result(None)

        threading.Thread(target=wait, daemon=True).start()
        return future

    for number in range(1 + repeats):
        outcome = sender.send([0], ROLLOUT, post=post if rank == 0 else None)
        if rank == 0:
            figures = {name.removeprefix("weight_sync/"): value for name, value in sender.metrics.items()}
            results.put(
                ("shards", number, figures | {"equal": outcome[0].state == "proven", "total": sum(totals.values())})
            )
    dist.barrier()


def main() -> None:
    """Start the processes, print what they measured."""
    parser = argparse.ArgumentParser()
    parser.add_argument("--layers", type=int, default=12, help="an even number: there are two pipeline stages")
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--way", choices=["memory", "network"], default="memory")
    parser.add_argument("--device", choices=["cpu", "cuda"], default="cpu")
    arguments = parser.parse_args()
    context = multiprocessing.get_context("spawn")
    results: Queue[Any] = context.Queue()
    inbox, done = [context.Queue() for _ in range(ROLLOUT.tp_size)], context.Queue()
    shape, count = model_of(arguments.layers), arguments.repeats
    # Held here from the start: a port that was merely free is another program's before the first process has imported torch.
    store = dist.TCPStore("127.0.0.1", 0, is_master=True, wait_for_workers=False)
    given = [
        (rank, store.port, shape, count, arguments.way, arguments.device, inbox, done, results)
        for rank in range(NUM_RANKS + ROLLOUT.tp_size)
    ]
    os.environ["OMP_NUM_THREADS"] = "1"
    processes = [context.Process(target=work, args=each, daemon=True) for each in given]
    for process in processes:
        process.start()
    found = []
    while len(found) < (1 + count) * (len(processes) + 1):
        try:
            found.append(results.get(timeout=1))
        except queue.Empty:
            if failed := [process.exitcode for process in processes if process.exitcode]:
                for process in processes:
                    process.kill()
                sys.exit(f"a process has ended with status {failed[0]}")
    for process in processes:
        process.join()
    # The first round of each touches memory for the first time.
    raw = [
        max(seconds for what, n, seconds in found if what == "raw" and n == number) for number in range(1, 1 + count)
    ]
    shards = [figures for what, number, figures in found if what == "shards" and number > 0]
    gigabytes = shards[0]["total"] / 1e9
    times = {
        "raw": raw,
        "shards": [max(figures["receive_s"], figures["send_s"]) for figures in shards],
        "digests": [figures["digest_s"] for figures in shards],
    }
    print(f"{gigabytes:.2f} GB between {NUM_RANKS} trainer ranks and a server of {ROLLOUT.tp_size}, by {arguments.way}")
    for name, all_of_it in times.items():
        seconds = statistics.median(all_of_it)
        print(f"{name:8} {seconds:7.2f} s  {gigabytes / seconds:6.2f} GB/s   all: {[round(t, 2) for t in all_of_it]}")
    median = {name: statistics.median(values) for name, values in times.items()}
    line = {
        "throughput_vs_raw": round(median["raw"] / median["shards"], 3),
        "digests_equal": all(figures["equal"] for figures in shards),
        "digest_vs_transfer": round(median["digests"] / median["shards"], 3),
        "gigabytes": round(gigabytes, 3),
        "way": arguments.way,
        "device": arguments.device,
    }
    print(json.dumps(line))


if __name__ == "__main__":
    main()

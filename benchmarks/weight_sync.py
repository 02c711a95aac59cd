"""Shards to shards on one machine, against raw sends and receives of the same bytes between the same processes.

    python benchmarks/weight_sync.py [--layers 12] [--repeats 3] [--backend gloo]

Backends: ``gloo`` between CPUs; ``nccl`` with a GPU for each of the six processes; ``ipc`` by handles, all on the first GPU
(without one: through shared memory, to try the script).

Processes stand where the trainer's ranks (TP2 x PP2) and the server's (TP2) do, and hold parameters of Qwen2.5-0.5B's sizes in
bfloat16. In turn: ``raw``, each pair's bytes as one message from and into memory that is already there; ``shards``, the plan's
messages from parameters into parameters. Then the digests of both ends, which are compared. Times are those of the slowest
process. The last line is JSON: ``throughput_vs_raw`` (1 is raw speed), ``digests_equal``, ``digest_vs_transfer``.
"""

from __future__ import annotations

import argparse
import json
import multiprocessing
import socket
import statistics
import time
from collections import Counter
from collections.abc import Callable
from multiprocessing.queues import Queue

import torch
import torch.distributed as dist

from megatron_rl.convert.architecture.shape import ModelShape
from megatron_rl.convert.tables.kinds import shard_shape
from megatron_rl.convert.tables.table import entries, hf_tensors
from megatron_rl.weight_sync.messages import Message, digest_overlaps, make_messages, receive_messages, send_messages
from megatron_rl.weight_sync.plan import TrainingLayout, make_plan
from megatron_rl.weight_sync.receiver import make_group
from megatron_rl.weight_sync.served import RolloutLayout, served_parameters

TRAINING = TrainingLayout(tp_size=2, pp_size=2)
ROLLOUT = RolloutLayout(num_servers=1, tp_size=2)
DTYPE = torch.bfloat16


def model_of(num_layers: int) -> ModelShape:
    """Qwen2.5-0.5B with fewer or more layers."""
    return ModelShape(
        family="qwen2", num_layers=num_layers, hidden_size=896, num_attention_heads=14, num_key_value_heads=2, head_dim=64,
        intermediate_size=4864, vocab_size=151936, tied=True, norm_eps=1e-6, rope_theta=1e6, rope_scaling=None,
        qkv_bias=True, proj_bias=False, mlp_bias=False, qk_norm=False, max_position_embeddings=32768,
        initializer_range=0.02, dtype="bfloat16", bos_token_id=None, eos_token_ids=(), pad_token_id=None,
    )  # fmt: skip


def trainer_parameters(shape: ModelShape, rank: int) -> dict[str, torch.Tensor]:
    """Random shards of one trainer rank, by global Megatron name."""
    found = {}
    generator = torch.Generator().manual_seed(rank)
    for entry in entries(shape).values():
        for _, size, ranks in TRAINING.holders(entry, shape):
            if rank in ranks and not entry.is_copy:
                extent = shard_shape(entry.kind, shape, size)
                # Ranks have equal copies of what is replicated.
                seed = generator if entry.kind.name != "replicated" else torch.Generator().manual_seed(hash(extent))
                found[entry.name] = torch.empty(extent, dtype=DTYPE).normal_(generator=seed)
    return found


def work(
    rank: int, port: int, shape: ModelShape, repeats: int, backend: str, results: Queue[dict[str, object]]
) -> None:
    """One process, a trainer's rank or a server's."""
    torch.set_num_threads(1)
    device = torch.device("cpu")
    if backend != "gloo" and torch.cuda.is_available():
        device = torch.device("cuda", rank if backend == "nccl" else 0)
        torch.cuda.set_device(device)
    world_size = TRAINING.num_ranks + ROLLOUT.tp_size
    store = dist.TCPStore("127.0.0.1", port, world_size, is_master=rank == 0)
    dist.init_process_group("gloo", store=dist.PrefixStore("world", store), rank=rank, world_size=world_size)
    group = make_group(backend, store, "transfer", rank, world_size, host="127.0.0.1", timeout_s=300.0)
    plan = make_plan(shape, TRAINING, ROLLOUT)
    messages = make_messages(plan, bucket_elements=2**23)
    tp_rank = rank - TRAINING.num_ranks
    is_sender = tp_rank < 0
    if is_sender:
        parameters = trainer_parameters(shape, rank)
    else:
        served = served_parameters(shape, ROLLOUT, tp_rank)
        parameters = {p.name: torch.zeros(p.shape, dtype=DTYPE) for p in served}
    parameters = {name: tensor.to(device) for name, tensor in parameters.items()}
    totals: Counter[tuple[int, int]] = Counter()
    for message in messages:
        totals[message.sender, message.receiver] += message.num_elements
    flats = {
        pair: torch.ones(n, dtype=DTYPE, device=device)
        for pair, n in totals.items()
        if pair[0] == rank or pair[1] == tp_rank
    }

    def raw() -> None:
        works = []
        for (sender, receiver), flat in flats.items():
            if is_sender:
                works.append(group.send([flat], TRAINING.num_ranks + receiver, 0))
            else:
                works.append(group.recv([flat], sender, 0))
        for each in works:
            each.wait()

    def shards() -> None:
        if is_sender:
            mine = [message for message in messages if message.sender == rank]

            def send(flat: torch.Tensor, message: Message) -> dist.Work:
                return group.send([flat], TRAINING.num_ranks + message.receiver, message.tag)

            for _ in send_messages(mine, parameters, dtype=DTYPE, send=send):
                pass
        else:
            mine = [message for message in messages if message.receiver == tp_rank]
            receive_messages(
                mine,
                parameters,
                dtype=DTYPE,
                receive=lambda flat, message: group.recv([flat], message.sender, message.tag),
            )

    extents, digests = hf_tensors(shape), torch.zeros(len(plan.overlaps), dtype=torch.int64)
    senders = {copy.overlap.index: copy.sender for copy in plan.copies}

    def prove() -> None:
        overlaps = [p for p in plan.overlaps if (senders[p.index] == rank if is_sender else p.tp_rank == tp_rank)]
        found = digest_overlaps(overlaps, parameters, extents, dtype=DTYPE, is_sender=is_sender)
        for overlap, value in zip(overlaps, found):
            digests[overlap.index] = value - 2**64 if value >= 2**63 else value

    def timed(what: Callable[[], None]) -> float:
        dist.barrier()
        started = time.perf_counter()
        what()
        if device.type == "cuda":
            torch.cuda.synchronize(device)
        seconds = torch.tensor(time.perf_counter() - started, dtype=torch.float64)
        dist.all_reduce(seconds, dist.ReduceOp.MAX)
        return float(seconds)

    timed(raw), timed(shards)  # first touch of memory
    times: dict[str, list[float]] = {"raw": [], "shards": [], "digest": []}
    for _ in range(repeats):
        for name, what in (("raw", raw), ("shards", shards), ("digest", prove)):
            times[name].append(timed(what))
    both = [torch.zeros_like(digests) for _ in range(world_size)]
    dist.all_gather(both, digests)
    sent, held = sum(both[: TRAINING.num_ranks]), sum(both[TRAINING.num_ranks :])
    if rank == 0:
        results.put(
            {
                "times": times,
                "bytes": sum(totals.values()) * DTYPE.itemsize,
                "messages": len(messages),
                "equal": torch.equal(sent, held) and bool(sent.ne(0).all()),
            }
        )
    dist.barrier()


def main() -> None:
    """Start the processes, print what they measured."""
    parser = argparse.ArgumentParser()
    parser.add_argument("--layers", type=int, default=12)
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--backend", choices=["gloo", "nccl", "ipc"], default="gloo")
    arguments = parser.parse_args()
    context = multiprocessing.get_context("spawn")
    results: Queue[dict[str, object]] = context.Queue()
    shape = model_of(arguments.layers)
    with socket.create_server(("127.0.0.1", 0)) as free:
        port = free.getsockname()[1]
    ranks = range(TRAINING.num_ranks + ROLLOUT.tp_size)
    given = [(rank, port, shape, arguments.repeats, arguments.backend, results) for rank in ranks]
    processes = [context.Process(target=work, args=each, daemon=True) for each in given]
    for process in processes:
        process.start()
    found: dict = results.get(timeout=900)
    for process in processes:
        process.join()
    times = {name: statistics.median(values) for name, values in found["times"].items()}
    gigabytes = found["bytes"] / 1e9
    print(f"{gigabytes:.2f} GB in {found['messages']} messages between 4 trainer ranks and a server of 2")
    for name, seconds in times.items():
        print(
            f"{name:8} {seconds:7.2f} s  {gigabytes / seconds:6.2f} GB/s   all: {[round(t, 2) for t in found['times'][name]]}"
        )
    line = {
        "throughput_vs_raw": round(times["raw"] / times["shards"], 3),
        "digests_equal": found["equal"],
        "digest_vs_transfer": round(times["digest"] / times["shards"], 3),
        "gigabytes": round(gigabytes, 3),
        "backend": arguments.backend,
    }
    print(json.dumps(line))


if __name__ == "__main__":
    main()

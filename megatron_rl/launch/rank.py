"""Set-up and end of a rank: its threads, its process group, its log file, its exit status."""

from __future__ import annotations

import contextlib
import hashlib
import json
import os
import socket
import sys
import threading
import time
import traceback
import uuid
import warnings
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass
from datetime import timedelta
from pathlib import Path
from typing import Any, TextIO

import torch
import torch.distributed as dist
from torch.distributed.rendezvous import rendezvous

import megatron_rl.patches
from megatron_rl.config import Config, installed, shown
from megatron_rl.errors import UserError
from megatron_rl.files import disk_errors
from megatron_rl.launch.command import GPU_ALLOCATOR
from megatron_rl.launch.reach import check_ranks_reach_each_other, limit_below
from megatron_rl.metrics import terminal
from megatron_rl.parallel.agree import all_ranks_agree, are_all_here, broadcast_json, gather_json
from megatron_rl.process import activity, lifetime, watchdog
from megatron_rl.process.network import keep_gloo_on, own_address
from megatron_rl.process.output import open_output
from megatron_rl.process.run_key import FILE, VARIABLE, WAY_OUT, draw_key, given_key, write_key
from megatron_rl.process.signed_store import UNSIGNED, SignedStore, answer, find_key

_store: SignedStore | None = None
"""The default group's store, which lives as long as the process."""


@dataclass(frozen=True)
class Runtime:
    """A rank's place among the others, and its device."""

    rank: int
    world_size: int
    device: torch.device


def run_rank(config: Config, work: Callable[[Runtime], None]) -> int:
    """Set a rank up, do its work, and end it cleanly: one message for the user, a status, no process or file left behind.

    A ``UserError`` is raised by all ranks alike; the first rank of each node prints it, and ranks above 0 put it into
    their logs. Anything else is a defect: its traceback goes to the rank's log (rank 0: the console), and the launcher
    ends the other ranks. The watchdog ends all ranks of a run that hangs.

    Args:
        config: the run's.
        work: the rank's work, called with the process group in place.

    Returns:
        Exit status: 0, or 2 for something that the user can fix.
    """
    lifetime.die_with(os.getppid())  # if a launcher is killed, no orphan trains on
    rank, world_size = int(os.environ.get("RANK", 0)), int(os.environ.get("WORLD_SIZE", 1))
    console = _console(rank)
    device, problem = torch.device("cpu"), None
    try:
        try:
            device = _set_up(config, rank, world_size)
        except UserError as error:
            if world_size == 1:
                raise
            problem = error
        for package in ("megatron", "torch"):  # our users cannot act on what libraries lack or deprecate
            warnings.filterwarnings("ignore", module=package)
        megatron_rl.patches.apply(device.type)
        runtime = Runtime(rank, world_size, device)
        _meet(config, runtime, problem)
        work(runtime)
    except UserError as error:
        if console is not None:
            print(f"error: {error}", file=console, flush=True)
        if rank > 0:  # to its log: should this rank alone have failed, the launcher points there
            with contextlib.suppress(OSError):  # the error may be that the disk is full
                os.write(2, f"error: {error}\n".encode())
        have_all_spoken = _wait_for_others_to_speak()
        if have_all_spoken and console is None and "TORCHELASTIC_RUN_ID" in os.environ:
            time.sleep(10.0)  # cut short by the launcher, who shall see the rank that has spoken go first
        watchdog.stop()
        return 2
    except Exception as error:
        traceback.print_exc()
        sys.stderr.flush()
        watchdog.report_failure(error, rank)
        # Leave at once: the others may wait for this rank in a collective, and torch's own clean-up would wait for them.
        os._exit(1)
    dist.destroy_process_group()
    watchdog.stop()
    return 0


def _set_up(config: Config, rank: int, world_size: int) -> torch.device:
    """Set up what needs no other rank: log, watchdog, device."""
    logs = config.exp_manager.run_dir / "logs"
    if rank > 0:
        with _writing(logs):
            _log_to_file(logs / f"rank_{rank}.log")
    _check_world_size(config, world_size)
    # Started before the ranks meet: a rank that never arrives is a hang as well.
    with _writing(logs):
        watchdog.start(logs, rank=rank, world_size=world_size, timeout_s=config.trainer.hang_timeout_s)
    terminal.listen(activity.beat)
    device = _device(config)
    if device.type == "cpu":
        torch.set_num_threads(config.trainer.num_threads)
    return device


def _meet(config: Config, runtime: Runtime, problem: UserError | None) -> None:
    """Join the other ranks, and agree with them that the run can start.

    Args:
        config: the run's, as this rank has read it.
        runtime: this rank.
        problem: the reason why this rank cannot start. It joins nevertheless to report it: otherwise the ranks of other
            nodes, whose launchers know nothing of it, would wait for it until their time limit.
    """
    if not dist.is_initialized():  # a test may bring ranks of its own
        _join_others(config, runtime)
    assert dist.group.WORLD is not None
    _check_same_config(config)
    with all_ranks_agree(dist.group.WORLD):
        if problem is not None:
            raise problem
    if config.trainer.num_nodes > 1:
        _check_shared_folder(config, runtime.rank)
    if runtime.device.type == "cuda":
        trainer = config.trainer
        hang_s = None if trainer.hang_timeout_s is None else max(trainer.hang_timeout_s, watchdog.SETUP_S)
        limit_s = limit_below(trainer.timeout_s, hang_s)
        check_ranks_reach_each_other(
            num_nodes=trainer.num_nodes, devices=trainer.devices, device=runtime.device, limit_s=limit_s
        )


def _check_same_config(config: Config) -> None:
    """Check that all ranks have one config: a node with another file or overrides would train something else, or hang."""
    text = json.dumps(shown(config, with_digests=True), sort_keys=True, default=str)
    assert dist.group.WORLD is not None
    digests = gather_json(hashlib.blake2b(text.encode()).hexdigest(), dist.group.WORLD)
    if len(set(digests)) > 1:  # the same on all ranks, so either all of them gather the rest or none
        raise difference([json.loads(text) for text in gather_json(text, dist.group.WORLD)])


def difference(configs: Sequence[dict[str, Any]]) -> UserError:
    """Say which key differs first between rank 0 and another rank, and name all other such keys.

    Args:
        configs: resolved config of each rank, as nested dicts; at least one differs.
    """
    flat = [dict(_leaves(config)) for config in configs]
    keys = sorted({key for of_rank in flat for key in of_rank})
    keys = [key for key in keys if any(of_rank.get(key) != flat[0].get(key) for of_rank in flat)]
    first = keys[0]
    values = [of_rank.get(first) for of_rank in flat]
    theirs = next(value for value in values if value != values[0])
    ranks = ", ".join(str(rank) for rank, value in enumerate(values) if value == theirs)
    further = f" (also different: {', '.join(keys[1:])})" if keys[1:] else ""
    return UserError(
        first,
        None,
        f"rank 0 has {values[0]!r}, rank {ranks} {theirs!r}, and all nodes must run the same config{further}",
        "start every node with the same YAML file and the same overrides",
    )


def _leaves(tree: dict[str, Any], prefix: str = "") -> Iterator[tuple[str, Any]]:
    for key, value in tree.items():
        if isinstance(value, dict):
            yield from _leaves(value, f"{prefix}{key}.")
        else:
            yield f"{prefix}{key}", value


def _check_shared_folder(config: Config, rank: int) -> None:
    """Check that every node sees one folder: all ranks write parts of a checkpoint and read the watchdog's files."""
    assert dist.group.WORLD is not None
    folder = config.exp_manager.run_dir
    # A fresh name: file systems remember for a while that a file did not exist.
    mark = folder / f".seen_by_all.{broadcast_json(uuid.uuid4().hex, dist.group.WORLD)}"
    with all_ranks_agree(dist.group.WORLD):
        if rank == 0:
            with disk_errors(folder, field="exp_manager.exp_dir"):
                folder.mkdir(parents=True, exist_ok=True)
                mark.touch()
    try:
        with all_ranks_agree(dist.group.WORLD):
            if not mark.exists():
                raise UserError(
                    "exp_manager.exp_dir",
                    str(folder),
                    f"rank {rank} on {socket.gethostname()} does not see there what rank 0 has written",
                    "choose a folder on a file system that all nodes share, by its full path",
                )
    finally:
        if rank == 0:
            mark.unlink(missing_ok=True)


def _wait_for_others_to_speak() -> bool:
    """Wait for all ranks: a launcher ends its ranks once one has exited, and an exit breaks connections.

    Returns:
        True if all came; False if this rank alone has failed.
    """
    return dist.group.WORLD is not None and are_all_here(dist.group.WORLD, 5.0)


def _join_others(config: Config, runtime: Runtime) -> None:
    os.environ.setdefault("MASTER_ADDR", "127.0.0.1")
    os.environ.setdefault("MASTER_PORT", "29500")
    if config.trainer.num_nodes > 1:
        _check_meeting_address(config.trainer.num_nodes, os.environ["MASTER_ADDR"])
    keep_gloo_on(own_address(config.trainer.num_nodes, *config.rollout.servers.hosts))
    timeout = timedelta(seconds=config.trainer.timeout_s)
    store, rank, world_size = next(rendezvous("env://", runtime.rank, runtime.world_size, timeout=timeout))
    store.set_timeout(timeout)
    global _store
    _store = SignedStore(store, given_key() or _key_among_ranks(config, runtime, store))
    backend = "cpu:gloo,cuda:nccl" if runtime.device.type == "cuda" else "gloo"
    try:
        dist.init_process_group(backend, store=_store, rank=rank, world_size=world_size, timeout=timeout)
    except RuntimeError as error:
        if UNSIGNED not in str(error):
            raise
        rule = f"is another key on {socket.gethostname()} than where other ranks run, or a stranger writes into their store"
        raise UserError(VARIABLE, None, rule, WAY_OUT) from error


def _key_among_ranks(config: Config, runtime: Runtime, store: dist.Store) -> bytes:
    """Return the key of a start without our launcher: rank 0, which holds the folder, writes one and proves it."""
    if runtime.world_size == 1:
        return draw_key()
    folder, limit_s, prefix = config.exp_manager.run_dir, config.trainer.timeout_s, "run key"
    if runtime.rank > 0:
        return find_key(dist.PrefixStore(prefix, store), folder / FILE, str(runtime.rank), limit_s)
    key, own = write_key(folder), dist.PrefixStore(prefix, store.clone())  # type: ignore[attr-defined]

    def answer_all() -> None:
        waiting, end = list(range(1, runtime.world_size)), time.monotonic() + limit_s
        while waiting and time.monotonic() < end:
            waiting = [rank for rank in waiting if not answer(own, key, str(rank))]
            time.sleep(0.05)

    # Meanwhile this rank goes on to where a missing rank is noticed, and named.
    threading.Thread(target=answer_all, name="run-key", daemon=True).start()
    return key


def _check_meeting_address(num_nodes: int, master: str) -> None:
    """Check that node 0's name leads to an address that other machines reach, unless all nodes are said to be on this one."""
    field, host = "MASTER_ADDR", socket.gethostname()
    name_it = (
        "give --rdzv-endpoint (or MASTER_ADDR) an IPv4 address of node 0 in the nodes' network, the same on every node"
    )
    try:
        address = own_address(num_nodes)
    except OSError as error:
        rule = f"leads {host} to no IPv4 address ({error.strerror}), and gloo's and the servers' addresses are such"
        raise UserError(field, master, rule, name_it) from error
    if address.startswith("127.") and master != "localhost" and not master.startswith("127."):
        rule = f"leads {host} to its own loopback, where no other machine reaches it: mostly a line 127.0.1.1 of /etc/hosts"
        raise UserError(field, master, rule, f"{name_it}, or take its name off that line")


def _device(config: Config) -> torch.device:
    wanted = config.trainer.accelerator
    if wanted != "cpu" and not torch.cuda.is_available():
        _check_no_gpu_is_missed(wanted)
    if wanted == "cpu" or not torch.cuda.is_available():
        return torch.device("cpu")
    _check_enough_gpus(config, torch.cuda.device_count())
    _check_allocator(config)
    device = torch.device("cuda", int(os.environ.get("LOCAL_RANK", 0)))
    torch.cuda.set_device(device)
    capability, built_for = torch.cuda.get_device_capability(device), torch.cuda.get_arch_list()
    installed.check_kernels(torch=torch.__version__, capability=capability, built_for=built_for)
    if config.policy.megatron_cfg.get("transformer_impl") != "local":
        installed.check_engine_here(torch=torch.__version__, cuda=str(torch.version.cuda))
    if config.rollout.starts_servers:
        installed.check_server_here()
    return device


def _check_enough_gpus(config: Config, count: int) -> None:
    devices, rollout = config.trainer.devices, config.rollout
    if devices > count:
        raise UserError(
            "trainer.devices",
            devices,
            f"every rank needs a GPU of its own, and torch sees {count} here",
            "lower it, make more GPUs visible, or set trainer.accelerator=cpu",
        )
    servers = rollout.servers
    is_beside = config.needs_engine and rollout.starts_servers and not rollout.is_colocated
    if not is_beside or devices + rollout.gpus_per_node <= count:
        return
    raise UserError(
        "rollout.servers.num_per_node",
        servers.num_per_node,
        f"our servers take {rollout.gpus_per_node} GPUs of a node after the trainer's {devices}, and torch sees {count} here",
        "lower it, trainer.devices or rollout.sglang_cfg.tp_size, make more GPUs visible, or set its placement=colocated",
    )


def _check_allocator(config: Config) -> None:
    for name in GPU_ALLOCATOR if config.needs_engine and config.rollout.is_colocated else ():
        if "expandable_segments:true" in (value := os.environ.get(name, "")).lower():
            rule = "colocated servers open the trainer's weights by CUDA IPC, which containers forbid for such segments"
            raise UserError(name, value, rule, f"unset {name}, or take expandable_segments out of it")


def _check_no_gpu_is_missed(wanted: str) -> None:
    """Refuse a start on CPUs where a GPU is asked for, or where torch is built for GPUs and cannot use the one there is."""
    has_device = installed.platform() == "gpu"
    cuda, driver = torch.version.cuda, installed.driver_cuda()
    if wanted == "gpu" or (has_device and cuda):
        why = installed.why_no_gpu(torch=torch.__version__, cuda=cuda, driver=driver, has_device=has_device)
        rule, fix = why or ("torch sees no GPU here", "see nvidia-smi and CUDA_VISIBLE_DEVICES")
        raise UserError("trainer.accelerator", wanted, rule, f"{fix}; or set trainer.accelerator=cpu")


def _check_world_size(config: Config, world_size: int) -> None:
    if world_size != config.trainer.world_size:
        raise UserError(
            "trainer.devices",
            config.trainer.devices,
            f"devices * num_nodes = {config.trainer.world_size}, but torchrun started {world_size} processes",
            "start with megatron-rl train, or make --nproc-per-node and --nnodes agree with the config",
        )


def _console(rank: int) -> TextIO | None:
    """Return the stream for messages to the user, for one rank of each node; it works after output goes to the log."""
    if int(os.environ.get("LOCAL_RANK", rank)) > 0:
        return None
    return sys.stderr if rank == 0 else open_output(os.dup(2))


def _writing(folder: Path) -> AbstractContextManager[None]:
    return disk_errors(folder, field="exp_manager.exp_dir", fix="give a folder that every rank can write")


def _log_to_file(path: Path) -> None:
    """Send this process's output, that of libraries included, to a file; the console belongs to rank 0."""
    path.parent.mkdir(parents=True, exist_ok=True)
    descriptor = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_APPEND | os.O_NOFOLLOW, 0o644)
    os.dup2(descriptor, 1)
    os.dup2(descriptor, 2)
    os.close(descriptor)

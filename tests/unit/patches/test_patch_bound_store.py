"""Stores of torch listen on the address that they are given."""

from __future__ import annotations

import socket
import subprocess
import sys
from datetime import timedelta
from pathlib import Path

import pytest
import torch.distributed as dist

from megatron_rl.patches.pytorch import bound_store

ROOT = Path(__file__).parents[3]
TIMEOUT = timedelta(seconds=5)


def addresses(port: int) -> set[str]:
    """Local addresses on which something listens on a port, as the kernel writes them."""
    found = set()
    for table in ("/proc/net/tcp", "/proc/net/tcp6"):
        with open(table) as lines:
            for line in list(lines)[1:]:
                _, local, _, state, *_ = line.split()
                address, number = local.rsplit(":", 1)
                if state == "0A" and int(number, 16) == port:
                    found.add(address)
    return found


LOOPBACK = {"0100007F"}


def test_torchs_own_listens_everywhere() -> None:
    """What the patch is for; when this fails the patch can go."""
    store = bound_store.BoundStore.__mro__[1]("127.0.0.1", 0, is_master=True, wait_for_workers=False, timeout=TIMEOUT)
    assert addresses(store.port) != LOOPBACK


def test_ours_listens_on_its_address() -> None:
    store = bound_store.BoundStore("127.0.0.1", 0, is_master=True, wait_for_workers=False, timeout=TIMEOUT)
    assert addresses(store.port) == LOOPBACK
    client = dist.TCPStore("127.0.0.1", store.port, is_master=False, timeout=TIMEOUT)
    client.set("key", "value")
    assert store.get("key") == b"value"


def test_a_taken_port_is_an_error() -> None:
    with socket.create_server(("127.0.0.1", 0)) as taken, pytest.raises(OSError):
        bound_store.BoundStore("127.0.0.1", taken.getsockname()[1], is_master=True, timeout=TIMEOUT)


def test_groups_and_launchers_use_it() -> None:
    code = """
import megatron_rl.patches.pytorch as ours
ours.apply()
import torch.distributed as dist, torch.distributed.rendezvous, sys
from torch.distributed.elastic.rendezvous import static_tcp_rendezvous as static
names = {m.TCPStore.__name__ for m in (dist, sys.modules["torch.distributed.rendezvous"], static)}
dist.init_process_group("gloo", init_method="tcp://127.0.0.1:0", rank=0, world_size=1)
from tests.unit.patches.test_patch_bound_store import addresses
print(*names, *addresses(dist.distributed_c10d._get_default_store().underlying_store.underlying_store.port))
"""
    run = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True, cwd=ROOT)
    assert run.stdout.split() == ["BoundStore", *LOOPBACK]

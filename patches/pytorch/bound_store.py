"""A TCPStore that listens on the address it is given, and on no other.

Why: ``TCPStore(host, port, is_master=True)`` listens on all addresses of the machine whatever ``host`` is, so the stores of
    torchrun, of process groups and of SGLang's schedulers are open to the whole network, also in runs on one machine.
Upstream: ``torch.distributed.TCPStore`` and the modules that import its name: ``torch.distributed.rendezvous``,
    ``torch.distributed.elastic.rendezvous.static_tcp_rendezvous``.
Versions: 2.11.0 - 2.13.0
Remove when: torch binds the store of a master to its host name.
Tested by: tests/unit/patches/test_patch_bound_store.py
"""

from __future__ import annotations

import inspect
from typing import Any

import torch.distributed as dist
from torch.distributed import rendezvous
from torch.distributed.elastic.rendezvous import static_tcp_rendezvous

from megatron_rl.process.network import listening_socket

_PARAMETERS = (
    "host_name", "port", "world_size", "is_master", "timeout", "wait_for_workers", "multi_tenant", "master_listen_fd",
    "use_libuv",
)  # fmt: skip


class BoundStore(dist.TCPStore):
    """``TCPStore`` with a listening socket of our own."""

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        given = dict(zip(_PARAMETERS, args)) | kwargs
        if given.get("is_master") and given.get("master_listen_fd") is None:
            listener = listening_socket(given["host_name"], given.get("port", 0))
            given |= {"port": listener.getsockname()[1], "master_listen_fd": listener.detach()}
        super().__init__(**given)


def apply() -> None:
    """Put ``BoundStore`` in the place of ``TCPStore``. Harmless when repeated."""
    for module in (dist, inspect.getmodule(rendezvous), static_tcp_rendezvous):
        vars(module)["TCPStore"] = BoundStore

"""Ports that are held for programs we start, and the address under which others reach this machine."""

from __future__ import annotations

import os
import socket


class HeldPort:
    """A port for a program that we start, kept from everybody else until ``close``.

    A server takes many seconds from its start to its own ``bind``, and a port that was merely free before is another
    program's by then. This one is bound and never listened on: the kernel hands it to nobody, and lets a program that asks
    for it by number bind beside us where both set SO_REUSEADDR, as servers do.
    """

    def __init__(self, host: str, number: int = 0) -> None:
        """Take it.

        Args:
            host: address to listen on.
            number: 0 takes any.

        Raises:
            OSError: somebody listens there.
        """
        self._socket = socket.socket()
        self._socket.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            self._socket.bind((host, number))
        except OSError:
            self._socket.close()
            raise
        self.number = int(self._socket.getsockname()[1])

    def close(self) -> None:
        """Give it up. Harmless when repeated."""
        self._socket.close()


def own_address(num_nodes: int, *peers: str) -> str:
    """Under which address others reach this machine: loopback, unless there are other nodes or a peer elsewhere.

    Args:
        num_nodes: of the trainer.
        peers: host names or addresses of servers.
    """
    elsewhere = [peer for peer in peers if peer != "localhost" and not peer.startswith("127.")]
    if num_nodes > 1:
        elsewhere.append(os.environ.get("MASTER_ADDR", "127.0.0.1"))
    if not elsewhere:
        return "127.0.0.1"
    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as probe:  # sends nothing; the kernel chooses a route
        probe.connect((elsewhere[0], 9))
        return str(probe.getsockname()[0])

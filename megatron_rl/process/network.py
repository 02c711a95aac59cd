"""Ports held for the programs we start, and the address under which others reach this machine."""

from __future__ import annotations

import os
import socket


class HeldPort:
    """A port reserved for a program that we start, until ``close``.

    A server takes many seconds from its start to its own ``bind``, and a port that was merely free before is another
    program's by then. This one is bound and never listened on: the kernel hands it to nobody, and lets a program that asks
    for it by number bind beside us where both set SO_REUSEADDR, as servers do.
    """

    def __init__(self, host: str, number: int = 0) -> None:
        """Reserve the port.

        Args:
            host: address to listen on.
            number: 0 takes any.

        Raises:
            OSError: a program listens there.
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
        """Release the port. Safe to call twice."""
        self._socket.close()


def own_address(num_nodes: int, *peers: str) -> str:
    """Return the address under which others reach this machine: loopback if every node and peer is on it.

    Args:
        num_nodes: number of the trainer's nodes.
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

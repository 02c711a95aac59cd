"""Ports held for the programs we start, sockets that listen on one address, and the address by which others reach us."""

from __future__ import annotations

import errno
import ipaddress
import logging
import os
import socket
from typing import Any

import psutil

logger = logging.getLogger(__name__)
_GLOO_INTERFACE = "GLOO_SOCKET_IFNAME"
_BACKLOG = 4096
"""Connections that may wait to be accepted: all ranks of a large run come at once."""


class HeldPort:
    """A port reserved for a program that we start, until ``close``.

    A server takes many seconds from its start to its own ``bind``, and a port that was merely free before is another
    program's by then, or that of another user who waits for what we send there. This one is bound with SO_REUSEPORT and never
    listened on: the kernel lets only sockets that set the option too, of the same user, bind beside it (``socket_beside``).
    """

    def __init__(self, host: str, number: int = 0) -> None:
        """Reserve the port.

        Args:
            host: address to listen on.
            number: 0 takes any.

        Raises:
            OSError: a program listens there, or holds the port.
        """
        if number:  # a listener of this user that sets SO_REUSEPORT itself would let us in
            _bound(host, number, socket.SO_REUSEADDR).close()
        self._socket = _bound(host, number, socket.SO_REUSEPORT)
        self.number = int(self._socket.getsockname()[1])
        _held[self.number] = self._socket

    def close(self) -> None:
        """Release the port. Safe to call twice."""
        _held.pop(self.number, None)
        self._socket.close()


_held: dict[int, socket.socket] = {}
"""Ports that this process holds, for ``listening_socket``."""


def socket_beside(host: str, port: int) -> socket.socket:
    """Return a bound socket on a port that a ``HeldPort`` of this user may hold.

    Raises:
        OSError: the port is taken.
    """
    return _bound(host, port, socket.SO_REUSEADDR, socket.SO_REUSEPORT)


def _bound(host: str, port: int, *options: int) -> socket.socket:
    family = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM)[0][0]
    found = socket.socket(family)
    try:
        for option in options:
            found.setsockopt(socket.SOL_SOCKET, option, 1)
        found.bind((host, port))
    except OSError:
        found.close()
        raise
    return found


def free_port(host: str) -> int:
    """Return a port that nobody listens on now, for a program that cannot be given one that is held for it."""
    with socket.create_server((host, 0)) as listener:
        return int(listener.getsockname()[1])


def listening_socket(host: str, port: int = 0) -> socket.socket:
    """Return a socket that listens on one address.

    Args:
        host: name or address; nothing else on this machine listens then.
        port: 0 takes any; one that this process holds is listened on where it is held.

    A name that means nothing on this machine (the address of a cluster's service in front of it), or that its own host table
    maps to loopback although others use it, leaves no single address: the socket then listens on all, and a warning says so.

    Raises:
        OSError: the port is taken, or the name is unknown.
    """
    if port in _held:
        listener = _held[port].dup()
        listener.listen(_BACKLOG)
        return listener
    found = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM)
    for family, _, _, _, address in found:
        if ipaddress.ip_address(address[0]).is_loopback and not _names_loopback(host):
            continue
        try:
            return _listen(family, address)
        except OSError as error:
            if error.errno != errno.EADDRNOTAVAIL:
                raise
    logger.warning("%s is no address of this machine's own: port %d listens on all of its addresses", host, port)
    return socket.create_server(("", port), backlog=_BACKLOG)


def _listen(family: int, address: tuple[Any, ...]) -> socket.socket:
    listener = socket.socket(family, socket.SOCK_STREAM)
    try:
        listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        listener.bind(address)
        listener.listen(_BACKLOG)
    except OSError:
        listener.close()
        raise
    return listener


def _names_loopback(host: str) -> bool:
    return host in ("localhost", "::1") or host.startswith("127.")


def keep_gloo_on(address: str) -> None:
    """Let gloo's groups use the interface of one of this machine's addresses, unless the environment names an interface.

    By itself gloo takes the address of the host's name, which on many machines is loopback.
    """
    for interface, addresses in psutil.net_if_addrs().items():
        if address in {each.address for each in addresses}:
            os.environ.setdefault(_GLOO_INTERFACE, interface)
            return


def keep_gloo_on_loopback() -> None:
    """Let gloo's groups listen on loopback alone, whatever the environment says: all ranks are on this machine."""
    loopback = "lo"
    if loopback in {name for _, name in socket.if_nameindex()}:
        os.environ[_GLOO_INTERFACE] = loopback


def own_address(num_nodes: int, *peers: str) -> str:
    """Return the address under which others reach this machine: loopback if every node and peer is on it.

    Args:
        num_nodes: number of the trainer's nodes.
        peers: host names or addresses of servers.
    """
    elsewhere = [peer for peer in peers if not _names_loopback(peer)]
    if num_nodes > 1:
        elsewhere.append(os.environ.get("MASTER_ADDR", "127.0.0.1"))
    if not elsewhere:
        return "127.0.0.1"
    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as probe:  # sends nothing; the kernel chooses a route
        probe.connect((elsewhere[0], 9))
        return str(probe.getsockname()[0])

"""A stranger who knows addresses and ports of a run: ``python attacker.py [USER] < what it knows > what it got``, both as JSON.

It becomes another user of the machine once it has imported what it needs, or runs in another network namespace.
"""

from __future__ import annotations

import encodings.idna  # noqa: F401  found in its folder now: another user may not read that
import http.client
import json
import os
import socket
import sys
from contextlib import suppress
from datetime import timedelta
from pathlib import Path
from typing import Any

import torch.distributed as dist

WRONG_KEYS = ("", "Bearer ", "Bearer wrong", "Basic d3Jvbmc6d3Jvbmc=")


def main() -> None:
    knows = json.load(sys.stdin)
    for user in sys.argv[1:]:
        os.setgroups([])
        os.setgid(int(user))
        os.setuid(int(user))
    got: dict[str, Any] = {"reachable": [], "answered": [], "stores": {}, "files": [], "sockets": []}
    for host, port in knows["ports"]:
        if not can_connect(host, port):
            continue
        got["reachable"].append([host, port])
        if [host, port] in knows["servers"]:
            got["answered"] += ask_all(host, port, knows["routes"])
            got["sockets"] += [port] if opens_a_socket(host, port) else []
        else:
            with suppress(OSError), socket.create_connection((host, port), timeout=2) as garbage:
                garbage.sendall(os.urandom(64))
    for host, port in knows["stores"]:
        if can_connect(host, port):
            got["stores"][f"{host}:{port}"] = spoil(host, port)
    for name in knows["files"]:
        with suppress(OSError):
            if knows["mark"] in Path(name).read_bytes().decode(errors="replace"):
                got["files"].append(name)
    json.dump(got, sys.stdout)


def can_connect(host: str, port: int) -> bool:
    with suppress(OSError), socket.create_connection((host, port), timeout=2):
        return True
    return False


def ask(host: str, port: int, method: str, path: str, authorization: str | None, **headers: str) -> int | None:
    """The status of an answer; None where nothing answers in HTTP."""
    connection = http.client.HTTPConnection(host, port, timeout=30)
    if authorization is not None:
        headers["Authorization"] = authorization
    try:
        body = b"{}" if method == "POST" else None
        connection.request(method, path, body, {"Content-Type": "application/json", **headers})
        return connection.getresponse().status
    except (OSError, http.client.HTTPException):
        return None
    finally:
        connection.close()


def ask_all(host: str, port: int, routes: list[tuple[str, str]]) -> list[Any]:
    """Every route that answered with anything but a refusal."""
    answered = []
    for method, path in routes:
        for key in (None, *WRONG_KEYS) if path == "/server_info" else (None, WRONG_KEYS[2]):
            if (status := ask(host, port, method, path, key)) not in (401, 403):
                answered.append([path, method, key, status])
    return answered


def opens_a_socket(host: str, port: int) -> bool:
    upgrade = {"Connection": "Upgrade", "Upgrade": "websocket", "Sec-WebSocket-Version": "13"}
    upgrade["Sec-WebSocket-Key"] = "AAAAAAAAAAAAAAAAAAAAAA=="
    return ask(host, port, "GET", "/v1/realtime", None, **upgrade) == 101


def spoil(host: str, port: int) -> list[str]:
    """Write over all that is in a store, and over what may be asked for later; returns the names of what was there."""
    store = dist.TCPStore(host, port, is_master=False, wait_for_workers=False, timeout=timedelta(seconds=10))
    names = list(store.list_keys())
    for name in names:
        with suppress(RuntimeError):
            store.set(name, "forged")
    return names


if __name__ == "__main__":
    main()

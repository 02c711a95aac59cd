"""Ports kept for programs that take long to start."""

from __future__ import annotations

import asyncio
import os
import socket
import subprocess
import sys

import pytest
from aiohttp import web

from megatron_rl.process.network import HeldPort, listening_socket, socket_beside

HOST = "127.0.0.1"
STRANGER = """
import os, socket, sys
os.setuid(65534)
for options in ((), (socket.SO_REUSEADDR,), (socket.SO_REUSEPORT,), (socket.SO_REUSEADDR, socket.SO_REUSEPORT)):
    mine = socket.socket()
    for option in options:
        mine.setsockopt(socket.SOL_SOCKET, option, 1)
    try:
        mine.bind(("127.0.0.1", int(sys.argv[1])))
    except OSError:
        continue
    sys.exit(f"bound with {options}")
"""


def test_nobody_else_gets_it() -> None:
    held = HeldPort(HOST)
    with socket.socket() as other, pytest.raises(OSError):
        other.bind((HOST, held.number))
    held.close()
    held.close()
    with socket.socket() as other:
        other.bind((HOST, held.number))


def test_a_server_that_asks_for_it_serves_there_and_can_be_started_again() -> None:
    async def serve() -> None:
        runner = web.AppRunner(web.Application())
        await runner.setup()
        await web.SockSite(runner, socket_beside(HOST, held.number)).start()
        _, writer = await asyncio.open_connection(HOST, held.number)
        writer.close()
        await writer.wait_closed()
        await runner.cleanup()

    held = HeldPort(HOST)
    asyncio.run(serve())
    asyncio.run(serve())
    held.close()


def test_one_that_is_served_already_is_refused() -> None:
    with socket.socket() as other:
        other.bind((HOST, 0))
        other.listen()
        with pytest.raises(OSError):
            HeldPort(HOST, other.getsockname()[1])


def test_one_that_is_held_already_is_refused() -> None:
    held = HeldPort(HOST)
    with pytest.raises(OSError):
        HeldPort(HOST, held.number)
    held.close()


def test_one_that_a_server_of_ours_serves_is_refused() -> None:
    held = HeldPort(HOST)
    with socket_beside(HOST, held.number) as server:
        server.listen()
        held.close()
        with pytest.raises(OSError):
            HeldPort(HOST, held.number)


@pytest.mark.skipif(os.getuid() != 0, reason="only root can become another user")
def test_another_user_cannot_listen_where_a_server_will() -> None:
    held = HeldPort(HOST)
    done = subprocess.run([sys.executable, "-c", STRANGER, str(held.number)], capture_output=True, text=True)
    held.close()
    assert done.returncode == 0, done.stderr


def test_the_process_that_holds_it_can_listen_there_itself() -> None:
    held = HeldPort(HOST)
    with listening_socket(HOST, held.number) as server, socket.create_connection((HOST, held.number), timeout=5):
        held.close()
        connection, _ = server.accept()
        connection.close()

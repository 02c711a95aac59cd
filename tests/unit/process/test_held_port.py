"""Ports kept for programs that take long to start."""

from __future__ import annotations

import asyncio
import socket

import pytest
from aiohttp import web

from megatron_rl.process.network import HeldPort

HOST = "127.0.0.1"


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
        await web.TCPSite(runner, HOST, held.number).start()
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

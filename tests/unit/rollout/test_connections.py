"""Connections to servers: reused at once, given up before the server hangs up."""

from __future__ import annotations

import asyncio

from aiohttp import web

from megatron_rl.rollout.sglang.driver import IDLE_CONNECTION_S, open_session

SERVER_HANGS_UP_S = 5.0
"""SGLang's own default (SGLANG_TIMEOUT_KEEP_ALIVE)."""


def test_an_idle_connection_is_given_up_well_before_the_server_hangs_up() -> None:
    assert IDLE_CONNECTION_S <= SERVER_HANGS_UP_S / 2
    assert asyncio.run(num_connections(pause_s=0.0)) == 1
    assert asyncio.run(num_connections(pause_s=IDLE_CONNECTION_S + 0.3)) == 2


async def num_connections(*, pause_s: float) -> int:
    """Opened by two requests with a pause between them."""
    peers: set[object] = set()

    async def answer(request: web.Request) -> web.Response:
        assert request.transport is not None
        peers.add(request.transport.get_extra_info("peername"))
        return web.Response()

    application = web.Application()
    application.router.add_get("/", answer)
    runner = web.AppRunner(application)
    await runner.setup()
    site = web.TCPSite(runner, "127.0.0.1", 0)
    await site.start()
    host, port = runner.addresses[0][:2]
    async with open_session() as session:
        for seconds in (pause_s, 0.0):
            async with session.get(f"http://{host}:{port}/") as response:
                assert response.status == 200
            await asyncio.sleep(seconds)
    await runner.cleanup()
    return len(peers)

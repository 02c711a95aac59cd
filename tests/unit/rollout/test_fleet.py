"""A server that refuses for want of the right key ends the run, and the error names the field."""

from __future__ import annotations

import asyncio

from aiohttp import ClientSession, web

from megatron_rl.config.rollout import ServersConfig, WeightSyncConfig
from megatron_rl.rollout.sglang.client import SGLangClient
from megatron_rl.rollout.sglang.fleet import Fleet, Server


def test_a_wrong_key_ends_the_run_at_once_and_is_named() -> None:
    async def ask() -> Fleet:
        async def refuse(_request: web.Request) -> web.Response:
            return web.json_response({"error": "Unauthorized"}, status=401)

        application = web.Application()
        application.router.add_route("*", "/{path:.*}", refuse)
        runner = web.AppRunner(application)
        await runner.setup()
        await web.TCPSite(runner, "127.0.0.1", 0).start()
        async with ClientSession() as session:
            client = SGLangClient(f"http://127.0.0.1:{runner.addresses[0][1]}", session, key="wrong")
            fleet = Fleet([Server(0, client)], ServersConfig(), WeightSyncConfig(), check=lambda *_: None)
            fleet.start()
            async with asyncio.timeout(30):
                while fleet.failure is None:
                    await asyncio.sleep(0.01)
            await fleet.stop()
        await runner.cleanup()
        return fleet

    failure = asyncio.run(ask()).failure
    assert "rollout.servers.key_file" in str(failure) and "server 0" in str(failure)

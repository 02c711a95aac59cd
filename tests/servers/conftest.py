"""One real SGLang server for the session, and a proxy that spoils what it says."""

from __future__ import annotations

import asyncio
import json
import tempfile
import threading
import time
import urllib.request
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from aiohttp import ClientSession, web

from megatron_rl.process.child import ChildProcess
from megatron_rl.process.network import HeldPort
from megatron_rl.rollout.sglang.flags import server_command, server_environment
from tests.e2e.conftest import case, tiny_model  # noqa: F401  fixtures

START_S = 240.0
_held: list[HeldPort] = []


def start_server(model: Path, log: Path, **passed: Any) -> tuple[ChildProcess, str]:
    """A server with our flags on a free port; not ready yet."""
    port = hold_port()
    command = server_command(
        passed,
        model_path=str(model),
        dtype=torch.float32,
        is_cpu=True,
        host="127.0.0.1",
        port=port,
        base_gpu_id=0,
        releases_memory=False,
        seed=0,
    )
    size = int(passed.get("tp_size", 1))
    meeting = Path(tempfile.mkdtemp(dir=log.parent)) / "store"
    environment = server_environment(
        key="", port=port, meeting=meeting, is_cpu=True, tensor_parallel_size=size, num_servers=1, num_cores=2
    )
    return ChildProcess(command, log=log, environment=environment), f"http://127.0.0.1:{port}"


def hold_port() -> int:
    """For as long as the tests run."""
    _held.append(HeldPort("127.0.0.1"))
    return _held[-1].number


def wait_until_ready(process: ChildProcess, url: str, log: Path) -> None:
    deadline = time.monotonic() + START_S
    while time.monotonic() < deadline:
        assert process.status() is None, log.read_text()[-3000:]
        try:
            with urllib.request.urlopen(f"{url}/model_info", timeout=2):
                return
        except OSError:
            time.sleep(0.3)
    raise AssertionError(f"no server after {START_S:g} s: {log.read_text()[-3000:]}")


@pytest.fixture(scope="session")
def server(tiny_model: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:  # noqa: F811
    log = tmp_path_factory.mktemp("server") / "log"
    process, url = start_server(tiny_model, log, max_total_tokens=4096)
    try:
        wait_until_ready(process, url, log)
        yield url
    finally:
        process.kill()


Spoil = Callable[[str, int, Any], Any]
"""(path, how many requests this path has had, the server's reply) -> the reply to give, or a ``web.Response``."""


class Proxy:
    """Between the trainer and a real server; ``spoil`` may change what comes back."""

    def __init__(self, target: str, spoil: Spoil) -> None:
        self.target, self.spoil = target, spoil
        self.url = ""
        self.counts: dict[str, int] = {}
        self._ready = threading.Event()
        self._loop = asyncio.new_event_loop()
        self._thread = threading.Thread(target=self._serve, daemon=True)
        self._thread.start()
        assert self._ready.wait(10)

    def close(self) -> None:
        self._loop.call_soon_threadsafe(self._loop.stop)
        self._thread.join(10)

    def _serve(self) -> None:
        asyncio.set_event_loop(self._loop)
        application = web.Application(client_max_size=2**30)
        application.router.add_route("*", "/{path:.*}", self._handle)
        runner = web.AppRunner(application)

        async def start() -> None:
            await runner.setup()
            site = web.TCPSite(runner, "127.0.0.1", 0)
            await site.start()
            self.url = f"http://127.0.0.1:{runner.addresses[0][1]}"
            self._session = ClientSession()
            self._ready.set()

        self._loop.run_until_complete(start())
        self._loop.run_forever()
        self._loop.run_until_complete(self._session.close())
        self._loop.run_until_complete(runner.cleanup())

    async def _handle(self, request: web.Request) -> web.StreamResponse:
        number = self.counts.get(request.path, 0)
        self.counts[request.path] = number + 1
        body = await request.read()
        headers = {key: value for key, value in request.headers.items() if key.lower() == "content-type"}
        async with self._session.request(
            request.method, self.target + request.path, data=body, headers=headers
        ) as answer:
            text = await answer.text()
            try:
                reply = json.loads(text)
            except ValueError:
                return web.Response(text=text, status=answer.status)
            spoiled = self.spoil(request.path, number, reply)
            if isinstance(spoiled, web.Response):
                return spoiled
            return web.json_response(spoiled, status=answer.status)


@pytest.fixture
def proxy(server: str) -> Iterator[Callable[[Spoil], Proxy]]:
    proxies: list[Proxy] = []

    def make(spoil: Spoil) -> Proxy:
        proxies.append(Proxy(server, spoil))
        return proxies[-1]

    yield make
    for made in proxies:
        made.close()

"""An event loop in a thread of its own, so that rank 0 can take part in collectives while requests are in flight."""

from __future__ import annotations

import asyncio
import threading
from collections.abc import Callable, Coroutine
from concurrent.futures import Future
from typing import Any, TypeVar

T = TypeVar("T")


class LoopThread:
    """An event loop in its own thread, from construction to ``close``."""

    def __init__(self) -> None:
        self._loop = asyncio.new_event_loop()
        self._thread = threading.Thread(target=self._loop.run_forever, name="rollout-loop", daemon=True)
        self._thread.start()

    def submit(self, work: Coroutine[Any, Any, T]) -> Future[T]:
        """Start a coroutine. Raises RuntimeError once the loop is closed, since nothing would run it."""
        if not self.is_running:
            work.close()
            raise RuntimeError("the engine is closed")
        return asyncio.run_coroutine_threadsafe(work, self._loop)

    def run(self, work: Coroutine[Any, Any, T]) -> T:
        """Start a coroutine and wait for it."""
        return self.submit(work).result()

    def call(self, function: Callable[[], T]) -> T:
        """Call a plain function in the loop's thread."""

        async def work() -> T:
            return function()

        return self.run(work())

    @property
    def is_running(self) -> bool:
        """False once closed."""
        return self._thread.is_alive()

    def close(self) -> None:
        """Stop the loop; what is still running there is abandoned."""
        self._loop.call_soon_threadsafe(self._loop.stop)
        self._thread.join(timeout=5)

"""The training program, with servers that die or freeze before, in the middle of, and after weight updates."""

from __future__ import annotations

import os
import signal
import sys
from typing import Any

import psutil

from megatron_rl import train

MARK = "MEGATRON_RL_TEST_MARK"
FAULTS = {
    1: ("before", "server", signal.SIGKILL),
    2: ("during", "scheduler", signal.SIGSTOP),
    3: ("after", "server", signal.SIGKILL),
    4: ("before", "server", signal.SIGSTOP),
}
"""By version: when, which process of a server in the update, and the signal."""


def find(number: int, part: str) -> psutil.Process:
    """A server's own process (the one that answers HTTP), or its scheduler."""
    seed = str(7 + number)  # of tests/tiny.yaml; every server has its own
    for process in psutil.process_iter():
        try:
            line = process.cmdline()
            is_mine = "megatron_rl.rollout.sglang_server" in line and process.environ().get(MARK) == os.environ[MARK]
            if is_mine and line[line.index("--random-seed") + 1] == seed:
                children = process.children() if part == "scheduler" else [process]
                return next(each for each in children if part == "server" or "scheduler" in " ".join(each.cmdline()))
        except (psutil.NoSuchProcess, psutil.AccessDenied):
            continue
    raise AssertionError(f"no {part} of server {number}")


def plant() -> None:
    import megatron_rl.patches

    megatron_rl.patches.apply()  # before anything imports Megatron
    from megatron_rl.run import Run
    from megatron_rl.weight_sync import shards

    armed: list[tuple[str, str, signal.Signals]] = []
    honest = {
        "publish": Run.publish, "join": shards.ShardSender._join, "send": shards._Connection.send,
        "conclude": shards.ShardSender._conclude,
    }  # fmt: skip

    def strike(when: str, server: int) -> None:
        if not armed or armed[0][0] != when:
            return
        _, part, how = armed.pop()
        if os.environ["RANK"] == "0":
            find(server, part).send_signal(how)
            print(f"planted: {how.name} to the {part} of server {server}, {when} an update", flush=True)

    def publish(run: Any, *, version: int) -> None:
        armed[:] = [FAULTS[version]] if version in FAULTS else []
        honest["publish"](run, version=version)

    def join(sender: Any, specs: Any, futures: Any) -> Any:
        strike("before", min(specs))
        return honest["join"](sender, specs, futures)

    def send(link: Any, *rest: Any) -> Any:
        strike("during", link.server)
        return honest["send"](link, *rest)

    def conclude(sender: Any, connections: Any, *rest: Any) -> Any:
        deliveries = honest["conclude"](sender, connections, *rest)
        if connections:
            strike("after", connections[0].server)
        return deliveries

    Run.publish = publish  # type: ignore[method-assign, assignment]
    shards.ShardSender._join = join  # type: ignore[method-assign, assignment]
    shards._Connection.send = send  # type: ignore[method-assign, assignment]
    shards.ShardSender._conclude = conclude  # type: ignore[method-assign, assignment]


if __name__ == "__main__":
    plant()
    sys.exit(train.main())

"""The training program with a server that dies before, in the middle of, and after a weight update: versions 1, 2 and 3."""

from __future__ import annotations

import os
import sys
from typing import Any

import psutil

from megatron_rl import train

MARK = "MEGATRON_RL_TEST_MARK"
FAULTS = {1: "before", 2: "during", 3: "after"}


def kill_server() -> None:
    mine = os.environ[MARK]
    for process in psutil.process_iter():
        try:
            if "megatron_rl.rollout.sglang_server" in process.cmdline() and process.environ().get(MARK) == mine:
                process.kill()
        except (psutil.NoSuchProcess, psutil.AccessDenied):
            continue


def plant() -> None:
    import megatron_rl.patches

    megatron_rl.patches.apply()  # before anything imports Megatron
    from megatron_rl.run import Run
    from megatron_rl.weight_sync import shards

    armed: list[str] = []
    honest = {
        "publish": Run.publish, "join": shards.ShardSender._join, "send": shards._Connection.send,
        "conclude": shards.ShardSender._conclude,
    }  # fmt: skip

    def strike(when: str) -> None:
        if when in armed and os.environ["RANK"] == "0":
            kill_server()
            print(f"planted: server killed {when} an update", flush=True)
        if when in armed:
            armed.remove(when)

    def publish(run: Any, *, version: int) -> None:
        armed[:] = [FAULTS[version]] if version in FAULTS else []
        honest["publish"](run, version=version)

    def join(sender: Any, *rest: Any) -> Any:
        strike("before")
        return honest["join"](sender, *rest)

    def send(link: Any, *rest: Any) -> Any:
        strike("during")
        return honest["send"](link, *rest)

    def conclude(sender: Any, *rest: Any) -> Any:
        deliveries = honest["conclude"](sender, *rest)
        strike("after")
        return deliveries

    Run.publish = publish  # type: ignore[method-assign, assignment]
    shards.ShardSender._join = join  # type: ignore[method-assign, assignment]
    shards._Connection.send = send  # type: ignore[method-assign, assignment]
    shards.ShardSender._conclude = conclude  # type: ignore[method-assign, assignment]


if __name__ == "__main__":
    plant()
    sys.exit(train.main())

"""The training program, with servers that die or freeze before, in the middle of, and after weight updates."""

from __future__ import annotations

import json
import os
import signal
import sys
from typing import Any

import psutil

from megatron_rl import train

MARK = "MEGATRON_RL_TEST_MARK"
VARIABLE = "MEGATRON_RL_TEST_FAULTS"
FAULTS = {
    "1": ("during", "scheduler", "SIGSTOP", 1),  # both are up: rank 0, which strikes, sends to the first
    "2": ("before", "server", "SIGKILL", 1),
    "3": ("ending", "server", "SIGKILL", 1),
    "4": ("after", "server", "SIGSTOP", 1),
}
"""By version: when, which process of a server, the signal, and how many servers. ``VARIABLE`` has others as JSON.

Before: rank 0 has trained, and nothing is sent. During: the first bucket. Ending: digests are compared. After: servers serve.
"""


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
    from megatron_rl.weight_sync.meeting import ServerMeeting

    faults = json.loads(os.environ[VARIABLE]) if VARIABLE in os.environ else FAULTS
    armed: list[tuple[str, str, str, int]] = []
    honest = {
        "publish": Run.publish, "gather": shards.gather,
        "conclude": ServerMeeting.conclude, "transfer": shards.ShardSender._transfer,
    }  # fmt: skip
    updated: list[int] = []
    """Servers of the last transfer, which are up."""

    def strike(when: str) -> None:
        if not armed or armed[0][0] != when:
            return
        _, part, how, count = armed.pop()
        for server in sorted(updated)[:count] if os.environ["RANK"] == "0" else ():
            find(server, part).send_signal(signal.Signals[how])
            print(f"planted: {how} to the {part} of server {server}, {when} an update", flush=True)

    def publish(run: Any, *, version: int) -> None:
        armed[:] = [faults[str(version)]] if str(version) in faults else []
        strike("before")
        honest["publish"](run, version=version)
        strike("after")

    def transfer(sender: Any, specs: Any, alive: Any, *rest: Any) -> Any:
        updated[:] = alive
        return honest["transfer"](sender, specs, alive, *rest)

    def gather(*arguments: Any) -> None:
        strike("during")
        honest["gather"](*arguments)

    def conclude(meeting: Any, *rest: Any) -> Any:
        deliveries = honest["conclude"](meeting, *rest)
        strike("ending")
        return deliveries

    Run.publish = publish  # type: ignore[method-assign, assignment]
    shards.gather = gather  # type: ignore[assignment]
    shards.ShardSender._transfer = transfer  # type: ignore[method-assign, assignment]
    ServerMeeting.conclude = conclude  # type: ignore[method-assign, assignment]


if __name__ == "__main__":
    plant()
    sys.exit(train.main())

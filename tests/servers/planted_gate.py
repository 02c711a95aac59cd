"""The training program: notes when the trainer takes and releases memory and servers start, and kills one in an update."""

from __future__ import annotations

import json
import os
import sys
import time
from pathlib import Path
from typing import Any

from megatron_rl import train

sys.path.insert(0, str(Path(__file__).parents[2]))  # a program by path: the folder of the tests is not there by itself
from tests.servers.planted_sync import find

NOTES = "MEGATRON_RL_TEST_NOTES"
"""Names the file that every rank adds its lines to."""
FATAL_UPDATE = 2
"""Update, counted from 1, in which the server is killed."""


def note(what: str) -> None:
    line = json.dumps({"rank": int(os.environ["RANK"]), "what": what, "time": time.monotonic()})
    with Path(os.environ[NOTES]).open("a") as file:
        file.write(line + "\n")


def plant() -> None:
    import megatron_rl.patches

    megatron_rl.patches.apply()  # before anything imports Megatron
    from megatron_rl.model.offload import UpdateMemory
    from megatron_rl.model.trainable import Trainable
    from megatron_rl.rollout.sglang.supervisor import Supervisor

    release, resume, build = UpdateMemory.release, UpdateMemory.resume, Trainable._build_optimizer
    start, update = Supervisor._start, Trainable.update

    def noted_build(trainable: Any, *args: Any) -> None:
        note("takes")
        build(trainable, *args)

    def noted_release(memory: UpdateMemory) -> int:
        freed = release(memory)
        note("released")
        return freed

    def noted_resume(memory: UpdateMemory, **how: Any) -> None:
        note("takes")
        resume(memory, **how)

    def noted_start(supervisor: Supervisor, server: Any) -> None:
        before = server.process
        start(supervisor, server)
        if server.process is not before:
            note("server starts")

    def fatal_update(trainable: Any, *args: Any) -> Any:
        done = update(trainable, *args)
        if trainable.num_updates == FATAL_UPDATE and os.environ["RANK"] == "0":
            find(0, "server").kill()
            note("server killed")
            time.sleep(3.0)  # far longer than a supervisor needs to start it again
        return done

    Trainable._build_optimizer = noted_build  # type: ignore[method-assign]
    UpdateMemory.release = noted_release  # type: ignore[method-assign]
    UpdateMemory.resume = noted_resume  # type: ignore[method-assign]
    Supervisor._start = noted_start  # type: ignore[method-assign]
    Trainable.update = fatal_update  # type: ignore[method-assign]


if __name__ == "__main__":
    plant()
    sys.exit(train.main())

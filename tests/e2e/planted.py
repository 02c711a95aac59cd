"""The training program with a fault in it: ``PLANTED=<kind>:<rank>:<step>``, in the loss of that step on that rank.

    sleep           never comes back
    skip            leaves a barrier out that the other ranks enter
    stop            SIGSTOP to itself
    kill            SIGKILL to itself
    raise           an exception
    late            never comes to meet the others (step is ignored)

The time is left in the file PLANTED_AT.
"""

from __future__ import annotations

import os
import signal
import sys
import time
from pathlib import Path

from megatron_rl import train
from megatron_rl.process import watchdog


def plant(kind: str, culprit: int, step: int) -> None:
    import megatron_rl.patches

    megatron_rl.patches.apply()  # before anything imports Megatron
    import torch.distributed as dist

    from megatron_rl.run import Run

    rank = int(os.environ["RANK"])
    steps = Run.steps

    def steps_with_fault(run: Run):  # type: ignore[no-untyped-def]
        barrier = dist.new_group(backend="gloo")
        algorithm = run.algorithm
        loss = algorithm.loss
        now = 0

        def loss_with_fault(*args, **kwargs):  # type: ignore[no-untyped-def]
            if now == step:
                misbehave()
            return loss(*args, **kwargs)

        def misbehave() -> None:
            if kind == "skip" and rank != culprit:
                dist.barrier(group=barrier)
            if rank != culprit:
                return
            leave_time()
            if kind == "sleep":
                time.sleep(3600)
            if kind == "stop":
                time.sleep(2)  # so that the others have seen it in this phase
                os.kill(os.getpid(), signal.SIGSTOP)
            if kind == "kill":
                os.kill(os.getpid(), signal.SIGKILL)
            if kind == "raise":
                raise RuntimeError("planted")

        algorithm.loss = loss_with_fault  # type: ignore[method-assign]
        for index in steps(run):
            now = index + 1
            yield index

    Run.steps = steps_with_fault  # type: ignore[assignment, method-assign]


def leave_time() -> None:
    Path(os.environ["PLANTED_AT"]).write_text(str(time.time()))


def stay_away() -> None:
    from megatron_rl.launch import rank as runtime

    def never(*_: object) -> None:
        leave_time()
        time.sleep(3600)

    runtime._join_others = never  # type: ignore[assignment]


if __name__ == "__main__":
    kind, culprit, step = os.environ["PLANTED"].split(":")
    if kind != "late":
        plant(kind, int(culprit), int(step))
    else:
        watchdog.SETUP_S = 20.0
        if os.environ["RANK"] == culprit:
            stay_away()
    sys.exit(train.main())

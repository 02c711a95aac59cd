"""``python -m megatron_rl.launch <torchrun arguments>``: torchrun, with one line instead of a traceback when ranks fail.

The rank has already said why. Signals end the launcher at any time without a traceback:

    SIGTERM, SIGHUP    until there are ranks: as any program; then torchrun passes the signal on, and ranks die of it
    SIGINT (Ctrl-C)    the same, but ranks get SIGTERM, since SIGINT is a traceback in Python; a second one waits for nobody
    SIGKILL            ranks die with the launcher

Signals that the starter had ignored stay so: nohup, or a job in the background of a script.
"""

from __future__ import annotations

import os
import signal
import socket
import sys
from types import FrameType
from typing import TYPE_CHECKING

from megatron_rl.errors import UserError
from megatron_rl.launch.meeting import read_back
from megatron_rl.launch.node_watch import NodeWatch, key_of_this_start
from megatron_rl.process import scratch
from megatron_rl.process.hang_report import HANG
from megatron_rl.process.lifetime import INTERRUPTED, PARENT_VARIABLE, leave
from megatron_rl.process.network import HeldPort
from megatron_rl.process.run_key import VARIABLE as KEY_VARIABLE

if TYPE_CHECKING:
    from torch.distributed.elastic.multiprocessing.errors import ProcessFailure

_is_interrupted = False


def main() -> int:
    """Run torchrun, and return the exit status: 0; 2 what a user can fix; 4 a hang; 1 a failure; 128 + N ended by signal N."""
    os.environ[PARENT_VARIABLE] = str(os.getpid())  # ranks end with us from their first second on
    os.environ["PYTHONSAFEPATH"] = "1"  # to them, as -P is to us
    handled = [name for name in ("SIGTERM", "SIGHUP", "SIGQUIT") if _is_heard(name)]
    if _is_heard("SIGINT"):
        signal.signal(signal.SIGINT, _interrupt)
    arguments = sys.argv[1:]
    meeting, num_nodes, timeout_s = read_back(arguments)
    try:
        scratch.use_own_folder()
    except OSError as error:
        rule, fix = f"takes no folder of ours ({error.strerror})", "free some space there, or set it to another folder"
        print(f"error: {UserError('TMPDIR', error.filename, rule, fix)}", file=sys.stderr)
        return 2
    watch = held = None
    if meeting is not None:
        _import_torch_quietly()
        from torch.distributed import DistError

        try:
            key = key_of_this_start(meeting, timeout_s)
        except (UserError, DistError) as error:
            is_ours = isinstance(error, UserError)
            print(f"error: {error if is_ours else _not_met(error)}", file=sys.stderr, flush=True)
            return 2 if is_ours else 1
        os.environ[KEY_VARIABLE] = key.hex()
        watch = NodeWatch(meeting, num_nodes, timeout_s, key)
    elif "--standalone" in arguments:
        # torchrun's own meeting for one node keeps pickles in a store; anybody who reached it could run code here.
        held = HeldPort("127.0.0.1")
        alone = ["--nnodes=1", "--node-rank=0", "--master-addr=127.0.0.1", f"--master-port={held.number}"]
        arguments = [*alone, *(argument for argument in arguments if argument != "--standalone")]
    status, message = _run_torchrun([f"--signals-to-handle={','.join(handled)}", *arguments], watch)
    for name in handled:  # what torchrun does on them wants ranks
        signal.signal(signal.Signals[name], signal.SIG_DFL)
    if sys.stdout.isatty():
        print("\x1b[?25h", end="")  # the cursor, which a rank that died during a progress bar has hidden
    if message:
        print(f"error: {message}", file=sys.stderr, flush=True)
    if watch is not None:
        watch.leave(status)
        if status not in (0, 2) and watch.verdict is None and (lost := watch.first_lost()):
            print(f"error: {lost}", file=sys.stderr, flush=True)
    return status


def _is_heard(name: str) -> bool:
    return signal.getsignal(signal.Signals[name]) is not signal.SIG_IGN


def _interrupt(_: int, frame: FrameType | None) -> None:
    """End by Ctrl-C."""
    global _is_interrupted
    end_ranks = signal.getsignal(signal.SIGTERM)  # torchrun's way, once it starts ranks
    if _is_interrupted or not callable(end_ranks):
        leave(INTERRUPTED)
    _is_interrupted = True
    end_ranks(signal.SIGTERM, frame)


def _import_torch_quietly() -> None:
    """A store that ends with its node is nothing that torch's C++ side need report, with its stack, from the launchers.

    It reads its level when it is loaded; ranks keep theirs.
    """
    name = "TORCH_CPP_LOG_LEVEL"
    before = os.environ.get(name)
    os.environ[name] = before or "ERROR"
    import torch  # noqa: F401

    if before is None:
        del os.environ[name]


def _run_torchrun(arguments: list[str], watch: NodeWatch | None) -> tuple[int, str | None]:
    """Return the exit status and a message about it."""
    import logging

    from torch.distributed import DistError
    from torch.distributed.elastic.multiprocessing.api import SignalException
    from torch.distributed.elastic.multiprocessing.errors import ChildFailedError
    from torch.distributed.elastic.rendezvous.api import RendezvousError
    from torch.distributed.run import main as torchrun

    import megatron_rl.patches.pytorch

    logging.getLogger("torch.distributed.elastic").setLevel(logging.CRITICAL)
    # These have levels of their own. The first complains that torchrun has no parent to give our message to, the second
    # repeats the signal that we report.
    for name in ("multiprocessing.errors.error_handler", "agent.server.api"):
        logging.getLogger(f"torch.distributed.elastic.{name}").setLevel(logging.CRITICAL)
    try:
        megatron_rl.patches.pytorch.apply()
        torchrun(arguments)
    except ChildFailedError as error:
        rank, failure = min(error.failures.items(), key=lambda item: _distance_from_cause(item[1]))
        status = failure.exitcode if failure.exitcode > 0 else 1
        if status == 2:  # a UserError, which the first rank of each node has printed, unless it was another's alone
            has_spoken = any(each.exitcode == 2 and each.local_rank == 0 for each in error.failures.values())
            return status, None if has_spoken else f"rank {rank} stopped: see logs/rank_{rank}.log in the run's folder"
        return status, _describe(rank, failure)
    except SignalException as error:
        if watch is not None and watch.verdict is not None:
            return 1, watch.verdict
        number = signal.SIGINT if _is_interrupted else signal.Signals(error.sigval)
        return 128 + number, f"ended by {number.name}"
    except (DistError, RendezvousError) as error:
        return 1, _not_met(error)
    return 0, None


def _not_met(error: Exception) -> str:
    reason = str(error).splitlines()[0]
    fix = "start all nodes within trainer.timeout_s, with a free port of node 0 in --rdzv-endpoint"
    return f"the nodes did not meet, says {socket.gethostname()}: {reason.rstrip('.')}. Fix: {fix}."


def _distance_from_cause(failure: ProcessFailure) -> tuple[int, float]:
    """Rank the failures that torchrun saw at once: the smallest number is the cause of the others.

    A rank that noticed a hang reports it as its message. A rank that a signal killed did not die of another's end, unless
    torchrun sent the signal, which is SIGTERM. Ranks that raised come in the order of their times.
    """
    if failure.message.startswith(HANG):
        return 0, 0.0
    if failure.exitcode < 0:
        return (3 if failure.exitcode == -signal.SIGTERM else 1), 0.0
    return 2, failure.error_file_data.get("timestamp", failure.timestamp)


def _describe(rank: int, failure: ProcessFailure) -> str:
    if "timestamp" in failure.error_file_data:  # written by the watchdog or the rank itself
        text = failure.message
        return text if text.startswith(HANG) else f"{text}\n  traceback: logs/ in the run's folder (rank 0: above)"
    how = f"signal {failure.signal_name()}" if failure.exitcode < 0 else f"status {failure.exitcode}"
    return f"rank {rank} ended with {how}; see logs/ in the run's folder"

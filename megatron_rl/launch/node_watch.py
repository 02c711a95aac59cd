"""Watch between the launchers of a run's nodes.

A node is given up when it gives no sign of life for ``LOST_S``, whatever its ranks or ours are doing at the time: a
collective over NCCL, or a rollout of minutes, would notice a dead node late or never.
"""

from __future__ import annotations

import itertools
import os
import signal
import sys
import threading
import time
from contextlib import suppress
from datetime import timedelta
from pathlib import Path
from typing import TYPE_CHECKING

from megatron_rl.errors import UserError
from megatron_rl.launch.meeting import Meeting
from megatron_rl.process.run_key import FILE_VARIABLE, given_key
from megatron_rl.process.run_key import VARIABLE as KEY_VARIABLE

if TYPE_CHECKING:
    from torch.distributed import PrefixStore

    from megatron_rl.process.signed_store import SignedStore

BEAT_S = 1.0
"""Seconds between two signs of life of a node."""
LOST_S = 20.0
"""Seconds of silence after which a node counts as dead: far above what a slow file system or a busy machine causes."""
GRACE_S = 5.0
"""Seconds for this node's ranks to end after another node has ended: mostly they fail too, with a better message."""


def key_of_this_start(meeting: Meeting, timeout_s: float) -> bytes:
    """Return the run key: of node 0 as it was handed on, of another node once node 0 has proven to have the same.

    So a start that no node 0 belongs to, because that was refused, never says anything in the store of the run that goes on.

    Raises:
        UserError: there is none, or another than that of node 0.
        DistError: node 0 did not come.
    """
    from megatron_rl.process.signed_store import find_key

    key, path = given_key(), os.environ.get(FILE_VARIABLE)
    if meeting.node_rank == 0 and key is not None:
        return key
    if key is None and (path is None or meeting.node_rank == 0):
        raise UserError(KEY_VARIABLE, None, "must hold the run's key", "start each node with megatron-rl")
    return find_key(_launchers_store(meeting, timeout_s), Path(path or "."), str(meeting.node_rank), timeout_s)


def _launchers_store(meeting: Meeting, timeout_s: float) -> PrefixStore:
    from torch.distributed import PrefixStore, TCPStore

    timeout = timedelta(seconds=timeout_s)
    bare = TCPStore(meeting.host, meeting.port, is_master=False, wait_for_workers=False, timeout=timeout)
    return PrefixStore("launchers", bare)


class NodeWatch:
    """The launchers of a run's nodes, each giving signs of life in the store of node 0, and its status when it ends.

    Two threads, because a store on a machine that has vanished does not answer, nor refuse: one talks to it and may get
    stuck, the other judges by the time of the last news.
    """

    def __init__(self, meeting: Meeting, num_nodes: int, timeout_s: float, key: bytes) -> None:
        """Connect to the store of node 0; it may take ``timeout_s`` to appear. The run's key signs what is said there."""
        self._meeting, self._timeout_s, self._key = meeting, timeout_s, key
        # If everyone judged everyone, the work would grow with the square of the nodes; through node 0 all learn the same.
        watched = range(1, num_nodes) if meeting.node_rank == 0 else [0]
        self._num_beats = dict.fromkeys(watched, 0)
        self._heard_at: dict[int, float] = {}
        """Times of the last signs, from a node's first one on: until then, torchrun's own time limit counts."""
        self._ended_with: dict[int, int] = {}
        self._status: int | None = None
        self._has_left = threading.Event()
        self._is_over = False
        self.verdict: str | None = None
        """Reason why this node has to end; None while it may go on."""
        for work in (self._talk, self._judge):
            threading.Thread(target=work, daemon=True).start()

    def leave(self, status: int) -> None:
        """Tell the others how this node ends. Node 0 waits until they can have read it, because the store ends with it."""
        self._is_over, self._status = True, status
        if self._heard_at:
            self._has_left.wait(2 * BEAT_S)
            if self._meeting.node_rank == 0:
                time.sleep(2 * BEAT_S)

    def first_lost(self) -> str | None:
        """Wait until every other node has ended or is known to be lost; return a sentence about the first lost one.

        Call it after a failure here that a node's death may have caused.
        """
        while pending := [node for node in self._heard_at if node not in self._ended_with]:
            for node in pending:
                if self._silence_s(node) > LOST_S:
                    return self._lost(node)
            time.sleep(BEAT_S / 4)
        return None

    def _silence_s(self, node: int) -> float:
        return time.monotonic() - self._heard_at[node]

    def _lost(self, node: int) -> str:
        return f"node {node} is lost: no sign of life for {LOST_S:.0f} s"

    def _talk(self) -> None:
        from megatron_rl.process.signed_store import SignedStore, answer

        me = self._meeting.node_rank
        with suppress(Exception):  # a store that is gone; what follows from that is for _judge to say
            unsigned = _launchers_store(self._meeting, self._timeout_s)
            store = SignedStore(unsigned, self._key)
            for beat in itertools.count(1):
                store.set(f"beats of {me}", str(beat))
                if self._status is not None and not self._has_left.is_set():
                    store.set(f"status of {me}", str(self._status))
                    self._has_left.set()
                for node, beats in self._num_beats.items():
                    if me == 0 and node not in self._heard_at:  # once it is there, nobody else may come in its place
                        answer(unsigned, self._key, str(node))
                    self._num_beats[node] = _number(store, f"beats of {node}") or beats
                    if self._num_beats[node] > beats:
                        self._heard_at[node] = time.monotonic()
                    if (status := _number(store, f"status of {node}")) is not None:
                        self._ended_with[node] = status
                time.sleep(BEAT_S)

    def _judge(self) -> None:
        while True:
            time.sleep(BEAT_S / 4)
            ended = next(((node, status) for node, status in self._ended_with.items() if status != 0), None)
            lost = next((node for node in list(self._heard_at) if self._silence_s(node) > LOST_S), None)
            if self._is_over:
                return
            if ended is not None:
                time.sleep(GRACE_S)
                how = "with an error that its console shows" if ended[1] == 2 else f"with status {ended[1]}"
                self._end(f"node {ended[0]} ended {how}")
            elif lost is not None and lost not in self._ended_with:
                self._end(self._lost(lost))

    def _end(self, verdict: str) -> None:
        """End this launcher by SIGTERM, so that torchrun ends the ranks."""
        if self._is_over:
            return
        self.verdict = verdict
        os.kill(os.getpid(), signal.SIGTERM)
        time.sleep(2 * GRACE_S)
        if not self._is_over:  # the main thread is not in a place where it notices; ranks die with this process
            print(f"error: {verdict}", file=sys.stderr, flush=True)
            os._exit(1)


def _number(store: SignedStore, key: str) -> int | None:
    """Return the number that a node has written; None where there is none yet, or where a stranger has written over it."""
    from megatron_rl.process.signed_store import UNSIGNED

    try:
        return int(store.get(key)) if store.check([key]) else None
    except RuntimeError as error:
        if UNSIGNED not in str(error):
            raise
        return None

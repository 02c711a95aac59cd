"""Weight updates of SGLang servers, as weight delivery drives them: no transport is known here."""

from __future__ import annotations

from collections.abc import Sequence
from concurrent.futures import Future

import torch
import torch.distributed as dist
from torch import Tensor

from megatron_rl.errors import UserError
from megatron_rl.parallel.agree import broadcast_json
from megatron_rl.rollout.engine import ServerInfo
from megatron_rl.rollout.sglang.client import serialize
from megatron_rl.rollout.sglang.driver import Driver, together
from megatron_rl.rollout.sglang.fleet import Server
from megatron_rl.rollout.sglang.supervisor import Supervisor


class SGLangPort:
    """One update of some servers. A ``ServerPort``."""

    def __init__(
        self,
        targets: Sequence[int],
        *,
        driver: Driver | None,
        supervisor: Supervisor | None,
        cpu_group: dist.ProcessGroup,
    ) -> None:
        """Prepare an update; nothing is sent before ``begin_update``.

        Args:
            targets: numbers of the servers to update, the same on every rank.
            driver: on rank 0; None on other ranks.
            supervisor: of this node's servers, if this rank runs them.
            cpu_group: all ranks, over gloo.
        """
        self.targets = targets
        self._driver, self._supervisor, self._group = driver, supervisor, cpu_group

    def servers(self) -> list[ServerInfo]:
        """Return all servers as rank 0 sees them."""
        rows = None
        if self._driver is not None:
            rows = [
                (s.index, s.state != "down", s.tensor_parallel_size, s.expert_parallel_size, s.takes_payloads)
                for s in self._driver.fleet.servers
            ]
        return [ServerInfo(*row) for row in broadcast_json(rows, self._group)]

    def begin_update(self) -> None:
        """Pause the targets and stamp them ``updating:<version>``; health checks are off meanwhile."""
        if self._supervisor is not None:
            self._supervisor.set_busy(True)
        together(self._driver, lambda driver: driver.fleet.begin_update(self._of(driver, self.targets)), self._group)

    def post(self, server: int, payload: bytes) -> Future[str | None]:
        """Hand a payload to our weight loader in all ranks of a server."""
        assert self._driver is not None
        fleet, tensor = self._driver.fleet, torch.frombuffer(bytearray(payload), dtype=torch.uint8)
        return self._driver.loop.submit(fleet.post(fleet.servers[server], serialize([("payload", tensor)])))

    def send_bucket(self, servers: Sequence[int], bucket: Sequence[tuple[str, Tensor]]) -> UserError | None:
        """Load whole tensors on servers, and return what one refused."""
        assert self._driver is not None
        return self._driver.attempt(self._driver.fleet.send(self._of(self._driver, servers), serialize(bucket)))

    def load_checkpoint(self, servers: Sequence[int], path: str) -> None:
        """Let servers load a checkpoint from their file system."""
        together(
            self._driver, lambda driver: driver.fleet.load_checkpoint(self._of(driver, servers), path), self._group
        )

    def count(self, name: str) -> None:
        """Count a failure as ``rollout/<name>``."""
        assert self._driver is not None
        self._driver.fleet.counts[name] += 1

    def end_update(self) -> None:
        """Flush caches, stamp the new version, and put the targets into service."""
        try:
            together(self._driver, lambda driver: driver.fleet.end_update(self._of(driver, self.targets)), self._group)
        finally:
            if self._supervisor is not None:
                self._supervisor.set_busy(False)

    @staticmethod
    def _of(driver: Driver, numbers: Sequence[int]) -> list[Server]:
        return [driver.fleet.servers[number] for number in numbers]

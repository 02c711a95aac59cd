"""Engine ``recorded``: replays the completions that another run has kept. And the file format of both sides.

The same rollouts under another layout, another code version or a debugger: what differs afterwards is the trainer's doing.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager, nullcontext, suppress
from pathlib import Path

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file

from megatron_rl.errors import UserError
from megatron_rl.rollout.engine import CheckpointSource, RolloutEngine, ShardSource, WeightSource
from megatron_rl.rollout.share import flatten, unflatten
from megatron_rl.types import Completion, Request

_NOTHING = Completion(torch.empty(0, dtype=torch.int64), torch.empty(0), "abort", -1)


class RecordingEngine:
    """Wraps an engine and writes what it returns: one file a ``generate``, named by its requests."""

    def __init__(
        self,
        engine: RolloutEngine,
        directory: Path,
        *,
        is_writer: bool,
        agree: Callable[[], AbstractContextManager[None]] = nullcontext,
    ) -> None:
        """Wrap an engine.

        Args:
            engine: what generates.
            directory: for the files; made if missing.
            is_writer: True on one rank.
            agree: ``all_ranks_agree`` over all ranks, so that a full disk ends the others too.
        """
        self._engine, self._directory, self._is_writer, self._agree = engine, directory, is_writer, agree

    @property
    def weight_version(self) -> int:
        """See ``RolloutEngine``."""
        return self._engine.weight_version

    def generate(
        self, requests: Sequence[Request], *, group_size: int = 1, num_groups: int | None = None
    ) -> list[Completion | None]:
        """See ``RolloutEngine``."""
        completions = self._engine.generate(requests, group_size=group_size, num_groups=num_groups)
        with self._agree():
            self._write(requests, completions)
        return completions

    def _write(self, requests: Sequence[Request], completions: Sequence[Completion | None]) -> None:
        if not self._is_writer:
            return
        path = self._directory / file_name(requests)
        temporary = path.with_suffix(".tmp")
        try:
            self._directory.mkdir(parents=True, exist_ok=True)
            # What was not completed is recorded as a completion without tokens, which no engine ever returns.
            save_file(flatten([c or _NOTHING for c in completions]), temporary)
            temporary.replace(path)
        except (OSError, SafetensorError) as error:  # safetensors wraps what the system says
            with suppress(OSError):
                temporary.unlink(missing_ok=True)
            raise UserError(
                "rollout.record",
                str(path),
                f"the rollouts could not be written ({error})",
                "free some disk space and give the same command again, or set rollout.record=false",
            ) from error

    def update_weights(
        self,
        weights: WeightSource,
        version: int,
        *,
        shards: ShardSource | None = None,
        checkpoint: CheckpointSource | None = None,
    ) -> None:
        """See ``RolloutEngine``."""
        self._engine.update_weights(weights, version, shards=shards, checkpoint=checkpoint)

    def release_memory(self) -> None:
        """See ``RolloutEngine``."""
        self._engine.release_memory()

    def resume_memory(self) -> None:
        """See ``RolloutEngine``."""
        self._engine.resume_memory()

    def health(self) -> str | None:
        """See ``RolloutEngine``."""
        return self._engine.health()

    def metrics(self) -> dict[str, float]:
        """See ``RolloutEngine``."""
        return self._engine.metrics()

    def close(self) -> None:
        """See ``RolloutEngine``."""
        self._engine.close()


class RecordedEngine:
    """Returns recorded completions; weights are accepted and ignored."""

    def __init__(self, directory: Path) -> None:
        self._directory = directory
        self.weight_version = -1

    def generate(
        self, requests: Sequence[Request], *, group_size: int = 1, num_groups: int | None = None
    ) -> list[Completion | None]:
        """See ``RolloutEngine``; returns what the recorded run got.

        Raises:
            UserError: these requests were never recorded.
        """
        path = self._directory / file_name(requests)
        if not path.is_file():
            raise UserError(
                "rollout.recorded_dir",
                str(self._directory),
                f"has no record of these requests ({path.name})",
                "replay with the data, seed and sampling settings of the recorded run",
            )
        flat = load_file(path)
        if flat.keys() != flatten([]).keys():
            raise UserError(
                "rollout.recorded_dir", str(path), "was written by another version of this package", "record it again"
            )
        return [c if len(c.response_ids) else None for c in unflatten(flat)]

    def update_weights(
        self,
        weights: WeightSource,
        version: int,
        *,
        shards: ShardSource | None = None,
        checkpoint: CheckpointSource | None = None,
    ) -> None:
        """See ``RolloutEngine``."""
        for _ in weights():
            pass
        self.weight_version = version

    def release_memory(self) -> None:
        """Nothing is held."""

    def resume_memory(self) -> None:
        """Nothing is held."""

    def health(self) -> str | None:
        """See ``RolloutEngine``."""
        return None

    def metrics(self) -> dict[str, float]:
        """See ``RolloutEngine``: nothing goes wrong here."""
        return {}

    def close(self) -> None:
        """Nothing was started."""


def file_name(requests: Sequence[Request]) -> str:
    """Named by a digest of the requests (ids, limits, seeds), so that a replay finds its own and no other's."""

    digest = hashlib.blake2b(digest_size=12)
    for r in requests:
        digest.update(r.prompt_ids.numpy().tobytes())
        digest.update(repr((r.max_new_tokens, r.temperature, r.top_p, r.top_k, r.seed)).encode())
    return f"rollouts_{digest.hexdigest()}.safetensors"

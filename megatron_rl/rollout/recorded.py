"""Engine ``recorded``: replays the completions that another run has kept. And the file format of both sides.

The same rollouts under another layout, another code version or a debugger: what differs afterwards is the trainer's doing.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterable, Sequence
from pathlib import Path

from safetensors.torch import load_file, save_file
from torch import Tensor

from megatron_rl.errors import UserError
from megatron_rl.rollout.engine import RolloutEngine
from megatron_rl.rollout.share import flatten, unflatten
from megatron_rl.types import Completion, Request


class RecordingEngine:
    """Wraps an engine and writes what it returns: one file a ``generate``, named by its requests."""

    def __init__(self, engine: RolloutEngine, directory: Path, *, is_writer: bool) -> None:
        self._engine, self._directory, self._is_writer = engine, directory, is_writer
        directory.mkdir(parents=True, exist_ok=True)

    @property
    def weight_version(self) -> int:
        """See ``RolloutEngine``."""
        return self._engine.weight_version

    def generate(self, requests: Sequence[Request]) -> list[Completion]:
        """See ``RolloutEngine``."""
        completions = self._engine.generate(requests)
        if self._is_writer:
            path = self._directory / file_name(requests)
            temporary = path.with_suffix(".tmp")
            save_file(flatten(completions), temporary)
            temporary.replace(path)
        return completions

    def update_weights(self, named_tensors: Iterable[tuple[str, Tensor]], version: int) -> None:
        """See ``RolloutEngine``."""
        self._engine.update_weights(named_tensors, version)

    def release_memory(self) -> None:
        """See ``RolloutEngine``."""
        self._engine.release_memory()

    def resume_memory(self) -> None:
        """See ``RolloutEngine``."""
        self._engine.resume_memory()

    def health(self) -> str | None:
        """See ``RolloutEngine``."""
        return self._engine.health()

    def close(self) -> None:
        """See ``RolloutEngine``."""
        self._engine.close()


class RecordedEngine:
    """Returns recorded completions; weights are accepted and ignored."""

    def __init__(self, directory: Path) -> None:
        self._directory = directory
        self.weight_version = -1

    def generate(self, requests: Sequence[Request]) -> list[Completion]:
        """See ``RolloutEngine``.

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
        return unflatten(load_file(path))

    def update_weights(self, named_tensors: Iterable[tuple[str, Tensor]], version: int) -> None:
        """See ``RolloutEngine``."""
        for _ in named_tensors:
            pass
        self.weight_version = version

    def release_memory(self) -> None:
        """Nothing is held."""

    def resume_memory(self) -> None:
        """Nothing is held."""

    def health(self) -> str | None:
        """See ``RolloutEngine``."""
        return None

    def close(self) -> None:
        """Nothing was started."""


def file_name(requests: Sequence[Request]) -> str:
    """Named by a digest of the requests (ids, limits, seeds), so that a replay finds its own and no other's."""

    digest = hashlib.blake2b(digest_size=12)
    for r in requests:
        digest.update(r.prompt_ids.numpy().tobytes())
        digest.update(repr((r.max_new_tokens, r.temperature, r.top_p, r.top_k, r.seed)).encode())
    return f"rollouts_{digest.hexdigest()}.safetensors"

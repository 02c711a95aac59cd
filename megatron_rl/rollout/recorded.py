"""Engine ``recorded``: replays completions that another run has recorded, and the file format of both.

With the same rollouts under another layout, another code version or a debugger, any difference comes from the trainer.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from pathlib import Path

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor

from megatron_rl.errors import UserError
from megatron_rl.files import SAME_COMMAND, atomic_file, disk_errors
from megatron_rl.rollout.engine import RolloutEngine, WeightSource
from megatron_rl.rollout.growth import Branch, Expand, Key, from_list, in_order
from megatron_rl.rollout.share import flatten, unflatten
from megatron_rl.types import Completion, Request

GROWN = "grown"
_NOTHING = Completion(torch.empty(0, dtype=torch.int32), torch.empty(0), "abort", -1)


class RecordingEngine:
    """An engine that records another: one file for each ``generate``, named by its requests."""

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
            engine: generates the completions.
            directory: for the files; made if missing.
            is_writer: True on one rank.
            agree: ``all_ranks_agree`` over all ranks, so that a full disk ends the others too.
        """
        self._engine, self._directory, self._is_writer, self._agree = engine, directory, is_writer, agree

    @property
    def weight_version(self) -> int:
        """Publish counter of the wrapped engine's weights."""
        return self._engine.weight_version

    def generate(
        self, requests: Sequence[Request], *, group_size: int = 1, num_groups: int | None = None
    ) -> list[Completion | None]:
        """Complete requests with the wrapped engine, and record the completions."""
        completions = self._engine.generate(requests, group_size=group_size, num_groups=num_groups)
        with self._agree():
            self._write(requests, completions)
        return completions

    def grow(self, seeds: Sequence[Branch], expand: Expand) -> dict[Key, Completion]:
        """Complete branches with the wrapped engine, and record all of them."""
        grown = self._engine.grow(seeds, expand)
        with self._agree():
            requests, completions = _all_of(seeds, expand, grown)
            self._write([seed.request for seed in seeds], completions, GROWN, {GROWN: _digest(requests)})
        return grown

    def _write(
        self,
        requests: Sequence[Request],
        completions: Sequence[Completion | None],
        prefix: str = "rollouts",
        more: Mapping[str, Tensor] | None = None,
    ) -> None:
        if not self._is_writer:
            return
        path = self._directory / file_name(requests, prefix)
        # A request without completion is recorded as a completion without tokens, which no engine ever returns.
        tensors = {**flatten([c or _NOTHING for c in completions]), **(more or {})}
        fix = f"{SAME_COMMAND}, or set rollout.record=false"
        # safetensors wraps the system's error.
        with (
            disk_errors(path, field="rollout.record", fix=fix, also=(SafetensorError,)),
            atomic_file(path) as temporary,
        ):
            save_file(tensors, temporary)

    def update_weights(self, source: WeightSource, version: int) -> None:
        """Update the wrapped engine."""
        self._engine.update_weights(source, version)

    def release_memory(self) -> None:
        """Release the wrapped engine's memory."""
        self._engine.release_memory()

    def resume_memory(self) -> None:
        """Take the wrapped engine's memory back."""
        self._engine.resume_memory()

    def metrics(self) -> dict[str, float]:
        """Return the wrapped engine's metrics."""
        return self._engine.metrics()

    def close(self) -> None:
        """Close the wrapped engine."""
        self._engine.close()


class RecordedEngine:
    """An engine that returns recorded completions; weights are accepted and ignored."""

    def __init__(self, directory: Path) -> None:
        self._directory = directory
        self.weight_version = -1

    def generate(
        self, requests: Sequence[Request], *, group_size: int = 1, num_groups: int | None = None
    ) -> list[Completion | None]:
        """Return the recorded completions of these requests.

        Raises:
            UserError: these requests were never recorded.
        """
        return [c if len(c.response_ids) else None for c in unflatten(self._read(requests, "rollouts"))]

    def grow(self, seeds: Sequence[Branch], expand: Expand) -> dict[Key, Completion]:
        """Return the recorded completions of this growth.

        Raises:
            UserError: this growth was never recorded.
        """
        flat = self._read([seed.request for seed in seeds], GROWN)
        digest = flat.pop(GROWN)
        try:
            grown = from_list(seeds, expand, unflatten(flat))
            if not torch.equal(_digest(_all_of(seeds, expand, grown)[0]), digest):
                raise ValueError("its completions continue other prefixes")
        except ValueError as error:
            raise UserError(
                "rollout.recorded_dir",
                str(self._directory),
                f"was recorded under other settings of the algorithm ({error})",
                "replay with the algorithm settings of the recorded run",
            ) from error
        return grown

    def _read(self, requests: Sequence[Request], prefix: str) -> dict[str, Tensor]:
        path = self._directory / file_name(requests, prefix)
        if not path.is_file():
            raise UserError(
                "rollout.recorded_dir",
                str(self._directory),
                f"has no record of these requests ({path.name})",
                "replay with the data, seed and sampling settings of the recorded run",
            )
        flat = load_file(path)
        if flat.keys() - {GROWN} != flatten([]).keys():
            raise UserError(
                "rollout.recorded_dir", str(path), "was written by another version of this package", "record it again"
            )
        return flat

    def update_weights(self, source: WeightSource, version: int) -> None:
        """Read the weights to the end, as other ranks expect, and drop them."""
        for _ in source.tensors():
            pass
        self.weight_version = version

    def release_memory(self) -> None:
        """Do nothing: no memory is held."""

    def resume_memory(self) -> None:
        """Do nothing: no memory is held."""

    def metrics(self) -> dict[str, float]:
        """Return no metrics: a replay mends no failures."""
        return {}

    def close(self) -> None:
        """Do nothing: no process was started."""


def file_name(requests: Sequence[Request], prefix: str = "rollouts") -> str:
    """Return a name made of a digest of the requests (ids, limits, seeds), so that a replay finds only its own file."""
    return f"{prefix}_{_digest(requests).numpy().tobytes().hex()}.safetensors"


def _digest(requests: Sequence[Request]) -> Tensor:
    """Return a digest of requests, [12] uint8."""
    digest = hashlib.blake2b(digest_size=12)
    for r in requests:
        digest.update(r.prompt_ids.numpy().tobytes())
        digest.update(repr((r.max_new_tokens, r.temperature, r.top_p, r.top_k, r.seed)).encode())
    return torch.frombuffer(bytearray(digest.digest()), dtype=torch.uint8)


def _all_of(
    seeds: Sequence[Branch], expand: Expand, grown: Mapping[Key, Completion]
) -> tuple[list[Request], list[Completion]]:
    """Return the requests and completions of a growth, in the order of ``in_order``."""
    requests: list[Request] = []

    def known(branch: Branch) -> Completion:
        requests.append(branch.request)
        return grown[branch.key]

    keys = list(in_order(seeds, expand, known))
    return requests, [grown[key] for key in keys]

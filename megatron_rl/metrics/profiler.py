"""Profiles of chosen steps by torch's profiler: one trace a step and rank, for Perfetto or chrome://tracing."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import torch
from torch.profiler import ProfilerActivity, profile

from megatron_rl.config.trainer import ProfileConfig

_ROWS = 25
"""Operators in the table beside a trace."""


class StepProfiler:
    """Profiles the steps that ``trainer.profile`` names, on the ranks that it names."""

    def __init__(self, config: ProfileConfig, directory: Path, rank: int) -> None:
        """Args: the settings; the folder of traces; this rank."""
        self._config, self._directory, self._rank = config, directory, rank

    @contextmanager
    def step(self, number: int) -> Iterator[None]:
        """Profile a step, counted from 1, if it is one of those; the trace is written when the step has ended well."""
        if number not in self._config.steps or self._rank not in self._config.ranks:
            yield
            return
        activities = [ProfilerActivity.CPU]
        if torch.cuda.is_available():
            activities.append(ProfilerActivity.CUDA)
        with profile(activities=activities, record_shapes=self._config.with_shapes) as found:
            yield
        self._directory.mkdir(parents=True, exist_ok=True)
        name = f"step_{number:08d}_rank_{self._rank}"
        found.export_chrome_trace(str(self._directory / f"{name}.json.gz"))
        order = "self_cuda_time_total" if torch.cuda.is_available() else "self_cpu_time_total"
        table = found.key_averages().table(sort_by=order, row_limit=_ROWS)
        (self._directory / f"{name}.txt").write_text(table)
        print(f"profile of step {number}: {self._directory / name}.json.gz (for Perfetto) and .txt", flush=True)

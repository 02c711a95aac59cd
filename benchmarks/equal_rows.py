"""Cost of holding all rows on every rank: bytes a token, and seconds of ``sample_metrics``. One process, one thread.

    python benchmarks/equal_rows.py [--rows 4096] [--tokens 2048] [--shares 8]

Completions travel as in a run (flat tensors over gloo), become rows, and get what an update needs of them. The last line is one
line of JSON: bytes a response token held by the rows and at the peak of each part, and CPU seconds of each part.
"""

from __future__ import annotations

import argparse
import ctypes
import gc
import json
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import TypeVar

import torch
import torch.distributed as dist

from megatron_rl.metrics.step import rollout_metrics, sample_metrics
from megatron_rl.model.guards import check_same_rows
from megatron_rl.rollout.share import broadcast_completions
from megatron_rl.types import Completion, Problem, Prompt, Rollout, RolloutGroup, RowKind, Score, TrainingSample

PROMPT_TOKENS = 128
GROUP_SIZE = 16
T = TypeVar("T")


def main() -> None:
    """Build the rows of a step, and measure."""
    parser = argparse.ArgumentParser(description="Cost of holding all rows of a step.")
    parser.add_argument("--rows", type=int, default=4096)
    parser.add_argument("--tokens", type=int, default=2048, help="response tokens of each row")
    parser.add_argument("--shares", type=int, default=8, help="ranks that share the metrics out")
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    group = dist.group.WORLD
    assert group is not None
    measure = Measure(arguments.rows * arguments.tokens)

    completions = [completion(arguments.tokens, seed) for seed in range(arguments.rows)]
    engine_bytes = measure.held()
    shared = measure("broadcast", partial(broadcast_completions, completions, group))
    del completions
    groups = [
        RolloutGroup(prompt(number), [Rollout(one, Score(1.0)) for one in shared[start : start + GROUP_SIZE]])
        for number, start in enumerate(range(0, len(shared), GROUP_SIZE))
    ]
    del shared
    measure("rollout_metrics", partial(rollout_metrics, groups, version=0))
    samples = [sample(rollout, group) for group in groups for rollout in group.rollouts]
    del groups
    rows_bytes = measure.held()
    measure("check_same_rows", lambda: check_same_rows(samples, update=1, cpu_group=group))
    measure("sample_metrics", lambda: sample_metrics(samples))
    measure("sample_metrics of a share", lambda: sample_metrics(samples[:: arguments.shares]))
    dist.destroy_process_group()
    print(
        json.dumps(
            {
                "tokens": measure.num_tokens,
                "completions_of_the_engine": engine_bytes,
                "rows_held": rows_bytes,
                "peak": max(measure.peaks.values()),
                "peak_bytes_per_token": measure.peaks,
                "seconds": measure.seconds,
            }
        )
    )


class Measure:
    """CPU seconds, and resident bytes a token beyond those at the start."""

    def __init__(self, num_tokens: int) -> None:
        self.num_tokens = num_tokens
        self.peaks: dict[str, float] = {}
        self.seconds: dict[str, float] = {}
        self._before = resident("VmRSS")

    def held(self) -> float:
        """Return what is held now."""
        gc.collect()
        ctypes.CDLL("libc.so.6").malloc_trim(0)
        return self._per_token(resident("VmRSS"))

    def __call__(self, part: str, work: Callable[[], T]) -> T:
        """Run a part, and note its seconds and its peak."""
        self.held()
        Path("/proc/self/clear_refs").write_text("5")  # sets the peak to what is held now
        started = time.process_time()
        result = work()
        self.seconds[part] = round(time.process_time() - started, 3)
        self.peaks[part] = self._per_token(resident("VmHWM"))
        return result

    def _per_token(self, num_bytes: int) -> float:
        return round((num_bytes - self._before) / self.num_tokens, 1)


def resident(field: str) -> int:
    """Return a figure of this process's memory in bytes."""
    line = next(line for line in Path("/proc/self/status").read_text().splitlines() if line.startswith(field))
    return int(line.split()[1]) * 1024


def completion(num_tokens: int, seed: int) -> Completion:
    """Make a random completion, as an engine returns it."""
    generator = torch.Generator().manual_seed(seed)
    ids = torch.randint(150_000, (num_tokens,), generator=generator)
    return Completion(ids, -torch.rand(num_tokens, generator=generator), "stop", 0)


def prompt(number: int) -> Prompt:
    """Make a prompt; the rollouts of its group share its ids."""
    return Prompt(Problem(f"problem {number}", "", ""), torch.arange(PROMPT_TOKENS))


def sample(rollout: Rollout, group: RolloutGroup) -> TrainingSample:
    """Make the row of a rollout, with all that GRPO without a reference gives it."""
    completion = rollout.completion
    size = len(completion.response_ids)
    return TrainingSample(
        group.prompt.prompt_ids,
        completion.response_ids,
        RowKind.RL,
        reward=rollout.score.reward,
        rollout_log_probs=completion.log_probs,
        old_log_probs=completion.log_probs + 1e-3,
        advantages=torch.full((size,), 0.5),
        weights=torch.full((size,), 1 / size),
    )


if __name__ == "__main__":
    main()

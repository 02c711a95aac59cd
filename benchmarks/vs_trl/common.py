"""What both workers share: the clock, the reward, the form of their report. Imports neither trainer, nor torch."""

from __future__ import annotations

import functools
import json
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any


@dataclass(frozen=True)
class Work:
    """What one worker process has to do; the driver hands it over as JSON."""

    directory: str
    """Holds ``model/``, ``problems.jsonl`` and ``prompts.json``, the same prompts in the same order."""
    num_steps: int
    """Rollout batches, warm-up included."""
    num_threads: int
    num_prompts: int
    """Of one step."""
    num_generations: int
    max_new_tokens: int
    num_updates: int
    """Optimizer updates on one rollout batch, each on an equal share of its rows."""
    trl_batch_size: int
    """Rows of one forward and backward in TRL."""
    trl_attention: str
    """``attn_implementation`` of TRL's model."""
    device: str
    """``cpu``, in fp32, or ``gpu``, in bf16."""
    megatron_rl_tokens: int
    """Tokens of one forward and backward in megatron_rl."""

    @property
    def num_rows(self) -> int:
        """Completions of one step."""
        return self.num_prompts * self.num_generations


class Clock:
    """Seconds of ``generate``, ``update`` and ``rest`` of each step. A nested phase is taken out of the one around it.

    ``crowded`` is the share of the step in which some task of the machine waited for a processor (Linux's pressure stall
    information): near 0 when nothing else runs.
    """

    def __init__(self) -> None:
        self.steps: list[dict[str, float]] = []
        self._open = ["rest"]
        self._border = time.perf_counter()
        self._waited = waited_s()
        self._step = self._empty()

    def push(self, phase: str) -> None:
        """From here on it is ``phase``, until ``pop``."""
        self._charge()
        self._open.append(phase)

    def pop(self) -> None:
        """Back to the phase around."""
        self._charge()
        self._open.pop()

    @contextmanager
    def phase(self, name: str) -> Iterator[None]:
        """``push`` and ``pop``."""
        self.push(name)
        yield
        self.pop()

    def wrap(self, owner: Any, method: str, phase: str, count: Callable[[Any], int] | None = None) -> None:
        """Time every call of ``owner.method``; ``count`` says how many completion tokens its result holds."""
        original = getattr(owner, method)

        @functools.wraps(original)
        def timed(*args: Any, **kwargs: Any) -> Any:
            with self.phase(phase):
                result = original(*args, **kwargs)
            if count is not None:
                self._step["tokens"] += count(result)
            return result

        setattr(owner, method, timed)

    def end_step(self) -> None:
        """A rollout batch has been used up."""
        self._charge()
        before, self._waited = self._waited, waited_s()
        seconds = sum(self._step[phase] for phase in ("generate", "update", "rest"))
        self.steps.append(self._step | {"crowded": (self._waited - before) / seconds})
        self._step = self._empty()

    def report(self, **versions: str) -> None:
        """Print what the driver reads, as the last line."""
        print(json.dumps({"steps": self.steps, "versions": versions}), flush=True)

    def _charge(self) -> None:
        now = time.perf_counter()
        self._step[self._open[-1]] += now - self._border
        self._border = now

    @staticmethod
    def _empty() -> dict[str, float]:
        return {"generate": 0.0, "update": 0.0, "rest": 0.0, "tokens": 0}


def waited_s() -> float:
    """Seconds since boot in which some task was ready and had no processor; 0 where the kernel does not say."""
    file = Path("/proc/pressure/cpu")
    if not file.exists():
        return 0.0
    some = file.read_text().splitlines()[0]  # some avg10=0.00 avg60=0.00 avg300=0.00 total=123456
    return int(some.rsplit("=", 1)[1]) / 1e6


def digit_share(text: str) -> float:
    """The reward: how much of a completion is digits. Cheap, and different within nearly every group."""
    words = text.split()
    return sum(word.isdigit() for word in words) / max(1, len(words))

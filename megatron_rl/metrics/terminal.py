"""Progress on the terminal: nested bars, or a line now and then where output is no terminal."""

from __future__ import annotations

import atexit
import math
import os
import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sized
from types import TracebackType
from typing import Any, Generic, Self, TypeVar, overload

from rich.console import Console, RenderableType
from rich.progress import (
    BarColumn,
    MofNCompleteColumn,
    Progress,
    TaskID,
    TextColumn,
    TimeElapsedColumn,
    TimeRemainingColumn,
)
from rich.text import Text

from megatron_rl.metrics.rows import (
    ENTROPY,
    EVAL_PREFIX,
    GRAD_NORM,
    LENGTH,
    LOSS,
    LR,
    PASS_1,
    REWARD,
    set_prefixes,
)

T = TypeVar("T")


class _Live(Progress):
    """All bars of the process, and one line of numbers below them; as columns these would not fit in 80 characters."""

    status = ""

    def get_renderables(self) -> Iterable[RenderableType]:
        yield from super().get_renderables()
        if self.status:
            yield Text(self.status, style="cyan", no_wrap=True, overflow="ellipsis")


class Display:
    """The display of this process's progress. One live area, started with the first task and ended with the last.

    Nesting works because every task is a row of the same rich ``Progress``; two live areas would fight for the cursor.
    Off a terminal a task is silent for ``quiet_s`` seconds and then says a line every ``quiet_s`` seconds.
    """

    def __init__(
        self, console: Console | None, *, quiet_s: float = 30.0, clock: Callable[[], float] = time.monotonic
    ) -> None:
        self.console = console
        """None shows nothing, as on ranks other than 0."""
        self.quiet_s = quiet_s
        self.clock = clock
        self._live: _Live | None = None

    @property
    def is_live(self) -> bool:
        """Return True for a terminal that can redraw."""
        return self.console is not None and self.console.is_interactive

    def print(self, text: str) -> None:
        """Print a line that stays, above the live area if there is one."""
        if self.console is not None:
            text = text.encode(self.console.encoding, errors="replace").decode(self.console.encoding)
            # No markup: a user's text may hold [brackets]. soft_wrap: a log file has no width.
            self.console.print(text, markup=False, highlight=False, soft_wrap=True)

    def set_status(self, text: str) -> None:
        """Set the line below the bars."""
        if self._live is not None:
            self._live.status = text

    def _start(self, description: str, total: float | None) -> TaskID | None:
        if not self.is_live:
            return None
        if self._live is None:
            self._live = _Live(
                TextColumn("{task.description}"),
                BarColumn(bar_width=24),
                MofNCompleteColumn(),
                TimeElapsedColumn(),
                TextColumn("eta"),
                TimeRemainingColumn(compact=True),
                console=self.console,
                transient=True,
                refresh_per_second=4,
                speed_estimate_period=3600.0,  # rich's 30 s would never see two of our steps, so never a time left
            )
            self._live.start()
            atexit.register(self.close)  # a live area hides the cursor: give it back after an uncaught error
        return self._live.add_task(description, total=total)

    def _advance(self, task_id: TaskID, completed: float) -> None:
        if self._live is not None:
            self._live.update(task_id, completed=completed)

    def _stop(self, task_id: TaskID) -> None:
        if self._live is not None:
            self._live.remove_task(task_id)
            if not self._live.tasks:
                self.close()

    def close(self) -> None:
        """End the live area, whatever tasks are open."""
        if self._live is not None:
            self._live.stop()
            self._live = None
            atexit.unregister(self.close)


_display: Display | None = None
_on_advance: Callable[[], None] | None = None


def listen(callback: Callable[[], None] | None) -> None:
    """Call this whenever an item of any task is done, also on ranks that show nothing; None calls nobody."""
    global _on_advance
    _on_advance = callback


def use_console(console: Console | None) -> Display:
    """Let ``progress`` draw on this console; None silences it. Called by ``MetricsLogger``."""
    global _display
    if _display is None or _display.console is not console:
        if _display is not None:
            _display.close()
        _display = Display(console)
    return _display


def _current_display() -> Display:
    """Return the display in use, else one on standard error, on rank 0 only (by torchrun's variable, without torch)."""
    if _display is not None:
        return _display
    return use_console(Console(stderr=True) if int(os.environ.get("RANK", "0")) == 0 else None)


class ProgressTask(Generic[T]):
    """One piece of long work: iterate over it, or open it with ``with`` and call ``advance``."""

    def __init__(
        self, display: Display, description: str, *, items: Iterable[T] | None = None, total: float | None = None
    ) -> None:
        self._display = display
        self._items = items
        self.description = description
        self.total = total
        """Number of items; None if unknown."""
        self.completed = 0.0
        self._task_id: TaskID | None = None
        self._started_s = self._said_s = 0.0
        self._has_spoken = False

    def __enter__(self) -> Self:
        self._started_s = self._said_s = self._display.clock()
        self._task_id = self._display._start(self.description, self.total)
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if self._task_id is not None:
            self._display._stop(self._task_id)
        elif self._has_spoken and kind is None:
            self._say()

    def __iter__(self) -> Iterator[T]:
        assert self._items is not None, "progress(total) has nothing to iterate over: use it with `with`"
        with self:
            for item in self._items:
                yield item
                self.advance()

    def advance(self, count: float = 1) -> None:
        """Count finished items."""
        self.advance_to(self.completed + count)

    def advance_to(self, completed: float) -> None:
        """Set the number of finished items."""
        self.completed = completed
        if _on_advance is not None:
            _on_advance()
        if self._task_id is not None:
            self._display._advance(self._task_id, completed)
        elif self._display.clock() - self._said_s >= self._display.quiet_s:
            self._say()

    def _say(self) -> None:
        self._has_spoken = True
        self._said_s = self._display.clock()
        share = f"/{self.total:g} ({self.completed / self.total:.0%})" if self.total else ""
        self._display.print(f"{self.description}: {self.completed:g}{share}, {self._said_s - self._started_s:.0f} s")


@overload
def progress(work: int | None, description: str) -> ProgressTask[None]: ...
@overload
def progress(work: Iterable[T], description: str) -> ProgressTask[T]: ...
def progress(work: Iterable[Any] | int | None, description: str) -> ProgressTask[Any]:
    """Show the progress of long work, inside other bars; off a terminal silently, or with a line now and then.

    Args:
        work: the items to iterate over, or their number, or None if that is unknown.
        description: a word or two, such as "generation".

    Example:
        ``for batch in progress(batches, "scoring"): ...`` or
        ``with progress(800, "generation") as bar: ...; bar.advance()``
    """
    if work is None or isinstance(work, int):
        return ProgressTask(_current_display(), description, total=work)
    total = len(work) if isinstance(work, Sized) else None
    return ProgressTask(_current_display(), description, items=work, total=total)


def _thousands(value: float) -> str:
    return f"{value / 1000:.1f}k" if value >= 1000 else f"{value:.0f}"


COLUMNS: dict[str, Callable[[float], str]] = {
    REWARD: lambda x: f"reward {x:.3f}",
    PASS_1: lambda x: f"pass@1 {x:.1%}",
    ENTROPY: lambda x: f"entropy {x:.3f}",
    LENGTH: lambda x: f"length {x:.0f}",
    "tokens_per_s": lambda x: f"{_thousands(x)} tok/s",
    "time/step_s": lambda x: f"{x:.1f} s",
}
"""Metrics that a step's line shows if it has them, in this order."""
WITHOUT_REWARD: dict[str, Callable[[float], str]] = {
    LOSS: lambda x: f"loss {x:.4f}",
    GRAD_NORM: lambda x: f"grad norm {x:.3f}",
    LR: lambda x: f"lr {x:.2g}",
}
"""Metrics that come first where nothing has a reward, as in supervised training."""


class StepConsole:
    """The steps of a run: a bar with the last numbers on a terminal, else one line a step, ``min_interval_s`` apart.

    The first line and the last are always printed, and so is every evaluation.
    """

    def __init__(self, display: Display, *, total_steps: int | None, min_interval_s: float = 5.0) -> None:
        self.total_steps = total_steps
        self.min_interval_s = min_interval_s
        self._display = display
        self._task: ProgressTask[None] | None = None
        self._printed_s = -math.inf
        self._unsaid = ""
        """The last step's line, until it is printed."""

    def step(self, step: int, metrics: Mapping[str, float]) -> None:
        """Show a finished training step."""
        of = "" if self.total_steps is None else f"/{self.total_steps}"
        columns = COLUMNS if REWARD in metrics or PASS_1 in metrics else WITHOUT_REWARD | COLUMNS
        numbers = "  ".join(show(metrics[key]) for key, show in columns.items() if key in metrics)
        self._unsaid = f"step {step}{of}  {numbers}".rstrip()
        if self._display.is_live:
            if self._task is None:
                self._task = ProgressTask(self._display, "train", total=self.total_steps)
                self._task.__enter__()
            self._task.advance_to(step)
            self._display.set_status(numbers)
            return
        now = self._display.clock()
        if now - self._printed_s >= self.min_interval_s or step == self.total_steps:
            self._say()
            self._printed_s = now

    def say(self, text: str) -> None:
        """Print a line that stays."""
        self._display.print(text)

    def evaluation(self, step: int, metrics: Mapping[str, float]) -> None:
        """Show the evaluation among the metrics, if any: greedy and pass@k in percent, a line a set; the row has the rest."""
        if not any(key.startswith(EVAL_PREFIX) for key in metrics):
            return
        for name, prefix in (set_prefixes(metrics) or {"": EVAL_PREFIX}).items():
            shown = {key.removeprefix(prefix): x for key, x in metrics.items() if key.startswith(prefix)}
            numbers = [f"{key} {x:.1%}" for key, x in shown.items() if key == "greedy" or key.startswith("pass@")]
            self._display.print("  ".join((f"eval at step {step}", *([name] if name else []), *numbers)))

    def close(self) -> None:
        """End the bar and print the last step's line, also of a run that ends early."""
        if self._task is not None:
            self._display.set_status("")
            self._task.__exit__(None, None, None)
            self._task = None
        self._say()

    def _say(self) -> None:
        if self._unsaid:
            self._display.print(self._unsaid)
            self._unsaid = ""

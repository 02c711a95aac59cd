"""The verbs of offline conversion, for ``megatron-rl convert`` and the scripts in ``tools/``."""

from __future__ import annotations

import threading
import time
from math import prod
from pathlib import Path
from typing import Annotated, Any, Literal

import typer
from rich.console import Console
from rich.progress import BarColumn, DownloadColumn, Progress, TextColumn, TimeRemainingColumn, TransferSpeedColumn

from megatron_rl.convert.offline.memory import keep_freed_memory
from megatron_rl.convert.offline.reporter import Reporter
from megatron_rl.errors import UserError

DtypeOption = Annotated[
    Literal["float32", "bfloat16", "float16"] | None,
    typer.Option(help="Cast to this type; left out: every tensor keeps the type it is stored in."),
]
VerifyOption = Annotated[
    bool,
    typer.Option(
        help="Afterwards read back what was written and compare digests; then, if memory allows, compare one forward of "
        "transformers with one of our Megatron model."
    ),
]
ThreadsOption = Annotated[
    int | None, typer.Option(help="Files written at a time; left out: twice the cores, at most 8.")
]


def convert_hf_to_megatron(
    source: Annotated[str, typer.Argument(help="Hugging Face directory: config.json and safetensors", metavar="HF")],
    target: Annotated[str, typer.Argument(help="new directory, in Megatron's torch_dist format", metavar="MEGATRON")],
    dtype: DtypeOption = None,
    layer_spec: Annotated[
        Literal["both", "local", "te"],
        typer.Option(
            help="Names of which of Megatron's layer specs: local modules, Transformer Engine, or those of both. Strict "
            "loads of either pass with both, except StrictHandling.RAISE_ALL, which also minds what it does not need."
        ),
    ] = "both",
    verify: VerifyOption = False,
    threads: ThreadsOption = None,
) -> None:
    """Convert Hugging Face to Megatron. After a kill the same command goes on where it stopped."""
    keep_freed_memory()
    from megatron_rl.convert.offline.convert import import_hf

    started, reporter = time.perf_counter(), TerminalReporter()
    done = import_hf(source, target, dtype=dtype, layer_spec=layer_spec, num_threads=threads, reporter=reporter)
    _say_done(done, time.perf_counter() - started, reporter)
    if verify:
        _verify_written(done, Path(source) if dtype is None else None, done.directory, reporter)


def convert_megatron_to_hf(
    source: Annotated[
        str,
        typer.Argument(
            help="Megatron checkpoint: a torch_dist directory, a step of the trainer, or a NeMo 2 checkpoint",
            metavar="MEGATRON",
        ),
    ],
    target: Annotated[str, typer.Argument(help="new Hugging Face directory", metavar="HF")],
    hf: Annotated[
        str | None,
        typer.Option(
            help="Hugging Face directory whose config.json and tokenizer to use; needed where the checkpoint brings none "
            "along (a step of the trainer, NeMo 2)."
        ),
    ] = None,
    dtype: DtypeOption = None,
    max_shard_gb: Annotated[
        float | None,
        typer.Option(
            help="Limit of one safetensors file, in GB; left out: an eighth of the whole, within 0.256 and 4."
        ),
    ] = None,
    verify: VerifyOption = False,
    threads: ThreadsOption = None,
) -> None:
    """Convert Megatron to Hugging Face, without optimizer state. After a kill the same command goes on where it stopped."""
    keep_freed_memory()
    from megatron_rl.convert.offline.convert import export_hf
    from megatron_rl.convert.offline.sources import find_weights

    if max_shard_gb is not None and max_shard_gb <= 0:
        raise UserError("--max-shard-gb", max_shard_gb, "must be a positive number", "leave it out")
    max_shard_bytes = None if max_shard_gb is None else int(max_shard_gb * 1e9)
    started, reporter = time.perf_counter(), TerminalReporter()
    done = export_hf(
        source, target, config_from=hf, dtype=dtype, max_shard_bytes=max_shard_bytes, num_threads=threads,
        reporter=reporter,
    )  # fmt: skip
    _say_done(done, time.perf_counter() - started, reporter)
    if verify:
        _verify_written(done, done.directory if dtype is None else None, find_weights(Path(source)), reporter)


def verify_checkpoint(
    a: Annotated[str, typer.Argument(help="a checkpoint, Hugging Face or Megatron", metavar="A")],
    b: Annotated[
        str | None, typer.Argument(help="another one, of either format; left out: A's own digests.json", metavar="[B]")
    ] = None,
    hf: Annotated[
        str | None, typer.Option(help="Hugging Face directory with config.json, where a checkpoint brings none along.")
    ] = None,
    dtype: Annotated[
        Literal["float32", "bfloat16", "float16"] | None,
        typer.Option(help="Compare values cast to this type: an original with a conversion that was cast."),
    ] = None,
    threads: ThreadsOption = None,
) -> None:
    """Compare every tensor, bit for bit, and name those that differ. Status 1 if any does."""
    keep_freed_memory()
    from megatron_rl.convert.offline.verify import verify

    reporter = TerminalReporter()
    lines = verify(a, b, config_from=hf, dtype=dtype, num_threads=threads, reporter=reporter)
    for line in lines:
        print(line)
    what = b or "its digests.json"
    print(f"{a}: {len(lines)} tensors differ from {what}" if lines else f"{a}: every tensor is that of {what}")
    if lines:
        raise typer.Exit(1)


def _say_done(done: Any, seconds: float, reporter: TerminalReporter) -> None:
    text = f"{done.directory}: {len(done.tensors)} tensors of a {done.shape.family}, {done.num_bytes / 1e9:.2f} GB, "
    reporter.say(text + f"{seconds:.1f} s ({done.num_bytes / 1e9 / seconds:.2f} GB/s)")


def _verify_written(done: Any, hf_directory: Path | None, megatron_directory: Path, reporter: TerminalReporter) -> None:
    """Compare digests of the written files, then a forward of both if both hold the same values. Status 1 if they differ."""
    from megatron_rl.convert.offline.verify import verify
    from megatron_rl.convert.tables.kinds import hf_shapes
    from megatron_rl.convert.tables.table import entries
    from megatron_rl.doctor.forward import BOUND, bytes_of_forward, compare_forward, fits

    lines = verify(done.directory, is_fresh=True, reporter=reporter)
    for line in lines:
        print(line)
    if lines:
        raise typer.Exit(1)
    reporter.say(f"verified: {len(done.tensors)} tensors read back, every digest as converted")
    if hf_directory is None or done.shape.fp8_block is not None:
        reporter.say("no forward compared: the values were cast, so outputs differ by rounding")
        return
    num_elements = sum(
        prod(extent) for entry in entries(done.shape).values() for extent in hf_shapes(entry.kind, done.shape)
    )
    if not fits(num_elements):
        needed = bytes_of_forward(num_elements) / 1e9
        reporter.say(f"no forward compared: the two models in float32 need {needed:.1f} GB of memory")
        return
    difference = compare_forward(hf_directory, megatron_directory)
    is_good = difference <= BOUND
    reporter.say(
        f"forward: log-probs of transformers and Megatron differ by at most {difference:.1e} (bound {BOUND:.0e})"
    )
    if not is_good:
        raise typer.Exit(1)


class TerminalReporter(Reporter):
    """Shows a bar with bytes, GB/s and the time left on a terminal; elsewhere a line every ``quiet_s`` seconds."""

    def __init__(self, *, quiet_s: float = 30.0) -> None:
        self._console = Console(stderr=True)
        self._quiet_s = quiet_s
        self._lock = threading.Lock()
        self._bar: Progress | None = None
        self._what, self._total, self._done = "", 0, 0
        self._began_s = self._said_s = 0.0

    def begin(self, what: str, total_bytes: int) -> None:
        """Start the bar."""
        self._what, self._total, self._done = what, total_bytes, 0
        self._began_s = self._said_s = time.monotonic()
        if self._console.is_interactive:
            columns = (
                TextColumn("{task.description}"),
                BarColumn(bar_width=24),
                DownloadColumn(),
                TransferSpeedColumn(),
            )
            self._bar = Progress(*columns, TimeRemainingColumn(), console=self._console, transient=True)
            self._bar.start()
            self._task = self._bar.add_task(what, total=total_bytes)

    def advance(self, num_bytes: int) -> None:
        """Move the bar, or say a line if it is due."""
        with self._lock:
            self._done += num_bytes
            if self._bar is not None:
                self._bar.update(self._task, completed=self._done)
            elif time.monotonic() - self._said_s >= self._quiet_s:
                self._said_s = time.monotonic()
                speed = self._done / 1e9 / (self._said_s - self._began_s)
                self.say(f"{self._what}: {self._done / 1e9:.1f} of {self._total / 1e9:.1f} GB, {speed:.2f} GB/s")

    def end(self) -> None:
        """Remove the bar."""
        if self._bar is not None:
            self._bar.stop()
            self._bar = None

    def say(self, text: str) -> None:
        """Print one line."""
        self._console.print(text, markup=False, highlight=False, soft_wrap=True)

"""Weight updates over disk: how small a delta is after an optimizer step, and what writing and applying it costs.

The weights are normal (0.02), the gradients noise; a dozen steps of AdamW with lr 1e-6, and the last of them is the update.
Sizes and rates count the checkpoint's bytes in bfloat16, fsync included; a plain copy is measured beside each full link.

delta_ratio       bytes of a delta over bytes of the checkpoint
write_gb_per_s    checkpoint bytes per second of ``write_delta``, from weights in memory
apply_gb_per_s    checkpoint bytes per second of ``apply``: checkpoint on disk -> checkpoint on disk
full_vs_copy      seconds of ``write_full`` over seconds of a plain write of the same bytes with fsync: 1 would be free

``--encodings`` compares ways to store the difference instead. ``--megabytes`` and ``--directory`` as one would guess.
"""

from __future__ import annotations

import argparse
import json
import os
import shutil
import statistics
import tempfile
import time
import zlib
from collections.abc import Callable
from pathlib import Path

import numpy as np
import torch
import zstandard
from torch import Tensor

from megatron_rl.convert.hf.writer import LayoutWriter
from megatron_rl.weight_sync.disk import apply, write_delta, write_full
from megatron_rl.weight_sync.disk.frames import bits_of, encode

ROWS, COLUMNS = 2048, 8192
REPEATS = 5


def two_versions(seed: int, shape: tuple[int, ...], *, lr: float = 1e-6, steps: int = 12) -> tuple[Tensor, Tensor]:
    """float32 master weights before and after a step of AdamW in its stride."""
    generator = torch.Generator().manual_seed(seed)
    weights = torch.nn.Parameter(torch.randn(shape, generator=generator) * 0.02)
    optimizer = torch.optim.AdamW([weights], lr=lr, betas=(0.9, 0.95), fused=True)
    for _ in range(steps):
        before = weights.detach().clone()
        weights.grad = torch.rand(shape, generator=generator) - 0.5
        optimizer.step()
    return before, weights.detach()


def timed(action: Callable[[], object]) -> float:
    """Seconds; what others have still to write is not counted."""
    os.sync()
    started = time.perf_counter()
    action()
    return time.perf_counter() - started


def copy(tensors: dict[str, Tensor], path: Path) -> None:
    """The least that any transport over disk can do."""
    with path.open("wb") as file:
        for tensor in tensors.values():
            file.write(bits_of(tensor).data)
        file.flush()
        os.fsync(file.fileno())


def measure(root: Path, num_tensors: int) -> dict[str, float]:
    """Medians of a few repeats."""
    masters = {f"model.layers.{i}.mlp.up_proj.weight": two_versions(i, (ROWS, COLUMNS)) for i in range(num_tensors)}
    old, new = ({name: pair[k].bfloat16() for name, pair in masters.items()} for k in (0, 1))
    del masters
    size = sum(tensor.nbytes for tensor in new.values())
    (root / "source").mkdir()
    (root / "source" / "config.json").write_text("{}")
    layout = {name: (tuple(tensor.shape), tensor.dtype) for name, tensor in old.items()}
    with LayoutWriter(root / "base", layout, source=root / "source") as writer:
        for name, tensor in old.items():
            writer.add(name, tensor)
    seconds: dict[str, list[float]] = {"copy": [], "full": [], "delta": [], "apply": []}
    for repeat in range(REPEATS):
        links = root / f"links{repeat}"
        seconds["copy"].append(timed(lambda: copy(old, root / "copy")))
        seconds["full"].append(timed(lambda: write_full(old.items(), links, 0)))  # noqa: B023
        seconds["delta"].append(timed(lambda: write_delta(old.__getitem__, new.items(), links, 1)))  # noqa: B023
        base = apply(links, root / "base", 0, root / "stamped") if repeat == 0 else root / "stamped"
        seconds["apply"].append(timed(lambda: apply(links, base, 1, root / f"new{repeat}")))  # noqa: B023
        stored = sum(path.stat().st_size for path in (links / "00000001.delta").iterdir())
        for path in (links, root / f"new{repeat}"):
            shutil.rmtree(path)
    for name, values in seconds.items():
        median = statistics.median(values)
        print(f"{name:6} {median:6.2f} s  {size / median / 1e9:5.2f} GB/s  of {' '.join(f'{v:.2f}' for v in values)}")
    changed = sum(int((bits_of(old[name]) != bits_of(new[name])).sum()) for name in new) * 2 / size
    print(f"checkpoint {size / 1e6:.0f} MB, delta {stored / 1e6:.2f} MB, {changed:.2%} of the elements changed")
    medians = {name: statistics.median(values) for name, values in seconds.items()}
    return {
        "delta_ratio": stored / size,
        "write_gb_per_s": size / medians["delta"] / 1e9,
        "apply_gb_per_s": size / medians["apply"] / 1e9,
        "full_vs_copy": medians["full"] / medians["copy"],
    }


def compare_encodings() -> None:
    """Ratio and speed of storing one step's difference, one thread."""

    def planes(bits: np.ndarray) -> bytes:
        return bits.view(np.uint8).reshape(-1, bits.itemsize).T.tobytes()

    def bit_planes(bits: np.ndarray) -> bytes:
        return np.packbits(np.unpackbits(bits.view(np.uint8).reshape(-1, bits.itemsize), axis=1).T).tobytes()

    def zigzag(difference: np.ndarray) -> np.ndarray:
        signed = difference.view(f"i{difference.itemsize}")
        return ((signed << 1) ^ (signed >> (8 * signed.itemsize - 1))).view(difference.dtype)

    before, after = two_versions(0, (2**22,))
    for dtype in (torch.bfloat16, torch.float32):
        old, new = (bits_of(tensor.to(dtype)) for tensor in (before, after))
        forms = {
            "bytes as they are": lambda: (old ^ new).tobytes(),  # noqa: B023
            "bytes by significance": lambda: planes(old ^ new),  # noqa: B023
            "the same of new - old": lambda: planes(zigzag(new - old)),  # noqa: B023
            "bits by significance": lambda: bit_planes(old ^ new),  # noqa: B023
            "no difference at all": lambda: planes(new),  # noqa: B023
        }
        rows: list[tuple[str, str, Callable[[], bytes]]] = [
            ("as here", "zstd 1", lambda: encode(new, old)[0])  # noqa: B023
        ]
        for name, form in forms.items():
            for level in (1, 3, 9):
                compress = zstandard.ZstdCompressor(level=level).compress
                rows.append((name, f"zstd {level}", lambda form=form, compress=compress: compress(form())))
        rows.append(("bytes by significance", "zlib 1", lambda: zlib.compress(planes(old ^ new), 1)))  # noqa: B023
        for name, how, action in rows:
            started = time.perf_counter()
            stored = len(action())
            seconds = time.perf_counter() - started
            print(
                f"{str(dtype).removeprefix('torch.'):9} {name:22} {how:7} "
                f"ratio {stored / new.nbytes:.4f}  {new.nbytes / seconds / 1e9:5.2f} GB/s"
            )


def main() -> None:
    """Print a table, and a line of JSON last."""
    parser = argparse.ArgumentParser()
    parser.add_argument("--megabytes", type=int, default=268)
    parser.add_argument("--directory", type=Path)
    parser.add_argument("--encodings", action="store_true")
    arguments = parser.parse_args()
    if arguments.encodings:
        compare_encodings()
        return
    root = Path(tempfile.mkdtemp(dir=arguments.directory))
    try:
        figures = measure(root, max(1, round(arguments.megabytes * 1e6 / (ROWS * COLUMNS * 2))))
    finally:
        shutil.rmtree(root)
    print(json.dumps({name: round(value, 4) for name, value in figures.items()}))


if __name__ == "__main__":
    main()

"""One archive of a .distcp file: ours are read by torch and zip, torch's are read by us, damaged ones are refused."""

from __future__ import annotations

import io
import os
import zipfile
from collections.abc import Callable
from math import prod
from pathlib import Path

import pytest
import torch
from torch import Tensor

from megatron_rl.convert.hf.mapped import MappedFile, as_dtype
from megatron_rl.convert.offline.archive import ALIGNMENT, archive_of, read_archive

BEFORE = 37
"""Bytes of other archives that stand before ours in a file."""


def test_archives_are_those_of_torch_and_zip() -> None:
    for dtype, extent in ((torch.bfloat16, (1, 3, 5)), (torch.float32, (7,)), (torch.float16, (1, 1, 2, 64))):
        tensor = torch.randn(extent).to(dtype)
        raw = tensor.reshape(-1).view(torch.uint8).numpy().tobytes()
        frame = archive_of(dtype, extent)
        data = frame.head + raw + frame.tail
        assert len(data) == frame.num_bytes and len(frame.head) % ALIGNMENT == 0
        assert torch.equal(torch.load(io.BytesIO(data), weights_only=True), tensor)
        assert zipfile.ZipFile(io.BytesIO(data)).namelist()[-1] == "archive/data/0"


def saved(value: object) -> bytes:
    buffer = io.BytesIO()
    torch.save(value, buffer)
    return buffer.getvalue()


def read(path: Path, data: bytes, extent: tuple[int, ...]) -> Tensor:
    """Put an archive between other bytes of a file, and read the tensor at the place that is found."""
    path.write_bytes(b"x" * BEFORE + data + b"y" * 50)
    file = MappedFile(path)
    dtype, offset, strides = read_archive(file, BEFORE, len(data), extent)
    span = sum((n - 1) * step for n, step in zip(extent, strides, strict=True)) + 1 if prod(extent) else 0
    raw = file.bytes(offset, span * dtype.itemsize)
    return as_dtype(raw, dtype, (span,)).as_strided(extent, strides)


BASE = torch.arange(4 * 6 * 5, dtype=torch.float32).reshape(4, 6, 5)
TENSORS = {
    "float32": BASE,
    "bfloat16": BASE.bfloat16(),
    "transposed": BASE[1].t(),
    "part of a storage": BASE.bfloat16()[1:3, ::2, 1:4],
    "scalar": torch.tensor(3.5),
    "empty": torch.zeros(3, 0),
}


@pytest.mark.parametrize("name", TENSORS)
def test_a_tensor_is_found_as_torch_saved_it(name: str, tmp_path: Path) -> None:
    tensor = TENSORS[name]
    found = read(tmp_path / "file", saved(tensor), tuple(tensor.shape))
    assert found.dtype == tensor.dtype and torch.equal(found, tensor)


def rewritten(
    data: bytes, method: int = zipfile.ZIP_STORED, edit: Callable[[str, bytes], bytes] = lambda _name, content: content
) -> bytes:
    """The same archive, made again by Python's zipfile."""
    source, target = zipfile.ZipFile(io.BytesIO(data)), io.BytesIO()
    with zipfile.ZipFile(target, "w", method) as archive:
        for name in source.namelist():
            archive.writestr(name, edit(name, source.read(name)))
    return target.getvalue()


class Command:
    def __reduce__(self) -> tuple[Callable[[str], int], tuple[str]]:
        return os.system, ("touch executed",)


WHOLE = saved(BASE)
BAD: dict[str, tuple[bytes, str]] = {
    "cut at the end": (WHOLE[:-10], "not a zip file"),
    "cut in the pickle": (WHOLE[:200], "not a zip file"),
    "zeros": (bytes(len(WHOLE)), "not a zip file"),
    "compressed": (rewritten(WHOLE, zipfile.ZIP_DEFLATED), "compressed"),
    "big-endian": (rewritten(WHOLE, edit=lambda name, old: b"big" if "byteorder" in name else old), "big-endian"),
    "short storage": (rewritten(WHOLE, edit=lambda name, old: b"" if "data/" in name else old), "cut short"),
    "damaged pickle": (WHOLE.replace(b"_rebuild_tensor_v2", b"_rebuild_tensor_v9"), "more than a tensor"),
    "another shape": (saved(BASE[1:]), r"not \(4, 6, 5\)"),
    "a dict": (saved({"x": BASE}), "no tensor"),
    "a command": (saved(Command()), "more than a tensor"),
}


@pytest.mark.parametrize("name", BAD)
def test_what_is_damaged_or_of_another_kind_is_refused(
    name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    data, message = BAD[name]
    with pytest.raises(Exception, match=message):
        read(tmp_path / "file", data, (4, 6, 5))
    assert not (tmp_path / "executed").exists()

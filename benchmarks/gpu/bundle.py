"""Fill a folder with all that ``eight_minutes.py`` needs beside torch: ``make gpu-bundle``.

    python benchmarks/gpu/bundle.py [--environment .venv-gpu] [--target build/gpu-bundle] [--architecture 90]

For GPU machines that reach no network and to which little can be carried. Wheels come from requirements/gpu_bundle.txt.
Transformer Engine comes from an environment that has it built (``make check-gpu-env`` makes one); of its core library, which
holds code for seven architectures, one is kept: the others are overwritten with zeros, and compress to nothing.
"""

from __future__ import annotations

import argparse
import io
import lzma
import struct
import subprocess
import sys
import tarfile
from collections.abc import Iterator
from pathlib import Path

ROOT = Path(__file__).parents[2]
MOST_BYTES = 40 * 2**20
CORE = "libtransformer_engine.so"
_FATBIN_MAGIC = 0xBA55ED50
_ELF_CODE = 2
"""Kind of an entry that is machine code; 1 is PTX."""


def main() -> int:
    """Status 1 if the folder is larger than 40 MiB."""
    parser = argparse.ArgumentParser(description="What a GPU machine without a network needs.")
    parser.add_argument(
        "--environment", type=Path, default=ROOT / ".venv-gpu", help="has Transformer Engine; may be missing"
    )
    parser.add_argument("--target", type=Path, default=ROOT / "build" / "gpu-bundle")
    parser.add_argument("--architecture", type=int, default=90, help="compute capability: 90 for H100 and H200")
    arguments = parser.parse_args()
    arguments.target.mkdir(parents=True, exist_ok=True)
    for old in arguments.target.iterdir():
        old.unlink()
    download(arguments.target)
    found = sorted(arguments.environment.glob("lib/python3.*/site-packages"))
    if found:
        pack_transformer_engine(found[0], arguments.target / "transformer_engine.tar.xz", arguments.architecture)
    else:
        print(f"{arguments.environment} is not there: without Transformer Engine, so no FP8 (make check-gpu-env)")
    total = sum(path.stat().st_size for path in arguments.target.iterdir())
    num_files = len(list(arguments.target.iterdir()))
    print(f"{arguments.target}: {num_files} files, {total / 2**20:.1f} of at most {MOST_BYTES / 2**20:.0f} MiB")
    return int(total > MOST_BYTES)


def download(target: Path) -> None:
    """Fetch the wheels for Linux and Python 3.12."""
    command = [
        sys.executable, "-m", "pip", "download", "--quiet", "--disable-pip-version-check", "--no-deps", "--only-binary=:all:",
        "--python-version", "3.12", "--platform", "manylinux_2_28_x86_64", "--platform", "manylinux2014_x86_64",
        "--dest", str(target), "--requirement", str(ROOT / "requirements" / "gpu_bundle.txt"),
    ]  # fmt: skip
    subprocess.run(command, check=True)


def pack_transformer_engine(site: Path, archive: Path, architecture: int) -> None:
    """Pack the package with code for one architecture.

    Args:
        site: ``site-packages`` that has it.
        archive: to write.
        architecture: compute capability, 90 for 9.0.
    """
    with lzma.open(archive, "wb", preset=6) as packed, tarfile.open(fileobj=packed, mode="w") as tar:
        for path in sorted(site.glob("transformer_engine*")):
            for file in sorted(path.rglob("*")) if path.is_dir() else [path]:
                if not file.is_file() or "__pycache__" in file.parts:
                    continue
                name = str(file.relative_to(site))
                if file.name == CORE:
                    content = keep_only(file.read_bytes(), architecture)
                    entry = tarfile.TarInfo(name)
                    entry.size, entry.mode = len(content), 0o755
                    tar.addfile(entry, io.BytesIO(content))
                else:
                    tar.add(file, name, recursive=False)


def keep_only(library: bytes, architecture: int) -> bytes:
    """Return an ELF library whose GPU code for other architectures, and PTX, is zeros.

    Raises:
        ValueError: it has no code for that architecture.
    """
    kept = 0
    changed = bytearray(library)
    for kind, code_for, start, size in gpu_code(library):
        if kind == _ELF_CODE and code_for == architecture:
            kept += size
        else:
            changed[start : start + size] = bytes(size)
    if not kept:
        raise ValueError(f"no code for compute capability {architecture} in a library of {len(library)} bytes")
    return bytes(changed)


def gpu_code(library: bytes) -> Iterator[tuple[int, int, int, int]]:
    """Yield (kind, architecture, first byte, bytes) of all GPU code in the section ``.nv_fatbin`` of a 64-bit ELF file."""
    (table,) = struct.unpack_from("<Q", library, 0x28)
    entry_size, count, names_at = struct.unpack_from("<HHH", library, 0x3A)
    sections = [struct.unpack_from("<IIQQQQ", library, table + number * entry_size) for number in range(count)]
    names = sections[names_at][4]
    for name_at, _, _, _, start, size in sections:
        end_of_name = library.index(b"\0", names + name_at)
        if library[names + name_at : end_of_name] != b".nv_fatbin":
            continue
        at = start
        while at < start + size:
            (magic,) = struct.unpack_from("<I", library, at)
            if magic != _FATBIN_MAGIC:  # padding between two of them
                at += 8
                continue
            _, header, body = struct.unpack_from("<HHQ", library, at + 4)
            entry, at = at + header, at + header + body
            while entry < at:
                kind, _, entry_header, code_size = struct.unpack_from("<HHIQ", library, entry)
                (architecture,) = struct.unpack_from("<I", library, entry + 28)
                yield kind, architecture, entry + entry_header, code_size
                entry += entry_header + code_size


if __name__ == "__main__":
    sys.exit(main())

"""Rows of ``.parquet`` files, of folders that ``datasets`` can read, and of sets on the Hugging Face hub.

``datasets`` writes them as Arrow files into its cache once (``HF_DATASETS_CACHE``) and maps these into memory. So a set may be
larger than memory, and any row of it is read at once.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from megatron_rl.errors import UserError, described
from megatron_rl.tasks.rows.row import Row, as_json
from megatron_rl.tasks.rows.spec import Spec

CHUNK = 1000
"""Rows that are read together where all are read."""


class Table(Sequence[Row]):
    """The rows of a set."""

    def __init__(self, name: str, data: Any) -> None:
        """Take a ``datasets.Dataset``; ``name`` stands in errors."""
        self._name, self._data = name, data

    def __len__(self) -> int:
        return len(self._data)

    def __getitem__(self, index: Any) -> Any:
        index = range(len(self))[index]
        return Row(self.source(index), as_json(self._data[index]))

    def __iter__(self) -> Iterator[Row]:
        index = 0
        for chunk in self._data.iter(CHUNK):
            names = list(chunk)
            for values in zip(*chunk.values()):
                yield Row(self.source(index), as_json(dict(zip(names, values))))
                index += 1

    def source(self, index: int) -> str:
        """Name a row."""
        return f"{self._name} row {index}"


def first_parquet_row(path: Path) -> dict[str, Any]:
    """Return the first row of a parquet file, without ``datasets``: to look at its columns in the first second.

    Raises:
        UserError: the file is none, or is empty.
    """
    import pyarrow.parquet

    try:
        file = pyarrow.parquet.ParquetFile(path)
        for batch in file.iter_batches(batch_size=1):
            if batch.num_rows:
                return as_json(batch.slice(0, 1).to_pylist()[0])
    except (OSError, pyarrow.ArrowException) as error:
        raise _unreadable(str(path), error) from error
    raise UserError(str(path), None, "has no row", "give a file that has some")


def open_table(spec: Spec, *, field: str, split: str) -> Table:
    """Open a parquet file, a folder, or a set on the hub (``ORGANISATION/NAME:SUBSET:SPLIT``).

    Args:
        spec: what the key names.
        field: config key, for errors.
        split: taken where there are several and ``spec`` names none.

    Raises:
        UserError: it cannot be read; the hub cannot be reached, and its cache does not have the set.
    """
    import datasets

    path = Path(spec.path)
    try:
        if path.is_file():
            return Table(spec.path, datasets.load_dataset("parquet", data_files=str(path), split="train"))
        if path.is_dir():
            is_saved = any((path / name).is_file() for name in ("state.json", "dataset_dict.json"))
            found = datasets.load_from_disk(str(path)) if is_saved else datasets.load_dataset(str(path))
            return Table(spec.path, _split_of(found, None, split, spec, field))
    except UserError:
        raise
    except Exception as error:  # many kinds, of many libraries; all mean that the files are not what they should be
        raise _unreadable(spec.path, error) from error
    name, subset, chosen = [*spec.path.split(":"), None, None][:3]
    try:
        found = datasets.load_dataset(name, subset)
    except Exception as error:
        raise UserError(
            field,
            spec.text,
            f"is no file or folder here, and cannot be read as a set on the Hugging Face hub ({described(error)})",
            f"check the name and the network; or elsewhere: hf download --repo-type dataset {name} --local-dir FOLDER, "
            f"and {field}=FOLDER",
        ) from error
    return Table(spec.path, _split_of(found, chosen, split, spec, field))


def _split_of(found: Any, chosen: str | None, default: str, spec: Spec, field: str) -> Any:
    """Return one split of a set that may have several."""
    if not isinstance(found, Mapping):
        return found
    if chosen is None and len(found) == 1:
        return next(iter(found.values()))
    wanted = default if chosen is None else chosen
    candidates = (wanted, "validation", "test") if chosen is None and default != "train" else (wanted,)
    for name in candidates:
        if name in found:
            return found[name]
    rule = f"has the splits {', '.join(found)}, not {wanted}"
    fix = f"name one: {spec.path.split(':')[0]}:SUBSET:SPLIT" if not spec.is_local else "give the files of one split"
    raise UserError(field, spec.text, rule, fix)


def _unreadable(path: str, error: Exception) -> UserError:
    return UserError(
        path, None, f"cannot be read ({described(error)})", "see that the file is whole and what it should be"
    )

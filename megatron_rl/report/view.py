"""One self-contained HTML page of a run: curves, rollouts, evaluations, trees. To open, to send, to keep beside a result.

    <run>/metrics.jsonl, rollouts/*.jsonl, eval/*.jsonl, trees/*.json  -->  data  -->  view.html with view.css, view.js, data

The page loads nothing. It has at most ``MAX_BYTES``: of a long run every n-th step is in it, and page and caller say so. Files
of a run that is still going on may end in a torn line, which is left out.
"""

from __future__ import annotations

import json
import math
import re
from collections.abc import Iterator, Sequence
from importlib.resources import files
from itertools import accumulate
from pathlib import Path
from typing import Any

from megatron_rl.errors import UserError
from megatron_rl.files import disk_errors
from megatron_rl.metrics.rows import json_safe, read_metrics

MAX_BYTES = 20_000_000
_SHARE_OF_EVALUATIONS, _SHARE_OF_TREES, _FOR_THE_REST = 0.2, 0.3, 1_000_000
MAX_POINTS = 2000
"""Points of a curve."""
SERIES = (
    "reward/mean", "loss", "pass@1", "eval/greedy", "eval/pass@1", "response_length/mean", "response_length/cut_frac",
    "entropy/mean", "kl/old", "grad_norm", "lr", "groups/all_wrong_frac", "mismatch/log_prob_abs_diff", "time/step_s",
)  # fmt: skip
"""Metrics with a curve, where the run has them; those of named held-out sets come on top."""
_FOLDERS = {"eval": "eval/step_*.jsonl", "trees": "trees/step_*.json", "step": "rollouts/step_*.jsonl"}
_FIX = "give the folder of a run, or one file of its rollouts/, eval/ or trees/"


def write_page(source: Path, page: Path, *, step: int | None = None, max_bytes: int = MAX_BYTES) -> str:
    """Write the page of a run's folder, or of one file of it.

    Args:
        source: folder of a run, which may be going on; or a file of its ``rollouts/``, ``eval/`` or ``trees/``.
        page: the HTML file.
        step: show this step alone, with its evaluation and its trees.
        max_bytes: limit on the page.

    Returns:
        What is in the page and what was left out, in one line.

    Raises:
        UserError: there is nothing to show, a file is none of ours, or the page cannot be written.
    """
    found = _files(source, step)
    metrics = source / "metrics.jsonl"
    if not found and (step is not None or not metrics.is_file()):
        where = "no texts" if step is None else f"no texts of step {step}"
        raise UserError("RUN", str(source), f"holds {where}", _FIX)
    left = max_bytes - _FOR_THE_REST if max_bytes > 2 * _FOR_THE_REST else max_bytes // 2
    chunks: list[tuple[int, str, str]] = []
    notes: list[str] = []
    num_torn = 0
    for kind, share in (("eval", _SHARE_OF_EVALUATIONS), ("trees", _SHARE_OF_TREES), ("step", 1.0)):
        paths = [path for of_kind, path in found if of_kind == kind]
        made, note, torn = _fitting(kind, paths, int(left * share))
        chunks += [(_step_of(path), kind, text) for path, text in made]
        left -= sum(len(text.encode()) for _, text in made)
        num_torn += torn
        notes += [note] if note else []
    if num_torn:
        notes.append(f"{num_torn} torn or foreign {'line' if num_torn == 1 else 'lines'} left out")
    note = "; ".join([f"{len(chunks)} records", *notes])
    series = _series(metrics) if source.is_dir() else {}
    head = {"name": source.absolute().name, "note": note, "series": series}
    chunks.sort(key=lambda chunk: (chunk[0], chunk[1]))
    data = f'{_encoded(head)[:-1]}, "pages": [{", ".join(text for _, _, text in chunks)}]}}'
    with disk_errors(page, field="HTML", fix="name a file in a folder that exists"):
        page.write_bytes(_filled(data).encode())
    return note


def _files(source: Path, step: int | None) -> list[tuple[str, Path]]:
    """Return (kind, path) of the files to show, in the order of steps."""
    if source.is_file():
        kind = "trees" if source.suffix == ".json" else "eval" if source.absolute().parent.name == "eval" else "step"
        return [(kind, source)]
    if not source.is_dir():
        raise UserError("RUN", str(source), "does not exist", _FIX)
    found = [(kind, path) for kind, pattern in _FOLDERS.items() for path in sorted(source.glob(pattern))]
    return [(kind, path) for kind, path in found if step is None or _step_of(path) == step]


def _step_of(path: Path) -> int:
    match = re.search(r"(\d+)\.jsonl?$", path.name)
    return int(match.group(1)) if match else 0


def _fitting(kind: str, paths: Sequence[Path], budget: int) -> tuple[list[tuple[Path, str]], str, int]:
    """Return the encoded records of every n-th file, n as ``budget`` bytes allow, the last one among them; and a note on that.

    Also the number of torn lines.
    """
    if not paths:
        return [], "", 0
    total = sum(path.stat().st_size for path in paths)
    stride = max(1, math.ceil(total / budget))
    while True:
        chosen = paths[::-stride][::-1]  # the last step is always there
        made: list[tuple[Path, str]] = []
        torn = size = 0
        for path in chosen:
            text, num_torn, is_whole = _record(kind, path, budget)
            made, torn, size = [*made, (path, text)], torn + num_torn, size + len(text.encode())
            if size > budget and len(chosen) > 1:
                break
        if size <= budget or len(chosen) == 1:
            break
        stride *= 2
    what = {"eval": "evaluation", "trees": "step with trees", "step": "step"}[kind]
    note = f"one {what} in {stride}, of {len(paths)}" if stride > 1 else ""
    if not is_whole:
        note += f"{', ' if note else ''}the {what} is too large and was cut"
    return made, note, torn


def _record(kind: str, path: Path, budget: int) -> tuple[str, int, bool]:
    """Return one file as JSON for the page, the number of lines left out as torn, and whether all else fits the budget."""
    try:
        raw = path.read_bytes()
    except OSError as error:
        raise UserError("RUN", str(path), f"cannot be read ({error.strerror})", _FIX) from error
    if kind == "trees":
        record = _tree_record(path, raw)
        num_prompts = len(record["prompts"])
        while (text := _encoded({"kind": kind, "step": record["step"], "record": record})) and len(text) > budget:
            if not record["prompts"]:
                break
            record["prompts"] = record["prompts"][: len(record["prompts"]) // 2]
        return text, 0, len(record["prompts"]) == num_prompts
    lines, num_torn = [*_lines(raw)], 0
    rollouts = [line for line in lines if line is not None]
    num_torn = len(lines) - len(rollouts)
    if lines and not rollouts and num_torn > 1:
        raise UserError("RUN", str(path), "is no record of rollouts", _FIX)
    prompts: dict[str, int] = {}
    for rollout in rollouts:
        rollout["prompt"] = prompts.setdefault(rollout["prompt"], len(prompts))
    encoded = [_encoded(rollout) for rollout in rollouts]
    if sum(map(len, encoded)) > budget:  # texts say more than the numbers of tokens
        encoded = [_encoded({key: x for key, x in rollout.items() if key != "tokens"}) for rollout in rollouts]
    sizes = accumulate(len(text) for text in encoded)
    encoded = [text for text, size in zip(encoded, sizes) if size <= budget]
    head = _encoded({"kind": kind, "step": _step_of(path), "prompts": [*prompts]})[:-1]
    return f'{head}, "rollouts": [{", ".join(encoded)}]}}', num_torn, len(encoded) == len(rollouts)


def _lines(raw: bytes) -> Iterator[dict[str, Any] | None]:
    """Yield the rollouts of a file; None for a line that is none."""
    for line in raw.split(b"\n"):
        if not line.strip():
            continue
        try:
            found = json.loads(line)
        except ValueError:
            found = None
        is_ours = isinstance(found, dict) and all(isinstance(found.get(key), str) for key in ("prompt", "response"))
        yield found if is_ours else None


def _tree_record(path: Path, raw: bytes) -> dict[str, Any]:
    try:
        found = json.loads(raw)
        assert isinstance(found["step"], int) and isinstance(found["prompts"], list) and found["threshold"]
    except (ValueError, KeyError, TypeError, AssertionError) as error:
        raise UserError("RUN", str(path), f"is no record of a step ({type(error).__name__} {error})", _FIX) from error
    return found


def _series(metrics: Path) -> dict[str, list[tuple[int, float]]]:
    """Return [(step, value), ...] of each metric with a curve."""
    rows = read_metrics(metrics) if metrics.is_file() else []
    of_sets = {key for row in rows for key in row if re.fullmatch(r"eval/.+/(greedy|pass@1)", key)}
    series = {}
    for name in (*SERIES, *sorted(of_sets)):
        points = [
            (int(row["step"]), float(f"{row[name]:.5g}")) for row in rows if isinstance(row.get(name), int | float)
        ]
        if points:
            series[name] = points[:: max(1, math.ceil(len(points) / MAX_POINTS))]
    return series


def _encoded(value: object) -> str:
    """Return JSON that no text in it can lead out of a script element."""
    text = json.dumps(json_safe(value), ensure_ascii=False, allow_nan=False).replace("<", "\\u003c")
    return re.sub("[\ud800-\udfff]", "\ufffd", text)  # half of a pair is no character, and browsers choke on it


def _filled(data: str) -> str:
    """Return the page; what is put in first holds no place of what comes next."""
    room = files("megatron_rl.report")
    parts = {"CSS": room.joinpath("view.css").read_text(), "JS": room.joinpath("view.js").read_text(), "DATA": data}
    template = room.joinpath("view.html").read_text()
    return re.sub(r"/\*(CSS|JS|DATA)\*/", lambda match: parts[match[1]], template)

"""The folder of ``megatron-rl presample``: progress of the sampling, and its results.

    presample/
        settings.json            model, problems and sampling; another start with other settings is refused
        pool/                    the samples that are kept (data/pool.py); a shard for each chunk of problems that gave some
        chunks/000000.json       the verdict on each problem of a chunk; written after its shard
        exploration.jsonl        the rows of the problem file that are still to be learned (rehearsal only)
        summary.json             the split in numbers

A chunk is done when its file is there. A shard without one is of a run that was killed in between, and is sampled again.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from megatron_rl.data.chunked import begin, count_chunks, has_begun, read_json, write_json
from megatron_rl.data.pool import PoolWriter, Provenance, Trajectory, drop_shards_after, num_shards
from megatron_rl.errors import UserError
from megatron_rl.tasks.rows.copy import copy_rows
from megatron_rl.types import Problem

EXPLORATION = "exploration"
"""Fate of a problem that the model does not solve reliably."""
KEPT = "kept"
"""Fate of a problem that gave something to the pool."""


@dataclass(frozen=True)
class Verdict:
    """The result of sampling one problem."""

    problem_id: str
    num_correct: int
    """Number of right ones among the samples that were judged."""
    fate: str
    """``exploration``, ``kept``, or ``dropped: reason``."""


class PresampledFolder:
    """The folder as a program uses it: one process writes, all can ask which chunks are done.

    Args:
        directory: the folder, made if there is none.
        settings: what the samples depend on, as JSON.
        provenance: that of the samples.

    Raises:
        UserError: it was begun with other settings; from every method, it cannot be written.
    """

    def __init__(self, directory: Path, settings: Mapping[str, Any], provenance: Provenance) -> None:
        self.directory, self._provenance = directory, provenance
        fix = "give them as they were, or remove the folder, or use another exp_manager.name"
        if not has_begun(directory, settings, field="presample", fix=fix):
            if num_shards(self.pool):
                raise UserError(
                    "presample",
                    str(self.pool),
                    "holds a pool that was not begun here, which sampling would remove",
                    "move it, or use another exp_manager.name",
                )
            begin(directory, settings)

    @property
    def pool(self) -> Path:
        """Directory of the pool."""
        return self.directory / "pool"

    @property
    def exploration(self) -> Path:
        """Problem file of the problems still to be learned."""
        return self.directory / "exploration.jsonl"

    def num_done(self) -> int:
        """Return the number of chunks done; remove everything that a killed run has left after them."""
        done = count_chunks(self._chunk)
        drop_shards_after(self.pool, int(read_json(self._chunk(done - 1))["num_shards"]) if done else 0)
        return done

    def keep(self, chunk: int, verdicts: Sequence[Verdict], kept: Sequence[Trajectory]) -> None:
        """Record a chunk: its samples, then that it is done."""
        if kept:
            with PoolWriter(self.pool, self._provenance) as writer:
                for trajectory in kept:
                    writer.add(trajectory)
        shards = num_shards(self.pool)
        write_json(self._chunk(chunk), {"num_shards": shards, "verdicts": [asdict(verdict) for verdict in verdicts]})

    def verdicts(self) -> list[Verdict]:
        """Return the verdicts of all chunks, in the order of the problems."""
        paths = sorted((self.directory / "chunks").glob("[0-9]*.json"))
        return [Verdict(**verdict) for path in paths for verdict in read_json(path)["verdicts"]]

    def finish(self, problems: Sequence[Problem], files: Sequence[str], num_samples: int) -> dict[str, Any]:
        """Write ``exploration.jsonl``, if there are such problems, and ``summary.json``; return the summary.

        Args:
            problems: that were sampled on.
            files: that they come from.
            num_samples: of each.
        """
        verdicts = self.verdicts()
        fates = Counter(verdict.fate for verdict in verdicts)
        solved = Counter(verdict.num_correct for verdict in verdicts)
        summary = {
            "num_problems": len(verdicts),
            "fates": dict(sorted(fates.items())),
            "problems_by_num_correct": [solved[count] for count in range(num_samples + 1)],
        }
        chosen = {verdict.problem_id for verdict in verdicts if verdict.fate == EXPLORATION}
        if chosen:
            sources = {problem.source for problem in problems if problem.problem_id in chosen}
            copy_rows(files, sources, self.exploration, field="data.train")
        write_json(self.directory / "summary.json", summary)
        return summary

    def _chunk(self, number: int) -> Path:
        return self.directory / "chunks" / f"{number:06d}.json"

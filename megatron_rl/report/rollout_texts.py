"""RolloutTexts: what the model wrote, one JSON line a rollout, for ``megatron-rl view`` and for ``grep``.

    groups, rows --take--> kept (the first groups) --write--> <run>/rollouts/step_00000003.jsonl
    held-out groups --write_evaluation----------------------> <run>/eval/step_00000003.jsonl

Fields of a line: docs/view.md. A rollout is found among the rows by the tensor of its token ids, which both share; the path to
a leaf of a tree is made of several rows, one for each piece. A kill while a line is written leaves it torn: readers leave
it out, and a resume removes the file if its step comes again.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from itertools import chain
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from megatron_rl.config.trainer import RolloutTextsConfig
from megatron_rl.files import SAME_COMMAND, disk_errors
from megatron_rl.metrics.rows import json_safe
from megatron_rl.report.token_texts import TokenTexts
from megatron_rl.rewards.correct import is_correct
from megatron_rl.types import RolloutGroup, RowKind, Score, TrainingSample, TreeNode

FIELD = "exp_manager.rollout_texts"
NUM_SAMPLES = 3
"""Samples of a held-out problem beside its greedy response: many problems say more than many samples."""
NUM_REHEARSED = 4
"""Rows of a step that belong to no group, such as rehearsed ones."""
Line = dict[str, Any]
EvaluatedGroups = tuple[Sequence[RolloutGroup], Sequence[RolloutGroup]]


@dataclass(frozen=True)
class _RolloutPiece:
    """Tokens that were sampled at once, and the training row that they became, if any."""

    response_ids: Tensor
    rollout_log_probs: Tensor | None
    row: TrainingSample | None


@dataclass(frozen=True)
class _Kept:
    """A rollout, or a stored row, that will be written."""

    origin: str
    group: int
    prompt_ids: Tensor
    about: Mapping[str, str]
    """``problem_id``, ``answer`` and ``set``, where they are known."""
    pieces: Sequence[_RolloutPiece]
    score: Score
    finish: str
    weight_version: int
    borders: Sequence[tuple[int, float | None]] = ()
    """(tokens before it, value) of each segment or piece."""


class RolloutTexts:
    """Writes the texts of a run, on the one rank that writes."""

    def __init__(self, settings: RolloutTextsConfig, directory: Path, tokenizer: Any) -> None:
        """Args: the settings; the run's folder; the run's tokenizer."""
        self.settings, self._directory, self._tokenizer = settings, directory, tokenizer
        self._texts = TokenTexts(tokenizer)
        self._kept: list[_Kept] = []
        self._last_prompt: tuple[Tensor | None, str] = None, ""

    def is_due(self, step: int) -> bool:
        """Tell whether the texts of a step, counted from 1, are written; the same on every rank."""
        return self.settings.every_n_steps > 0 and step % self.settings.every_n_steps == 0

    def take(self, groups: Sequence[RolloutGroup], samples: Sequence[TrainingSample]) -> None:
        """Keep what will be written of a step; the groups need not live on.

        Args:
            groups: of the step.
            samples: its rows. They may get their advantages later.
        """
        rows = {id(sample.response_ids): sample for sample in samples}
        stored: dict[int, list[_Kept]] = {}
        for sample in samples:
            if sample.kind in (RowKind.REPLAY, RowKind.REHEARSAL):
                index = sample.group_index
                about = _about(groups[index]) if index >= 0 else {}
                stored.setdefault(index, []).append(_stored(sample, about))
        members = [[*_members(group, i, rows), *stored.get(i, ())] for i, group in enumerate(groups)]
        self._kept = [*self._first(members), *stored.get(-1, [])[:NUM_REHEARSED]]

    def write(self, step: int) -> list[Line]:
        """Write what was kept as the file of a step, and return its lines without token details.

        Raises:
            UserError: the file cannot be written.
        """
        kept, self._kept = self._kept, []
        return self._write(self._directory / "rollouts" / f"step_{step:08d}.jsonl", step, kept) if kept else []

    def write_evaluation(self, step: int, sets: Mapping[str, EvaluatedGroups]) -> None:
        """Write responses to held-out problems: of each the greedy one, and the first few samples.

        Args:
            step: steps trained.
            sets: by name of the held-out set ("" for one without a name) its sampled groups, in the order of the problems, and
                its groups of one greedy response in the same order, or none. Each set has ``max_rollouts``.

        Raises:
            UserError: the file cannot be written.
        """
        if self.settings.every_n_steps == 0:
            return
        kept: list[_Kept] = []
        for name, (sampled, greedy) in sets.items():
            members: list[list[_Kept]] = []
            label = {"set": name} if name else {}
            for i, group in enumerate(sampled, start=len(kept)):
                few = RolloutGroup(group.prompt, group.rollouts[:NUM_SAMPLES])
                decoded = [*_members(greedy[len(members)], i, {}, origin="greedy")] if greedy else []
                members.append([*decoded, *_members(few, i, {}, origin="sample")])
            kept += [replace(one, about={**label, **one.about}) for one in self._first(members)]
        self._write(self._directory / "eval" / f"step_{step:08d}.jsonl", step, kept)

    def _first(self, members: Sequence[Sequence[_Kept]]) -> list[_Kept]:
        """Return the rollouts of the first whole groups; of the first one as many as there may be."""
        most, kept = self.settings.max_rollouts, list[_Kept]()
        for group in members:
            if kept and len(kept) + len(group) > most:
                break
            kept += group[:most]
        return kept

    def _write(self, path: Path, step: int, kept: Sequence[_Kept]) -> list[Line]:
        lines, written, size = list[Line](), list[bytes](), 0
        limit = 1000 * self.settings.max_kb_per_step
        groups = list(dict.fromkeys(one.group for one in kept))
        for group in groups:
            chosen = [one for one in kept if one.group == group]
            with_tokens = group in groups[: self.settings.groups_with_tokens] and group >= 0
            made = [self._line(one, step, with_tokens=with_tokens) for one in chosen]
            encoded: list[bytes] = []
            for line in made:
                data = encode(line)
                details = line.pop("tokens", None)
                if details is not None and size + sum(map(len, encoded)) + len(data) > limit / 2:
                    data = encode(line)
                encoded.append(data)
            if written and size + sum(map(len, encoded)) > limit:
                break
            for line, data in zip(made, encoded):
                if not written or size + len(data) <= limit:
                    lines.append(line)
                    written.append(data)
                    size += len(data)
        fix = f"{SAME_COMMAND}, or set {FIELD}.every_n_steps=0"
        with disk_errors(path, field=FIELD, fix=fix):
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_bytes(b"".join(written))
        return lines

    def _prompt(self, prompt_ids: Tensor) -> str:
        """Decode a prompt as the model read it; the rollouts of a group share it."""
        if self._last_prompt[0] is not prompt_ids:
            self._last_prompt = prompt_ids, self._tokenizer.decode(prompt_ids.tolist())
        return self._last_prompt[1]

    def _line(self, one: _Kept, step: int, *, with_tokens: bool) -> Line:
        ids = [token for piece in one.pieces for token in piece.response_ids.tolist()]
        rows = [piece.row for piece in one.pieces if piece.row is not None]
        score = one.score
        line: Line = {
            "step": step,
            "origin": one.origin,
            "group": one.group,
            **one.about,
            "prompt": self._prompt(one.prompt_ids),
            "response": self._tokenizer.decode(ids, skip_special_tokens=True),
            "found": score.answer,
            "reward": None if score.is_failure else score.reward,
            "parts": score.parts,
            "verdict": "failed" if score.is_failure else "right" if is_correct(score) else "wrong",
            "reason": score.reason,
            "finish": one.finish,
            "prompt_tokens": len(one.prompt_ids),
            "response_tokens": len(ids),
            "weight_version": one.weight_version,
        }
        trained = [row for row in rows if row.advantages is not None]
        if trained:
            in_loss = torch.cat([_in_loss(row, row.advantages) for row in trained])
            line["advantage"] = round(float(in_loss.mean()), 4) if len(in_loss) else None
        if one.borders:
            line["borders"] = [[n, None if value is None else round(value, 4)] for n, value in one.borders]
        if with_tokens:
            line["tokens"] = {"text": self._texts.of(ids), **_vectors(one.pieces)}
        return line


def encode(line: Line) -> bytes:
    """Return one line of JSON, ended; whatever the texts hold it is one line, and valid."""
    try:
        text = json.dumps(line, ensure_ascii=False, allow_nan=False)
    except ValueError:
        text = json.dumps(json_safe(line), ensure_ascii=False, allow_nan=False)
    for separator in ("\x85", "\u2028", "\u2029"):  # where some readers end a line
        text = text.replace(separator, f"\\u{ord(separator):04x}")
    try:
        return text.encode() + b"\n"
    except UnicodeEncodeError:  # half of a surrogate pair
        return json.dumps(json.loads(text)).encode() + b"\n"


def _about(group: RolloutGroup) -> dict[str, str]:
    return {"problem_id": group.prompt.problem.problem_id, "answer": group.prompt.problem.answer}


def _members(
    group: RolloutGroup, index: int, rows: Mapping[int, TrainingSample], *, origin: str = "rollout"
) -> Iterator[_Kept]:
    """Yield the rollouts of a group; of a tree the path to each leaf."""
    prompt_ids, about = group.prompt.prompt_ids, _about(group)
    if group.tree is None:
        for rollout in group.rollouts:
            completion, states = rollout.completion, rollout.states
            piece = _RolloutPiece(completion.response_ids, completion.log_probs, rows.get(id(completion.response_ids)))
            yield _Kept(
                origin, index, prompt_ids, about, [piece], rollout.score, completion.finish_reason,
                completion.weight_version, [(state.num_tokens, state.value) for state in states],
            )  # fmt: skip
        return
    for path in _paths(group.tree):
        completions = [node.completion for node in path if node.completion is not None]
        score = path[-1].score
        assert score is not None, "a leaf has a score"
        pieces = [_RolloutPiece(c.response_ids, c.log_probs, rows.get(id(c.response_ids))) for c in completions]
        starts = [sum(len(c.response_ids) for c in completions[:n]) for n in range(len(completions))]
        borders = [(start, node.value) for start, node in zip(starts, path)]
        last = completions[-1]
        yield _Kept(
            origin, index, prompt_ids, about, pieces, score, last.finish_reason,
            min(c.weight_version for c in completions), borders,
        )  # fmt: skip


def _paths(root: TreeNode) -> Iterator[list[TreeNode]]:
    """Yield the nodes from the root to each leaf, in order."""
    for child in root.children:
        yield from ([root, *path] for path in _paths(child)) if child.children else [[root, child]]


def _stored(sample: TrainingSample, about: Mapping[str, str]) -> _Kept:
    """Return a row that no rollout of this step became."""
    is_replay = sample.kind is RowKind.REPLAY
    score = Score(sample.reward if is_replay else 0.0, reason="stored", is_failure=not is_replay)
    piece = _RolloutPiece(sample.response_ids, sample.rollout_log_probs, sample)
    return _Kept(
        sample.kind.name.lower(), sample.group_index, sample.prompt_ids, about, [piece], score, sample.finish_reason,
        sample.weight_version,
    )  # fmt: skip


def _in_loss(row: TrainingSample, values: Tensor | None) -> Tensor:
    """Return the values of the tokens in the loss."""
    assert values is not None
    return values if row.loss_mask is None else values[row.loss_mask]


def _vectors(pieces: Sequence[_RolloutPiece]) -> Line:
    """Return the numbers of each token, as short as JSON has them; what is not known is absent."""
    found: Line = {}
    if all(piece.rollout_log_probs is not None for piece in pieces):
        found["engine_log_prob"] = _joined(piece.rollout_log_probs for piece in pieces)
    rows = [piece.row for piece in pieces]
    for key, name in (("log_prob", "old_log_probs"), ("entropy", "entropy")):
        vectors = [None if row is None else getattr(row, name) for row in rows]
        if any(vector is not None for vector in vectors):
            sizes = [len(piece.response_ids) for piece in pieces]
            found[key] = [*chain(*(([None] * n if v is None else _rounded(v)) for v, n in zip(vectors, sizes)))]
    if any(row is not None and row.advantages is not None for row in rows):
        zero = [torch.zeros(len(piece.response_ids)) for piece in pieces]
        filled = [z if row is None or row.advantages is None else row.advantages for row, z in zip(rows, zero)]
        advantages = _joined(filled)
        found["advantage"] = advantages[0] if len(set(advantages)) == 1 else advantages
        mask = torch.cat([_mask(piece) for piece in pieces])
        if not bool(mask.all()):
            found["mask"] = "".join("1" if is_in else "0" for is_in in mask.tolist())
    return found


def _mask(piece: _RolloutPiece) -> Tensor:
    """Return the tokens that this step's loss had, [R] bool."""
    size, row = len(piece.response_ids), piece.row
    if row is None or row.weights is None:  # an edge without advantage, or one that waits for a later step
        return torch.zeros(size, dtype=torch.bool)
    return torch.ones(size, dtype=torch.bool) if row.loss_mask is None else row.loss_mask


def _joined(vectors: Any) -> list[float]:
    return [*chain(*map(_rounded, vectors))]


def _rounded(vector: Tensor) -> list[float]:
    return [round(x, 4) for x in vector.tolist()]

"""A step's trees or chains as one JSON file: the text, with value and advantage of each piece.

    {"step": 3, "threshold": 0.9, "prompts": [{"problem_id", "prompt", "answer", "tree": [piece, ...]}, ...]}
    piece = {"tokens": [[text, probability], ...], "value": before it or null, "advantage", "end": why it ended,
             "reward" and "reason" of a last piece, "pieces": [what follows, ...]}

Chains have "chains": [[piece, ...], ...] in the place of "tree", the segments of a rollout in a row. Values and advantages are
before whitening. Tokens below the threshold are those that the policy was not sure of.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from torch import Tensor

from megatron_rl.advantages.segment import segment_advantages
from megatron_rl.advantages.tree import edges
from megatron_rl.config.methods.spo import EdgeAdvantage, SegmentConfig
from megatron_rl.files import SAME_COMMAND, disk_errors, write_atomic
from megatron_rl.report.token_texts import TokenTexts
from megatron_rl.types import Completion, Rollout, RolloutGroup, Score, TreeNode

Piece = dict[str, Any]


def record_step(
    directory: Path,
    groups: Sequence[RolloutGroup],
    tokenizer: Any,
    settings: SegmentConfig,
    *,
    step: int,
    shaped: Callable[[float, int], float],
    advantage: EdgeAdvantage = "raw",
) -> None:
    """Write the record of a step into a run's folder, where ``algorithm.save_every_n_steps`` asks for it.

    Raises:
        UserError: it cannot be written.
    """
    if settings.save_every_n_steps and step % settings.save_every_n_steps == 0:
        path, threshold = directory / "trees" / f"step_{step:08d}.json", settings.sure_from
        write_record(path, groups, tokenizer, step=step, threshold=threshold, shaped=shaped, advantage=advantage)


def write_record(
    path: Path,
    groups: Sequence[RolloutGroup],
    tokenizer: Any,
    *,
    step: int,
    threshold: float = 0.9,
    shaped: Callable[[float, int], float] = lambda reward, _num_tokens: reward,
    advantage: EdgeAdvantage = "raw",
) -> None:
    """Write the groups of one step atomically.

    Args:
        path: the file; its folder is made.
        groups: with trees, or with rollouts that have states.
        tokenizer: the run's.
        step: counted from 1.
        threshold: probability of the mask, or of the cut points if there is no mask.
        shaped: maps (reward, number of tokens) to the shaped reward, which values are means of.
        advantage: kind of advantage of a tree's edges.

    Raises:
        UserError: the file cannot be written.
    """
    texts_of = TokenTexts(tokenizer).of
    prompts = [
        {
            "problem_id": group.prompt.problem.problem_id,
            "prompt": group.prompt.problem.prompt,
            "answer": group.prompt.problem.answer,
        }
        | (
            {"tree": _of_tree(group.tree, advantage, texts_of)}
            if group.tree is not None
            else {"chains": [_of_chain(rollout, shaped, texts_of) for rollout in group.rollouts]}
        )
        for group in groups
    ]
    fix = f"{SAME_COMMAND}, or set algorithm.save_every_n_steps=0"
    with disk_errors(path, field="algorithm.save_every_n_steps", fix=fix):
        write_atomic(path, json.dumps({"step": step, "threshold": threshold, "prompts": prompts}))


def _of_tree(root: TreeNode, advantage: EdgeAdvantage, texts_of: Callable[[Sequence[int]], list[str]]) -> list[Piece]:
    pieces: dict[int, Piece] = {id(root): {"pieces": []}}
    for edge in edges(root, advantage):
        parent = edge.path[-1] if edge.path else root
        completion = edge.node.completion
        assert completion is not None
        piece = _piece(completion.response_ids, completion.log_probs, parent.value, edge.advantage, texts_of)
        if edge.node.score is not None:
            piece |= _ending(edge.node.score, completion)
        pieces[id(edge.node)] = piece
        pieces[id(parent)]["pieces"].append(piece)
    return pieces[id(root)]["pieces"]


def _of_chain(
    rollout: Rollout, shaped: Callable[[float, int], float], texts_of: Callable[[Sequence[int]], list[str]]
) -> list[Piece]:
    completion, score = rollout.completion, rollout.score
    log_probs = completion.log_probs if rollout.policy_log_probs is None else rollout.policy_log_probs
    num_tokens = len(completion.response_ids)
    reward = None if score.is_failure else shaped(score.reward, num_tokens)
    advantages = segment_advantages(rollout.states, reward, num_tokens)
    known = [(state.num_tokens, state.value) for state in rollout.states if state.value is not None]
    starts: list[tuple[int, float | None]] = [*([] if known and known[0][0] == 0 else [(0, None)]), *known]
    ends = [*(start for start, _ in starts[1:]), num_tokens]
    pieces = [
        _piece(completion.response_ids[start:end], log_probs[start:end], value, float(advantages[start]), texts_of)
        for (start, value), end in zip(starts, ends)
    ]
    pieces[-1] |= _ending(score, completion)
    return pieces


def _piece(
    ids: Tensor,
    log_probs: Tensor,
    value: float | None,
    advantage: float,
    texts_of: Callable[[Sequence[int]], list[str]],
) -> Piece:
    tokens = [[text, round(p, 4)] for text, p in zip(texts_of(ids.tolist()), log_probs.exp().tolist())]
    return {"tokens": tokens, "value": value, "advantage": round(advantage, 4), "pieces": []}


def _ending(score: Score, completion: Completion) -> Piece:
    return {
        "reward": None if score.is_failure else score.reward,
        "reason": score.reason,
        "end": completion.finish_reason,
    }

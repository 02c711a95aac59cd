"""Rollouts for people who look at a console or a tracker: shortened, and harmless whatever the model wrote."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

COLUMNS = (
    "origin", "group", "problem_id", "prompt", "response", "answer", "found", "reward", "verdict", "reason", "finish",
    "response_tokens", "advantage", "weight_version",
)  # fmt: skip
"""Fields of a rollout that trackers show, in this order."""
PROMPT_END, RESPONSE_START, RESPONSE_END, MAX_LINES = 200, 700, 300, 20
"""Characters, and lines of a response, that the console shows."""
TRACKER_CHARACTERS = 4000
"""Characters of a text that trackers get."""

Rollout = Mapping[str, Any]


def on_console(step: int, rollout: Rollout) -> str:
    """Return some lines: what it is, the end of its prompt, its response and what that earned."""
    reward = "no reward" if rollout.get("reward") is None else f"reward {rollout['reward']:g}"
    reason = f" ({rollout['reason']})" if rollout.get("reason") else ""
    head = f"step {step}, {rollout['origin']} of group {rollout['group']}: {reward}{reason}, "
    head += f"{rollout['response_tokens']} tokens, {rollout['finish']}, answer {rollout.get('answer', '?')}"
    prompt = printable(rollout["prompt"])
    if len(prompt) > PROMPT_END:
        prompt = f"[{len(prompt) - PROMPT_END} characters] {prompt[-PROMPT_END:]}"
    return f"{printable(head)}\n{_indented(prompt, '  | ')}\n{_indented(_shortened(printable(rollout['response'])), '  > ')}"


def table(rollouts: Sequence[Rollout]) -> list[list[Any]]:
    """Return a row of ``COLUMNS`` for each rollout; long texts are shortened."""
    return [
        [shortened(value) if isinstance(value := rollout.get(name), str) else value for name in COLUMNS]
        for rollout in rollouts
    ]


def shortened(text: str) -> str:
    """Return a text that a tracker takes: not too long, and no half of a surrogate pair."""
    whole = text.encode(errors="replace").decode()
    rest = len(whole) - TRACKER_CHARACTERS
    return whole if rest <= 0 else f"{whole[:TRACKER_CHARACTERS]} [{rest} more characters]"


def printable(text: str) -> str:
    """Replace what could move the cursor or colour a terminal."""
    return "".join(char if char.isprintable() or char == "\n" else "\ufffd" for char in text.replace("\t", "    "))


def _shortened(text: str) -> str:
    if len(text) > RESPONSE_START + RESPONSE_END:
        left_out = len(text) - RESPONSE_START - RESPONSE_END
        text = f"{text[:RESPONSE_START]}\n[{left_out} characters]\n{text[-RESPONSE_END:]}"
    lines = text.split("\n")
    if len(lines) > MAX_LINES:
        half = MAX_LINES // 2
        lines = [*lines[:half], f"[{len(lines) - 2 * half} lines]", *lines[-half:]]
    return "\n".join(lines)


def _indented(text: str, mark: str) -> str:
    return "\n".join(mark + line for line in text.split("\n"))

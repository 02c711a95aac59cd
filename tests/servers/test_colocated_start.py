"""Colocated servers start only while the trainer has released its memory: at first, after a death in an update, at a resume."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import pytest

from tests.servers.planted_gate import NOTES
from tests.servers.test_own_servers import LIMIT_S, Started, check_steps, start  # noqa: F401  a fixture

pytestmark = pytest.mark.timeout(2 * LIMIT_S)


def check_starts(notes: Path) -> list[str]:
    """Return what happened, in order; whenever a server started, both ranks had released their memory."""
    events = sorted(map(json.loads, notes.read_text().splitlines()), key=lambda event: event["time"])
    last: dict[int, str] = {}
    for event in events:
        if event["what"] == "server starts":
            assert last == {0: "released", 1: "released"}, events
        elif event["what"] != "server killed":
            last[event["rank"]] = event["what"]
    return [event["what"] for event in events]


def test_servers_start_when_the_trainer_has_made_room(
    start: Callable[..., Started],  # noqa: F811
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setenv(NOTES, str(tmp_path / "notes"))
    program = Path(__file__).with_name("planted_gate.py")
    # One server on two CPU ranks; on GPUs each would have its own.
    given = ("rollout.servers.placement=colocated", "rollout.max_new_tokens=50", "algorithm.overlong.buffer=50")
    run = start(*given, "trainer.max_steps=2", program=program)
    assert run.end() == 0
    check_steps(run, 2)
    happened = check_starts(tmp_path / "notes")
    assert happened.count("server starts") == 2 and happened.index("takes") < happened.index("server starts")
    after = happened[happened.index("server killed") :]
    assert after.index("released") < after.index("server starts")
    assert sum(row["rollout/server_restarts"] for row in run.rows()) == 1
    assert "once the trainer has released its memory" in run.output.read_text()
    # Resumed: the checkpoint is read before the server starts.
    (tmp_path / "notes").unlink()
    run = start(*given, "trainer.max_steps=3", program=program)
    assert run.end() == 0
    check_steps(run, 3)
    assert check_starts(tmp_path / "notes").count("server starts") == 1

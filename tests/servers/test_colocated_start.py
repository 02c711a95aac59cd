"""Colocated servers start only while the trainer has released its memory: at first, after a death in an update, at a resume."""

from __future__ import annotations

import json
import os
from collections.abc import Callable
from pathlib import Path

import pytest

from tests.e2e.conftest import Case
from tests.forked import run_ranks
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


def test_a_supervised_run_makes_room_for_each_evaluation(case: Case) -> None:
    """Nothing else is sampled, so that servers have released their memory while it trains."""
    overrides = (
        "trainer.stage=sft", "trainer.max_steps=2", "rollout.engine=sglang", "rollout.servers.placement=colocated",
        "rollout.sglang_cfg.max_total_tokens=8192", f"data.validation={case.held_out}", "eval.every_n_steps=1",
        "eval.num_problems=2", "eval.k_values=[1]", "rollout.max_new_tokens=8", "policy.train_micro_batch_tokens=512",
    )  # fmt: skip
    arguments = case.with_algorithm("{name: sft}").arguments(*overrides)
    assert run_ranks(run_noted, 1, arguments, case.root / "notes", timeout_s=LIMIT_S) == [0]
    happened = [line["what"] for line in map(json.loads, (case.root / "notes").read_text().splitlines())]
    assert happened.count("server starts") == 1
    # Built; then of each step: its update, room for the evaluation, the servers' memory back.
    kept = [what for what in happened if what in ("released", "server starts", "servers release", "updated")]
    first, second = kept.index("updated"), len(kept) - 1 - kept[::-1].index("updated")
    assert "server starts" not in kept[:first] and "released" not in kept[:first]
    between = kept[first + 1 : second]
    assert between.index("released") < between.index("server starts") < between.index("servers release")


def run_noted(arguments: list[str], notes: Path) -> int:
    from megatron_rl import train
    from megatron_rl.rollout.sglang.fleet import Fleet
    from tests.servers import planted_gate

    os.environ |= {NOTES: str(notes), "RANK": "0"}
    planted_gate.FATAL_UPDATE = 0
    planted_gate.plant()
    from megatron_rl.model.trainable import Trainable

    release, update = Fleet.release_memory, Trainable.update

    async def noted_release(fleet: Fleet) -> None:
        await release(fleet)
        planted_gate.note("servers release")

    def noted_update(trainable: Trainable, loss: float) -> dict[str, float]:
        planted_gate.note("updated")
        return update(trainable, loss)

    Fleet.release_memory = noted_release  # type: ignore[method-assign]
    Trainable.update = noted_update  # type: ignore[method-assign]
    return train.main(["--config", *arguments])

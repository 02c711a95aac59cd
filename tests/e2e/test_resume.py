"""What a restart continues: schedule, branch, changed settings. Killed means SIGKILL, between two checkpoints."""

from __future__ import annotations

import json
import os
import signal
import time
from pathlib import Path

import pytest

from tests.e2e.conftest import Case, run_main
from tests.forked import run_ranks
from tests.tiny_models import make_tiny_model

ONE_UPDATE_A_STEP = "policy.train_global_batch_size=16"


def main_killed_after(arguments: list[str], step: int) -> int:
    from megatron_rl.run import Run

    finish_step = Run.finish_step

    def finish_and_die(run: Run, done: int, *rest: object) -> None:
        finish_step(run, done, *rest)  # type: ignore[arg-type]
        if done == step:
            os.kill(os.getpid(), signal.SIGKILL)

    Run.finish_step = finish_and_die  # type: ignore[assignment]
    return run_main(arguments)


def kill_after(case: Case, step: int, *overrides: str, ranks: int = 1) -> None:
    arguments = case.arguments(f"trainer.devices={ranks}", *overrides)
    with pytest.raises(AssertionError, match="SIGKILL"):
        run_ranks(main_killed_after, ranks, arguments, step, timeout_s=120)


def steps_of(case: Case, name: str = "tiny") -> list[int]:
    """Numbers of the checkpoints, without those set aside."""
    return sorted(int(path.name[-8:]) for path in (case.root / name / "checkpoints").glob("step_*"))


def test_killed_inside_the_warm_up_the_schedule_goes_on(case: Case) -> None:
    sched = "policy.optim.sched={name: cosine, warmup_updates: 5, decay_updates: 8}"
    overrides = [sched, "trainer.max_steps=8", ONE_UPDATE_A_STEP]
    case.run("exp_manager.name=whole", *overrides, ranks=2)
    overrides.append("exp_manager.checkpoint_callback_params.async_save=true")
    kill_after(case, 3, *overrides, ranks=2)
    assert steps_of(case) == [2], "written while the third step was done"
    assert case.run(*overrides, ranks=2) == [0, 0]
    assert case.rows() == case.rows("whole")
    assert [row["lr"] for row in case.rows()[:5]] == pytest.approx([2e-4, 4e-4, 6e-4, 8e-4, 1e-3])
    assert case.rows()[-1]["lr"] == 0.0


def main_ended_by_an_error(arguments: list[str], step: int) -> int:
    from megatron_rl.errors import UserError
    from megatron_rl.run import Run

    samples = Run.samples

    def fail(run: Run, groups: list, index: int) -> list:
        if index + 1 == step:
            raise UserError("rollout.servers.max_restarts", 20, "is spent", "see the log")
        return samples(run, groups, index)

    Run.samples = fail  # type: ignore[assignment,method-assign]
    return run_main(arguments)


def test_an_error_in_the_next_step_does_not_lose_a_checkpoint(case: Case, capfd: pytest.CaptureFixture[str]) -> None:
    behind = "exp_manager.checkpoint_callback_params.async_save=true"
    arguments = case.arguments("trainer.devices=2", "trainer.max_steps=8", behind)
    assert run_ranks(main_ended_by_an_error, 2, arguments, 3, timeout_s=120) == [2, 2]
    captured = capfd.readouterr()
    assert "checkpoint" in captured.out and "max_restarts = 20: is spent" in captured.err
    assert steps_of(case) == [2]


def test_a_rollback_keeps_what_it_writes_and_resumes_on_its_own_branch(
    case: Case, capfd: pytest.CaptureFixture[str]
) -> None:
    every = "exp_manager.checkpoint_callback_params={every_n_train_steps: 2, keep_last: 4}"
    case.run("trainer.max_steps=6", every)
    old = case.rows()
    back = [
        f"exp_manager.resume_from_checkpoint={case.root}/tiny/checkpoints/step_00000002",
        "exp_manager.checkpoint_callback_params={every_n_train_steps: 2, keep_last: 1}",
        "trainer.max_steps=8",
        "policy.optim.lr=5.0e-4",
    ]
    kill_after(case, 5, *back, ranks=2)
    output = capfd.readouterr().out
    assert "settings changed" in output
    assert "this run does not continue step_00000004, step_00000006: moved, with its metrics, to " in output
    assert steps_of(case) == [4], "keep_last counts the branch just written"
    [aside] = (case.root / "tiny").glob("abandoned_*")
    assert len(list(aside.glob("checkpoints/step_0000000[46]"))) == 2
    assert [row["step"] for row in map(json.loads, (aside / "metrics.jsonl").open())] == [1, 2, 3, 4, 5, 6]
    assert case.run(*back, ranks=2) == [0, 0]
    output = capfd.readouterr().out
    assert "settings changed" not in output
    assert "taking step_00000004 of this run, which descends from" in output and "resuming after step 4" in output
    assert [row["lr"] for row in case.rows()] == [1e-3] * 2 + [5e-4] * 6
    assert case.rows()[:2] == old[:2] and steps_of(case) == [8]


def test_an_explicit_checkpoint_of_another_run_is_taken_once(case: Case, capfd: pytest.CaptureFixture[str]) -> None:
    case.run("trainer.max_steps=2")
    start = [
        "exp_manager.name=second",
        f"exp_manager.resume_from_checkpoint={case.root}/tiny/checkpoints/step_00000002",
        "trainer.max_steps=6",
    ]
    kill_after(case, 5, *start)
    output = capfd.readouterr().out
    assert "taking the explicit checkpoint" in output and "resuming after step 2" in output
    assert case.run(*start) == [0]
    assert "resuming after step 4" in capfd.readouterr().out


def test_changed_settings_apply_and_are_named(case: Case, capfd: pytest.CaptureFixture[str]) -> None:
    case.run("trainer.max_steps=2", ONE_UPDATE_A_STEP)
    capfd.readouterr()
    changed = [
        ONE_UPDATE_A_STEP,
        "policy.optim.lr=8.0e-4",
        "policy.optim.min_lr=1.0e-4",
        "policy.optim.weight_decay=0.1",
        "policy.optim.adam_beta2=0.95",
        "policy.optim.sched={name: linear, decay_updates: 8}",
    ]
    assert case.run(*changed) == [0]
    line = next(line for line in capfd.readouterr().out.splitlines() if line.startswith("settings changed"))
    for words in (
        "policy.optim.lr 0.001 -> 0.0008",
        "policy.optim.min_lr 0.0 -> 0.0001",
        "policy.optim.weight_decay 0.0 -> 0.1",
        "policy.optim.sched.name constant -> linear",
        "policy.optim.sched.decay_updates null -> 8",
        "policy.optim.adam_beta1 and adam_beta2 [0.9, 0.999] -> [0.9, 0.95]",
    ):
        assert words in line
    assert line.count("->") == 6
    assert [row["lr"] for row in case.rows()[2:]] == pytest.approx([1e-4 + 7e-4 * (1 - i / 8) for i in (3, 4)])


def test_what_cannot_change_is_refused_on_all_ranks(
    case: Case, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    case.run("trainer.max_steps=2")
    wider = make_tiny_model(tmp_path / "wider", "qwen3", tied=True, seed=3, tokenizer=True, intermediate_size=128)
    other = tmp_path / "other.jsonl"
    other.write_text(case.train.read_text().replace("plus", "and"))
    for override, words in (
        (f"policy.model_path={wider}", ["policy.model_path", str(wider), str(case.model), "intermediate_size"]),
        (f"data.train={other}", ["data.train", str(other), str(case.train), "content"]),
        ("trainer.seed=8", ["trainer.seed = 8", "trained with 7"]),
    ):
        capfd.readouterr()
        assert case.run(override, ranks=2) == [2, 2]
        errors = {line for line in capfd.readouterr().err.splitlines() if line.startswith("error: ")}
        assert len(errors) == 1, errors
        error = errors.pop()
        assert "Fix: " in error and all(word in error for word in words), error
        assert steps_of(case) == [2], "a refused start changes nothing"
    moved = case.train.rename(tmp_path / "moved.jsonl")
    assert case.run(f"data.train={moved}", "trainer.max_steps=3") == [0]


def test_checkpoints_and_reference_have_their_seconds(case: Case) -> None:
    assert case.run() == [0]
    rows = [json.loads(line) for line in (case.root / "tiny/metrics.jsonl").read_text().splitlines()]
    assert [row["step"] for row in rows if row.get("time/checkpoint_s", 0) > 0] == [3]  # the one after step 2
    for row in rows:
        assert row["time/reference_swap_s"] > 0
        inside = ("time/checkpoint_s", "time/step_s")
        phases = sum(value for key, value in row.items() if key.startswith("time/") and key not in inside)
        assert phases == pytest.approx(row["time/step_s"], rel=0.01)


# ---- one owner


def test_a_second_start_is_refused_at_once_and_does_no_harm(case: Case) -> None:
    """Thirty steps, so that the first still runs when the second has started on a busy machine."""
    first = case.start("trainer.max_steps=30")
    metrics = case.root / "tiny/metrics.jsonl"
    while not (metrics.is_file() and metrics.read_text()):
        assert first.poll() is None, first.communicate()[0]
        time.sleep(0.1)
    started = os.times()
    second = case.start("trainer.max_steps=30")
    output, _ = second.communicate(timeout=60)
    ended = os.times()
    assert second.returncode == 2 and output.count("\n") == 1
    assert f"is in use by process {first.pid} of user" in output and "Fix: " in output
    assert ended.children_user - started.children_user < 2.0, "it has imported torch"
    output, _ = first.communicate(timeout=120)
    assert first.returncode == 0, output
    assert [row["step"] for row in case.rows()] == list(range(1, 31))
    assert (case.root / "tiny/.lock").read_bytes() == b""


# ---- nothing is overwritten without a word


def contents(folder: Path) -> dict[str, bytes]:
    """All files but logs and the lock."""
    files = (path for path in folder.rglob("*") if path.is_file() and not {"logs", ".lock"} & set(path.parts))
    return {str(path.relative_to(folder)): path.read_bytes() for path in files}


def test_a_finished_run_is_left_alone_until_it_is_to_go_on(case: Case, capfd: pytest.CaptureFixture[str]) -> None:
    folder, export = case.root / "tiny", "exp_manager.export_hf=true"
    assert case.run("trainer.max_steps=2", export) == [0]
    before = contents(folder)
    capfd.readouterr()
    assert case.run("trainer.max_steps=2", export, ranks=2) == [0, 0]
    assert "finished after 2 steps: nothing to do" in capfd.readouterr().out
    assert contents(folder) == before
    assert case.run("trainer.max_steps=2", export, "exp_manager.resume_if_exists=false") == [2]
    error = capfd.readouterr().err
    assert "resume_if_exists = False: starts a new run, but" in error and "checkpoints, metrics.jsonl, " in error
    assert contents(folder) == before
    assert case.run("trainer.max_steps=3", export) == [0]
    assert "in place of an earlier one" in capfd.readouterr().out
    assert contents(folder)["hf/model.safetensors"] != before["hf/model.safetensors"]
    assert json.loads((folder / "summary.json").read_text())["steps"] == 3


def test_without_a_checkpoint_an_earlier_start_is_moved_away(case: Case, capfd: pytest.CaptureFixture[str]) -> None:
    kill_after(case, 1, "trainer.max_steps=2", "rollout.record=true")
    folder = case.root / "tiny"
    (folder / "eval").mkdir()
    (folder / "eval/step_00000001.json").write_text("old")
    (folder / "mine.txt").write_text("a user's own")
    metrics = (folder / "metrics.jsonl").read_bytes()
    capfd.readouterr()
    assert case.run("trainer.max_steps=2") == [0]
    [aside] = folder.glob("abandoned_*")
    line = f"this run continues nothing of metrics.jsonl, eval, rollouts here: moved to {aside}"
    assert line in capfd.readouterr().out
    assert (aside / "metrics.jsonl").read_bytes() == metrics and any((aside / "rollouts").iterdir())
    assert (folder / "mine.txt").exists() and not (folder / "eval").exists()
    assert [row["step"] for row in case.rows()] == [1, 2]


def test_what_is_later_than_the_checkpoint_goes_and_lost_rows_are_counted(
    case: Case, capfd: pytest.CaptureFixture[str]
) -> None:
    assert case.run("trainer.max_steps=4") == [0]
    folder = case.root / "tiny"
    (folder / "eval").mkdir()
    for step in (2, 4, 5):
        (folder / f"eval/step_{step:08d}.json").write_text("{}")
    metrics = folder / "metrics.jsonl"
    metrics.write_text("".join(metrics.read_text().splitlines(keepends=True)[:1]))
    capfd.readouterr()
    assert case.run("trainer.max_steps=5") == [0]
    assert "metrics.jsonl lacks 3 of 4 rows up to step 4" in capfd.readouterr().out
    assert sorted(path.name for path in (folder / "eval").iterdir()) == ["step_00000002.json", "step_00000004.json"]


# ---- generators


def test_equal_runs_have_equal_generators(case: Case) -> None:
    kept = []
    for name in ("one", "two"):
        assert case.run(f"exp_manager.name={name}", "trainer.max_steps=2", ranks=2) == [0, 0]
        kept.append(sorted((case.root / name).glob("checkpoints/step_00000002/rng_rank_*.json")))
    assert len(kept[0]) == 2
    assert [path.read_bytes() for path in kept[0]] == [path.read_bytes() for path in kept[1]]

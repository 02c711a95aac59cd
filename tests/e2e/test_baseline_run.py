"""Keep and explore rates of whole runs: against their own beginning, after a resume, and against another run."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest

from tests.e2e.conftest import Case

RATES = ("eval/keep_rate", "eval/explore_rate")


def evaluation(case: Case, *, after: bool = True) -> list[str]:
    return [
        f"data.validation={case.held_out}", "eval.before=true", f"eval.after={str(after).lower()}", "eval.num_problems=6",
        "eval.num_samples=4", "eval.k_values=[1,2,4]",
    ]  # fmt: skip


def rates(row: dict[str, float]) -> dict[str, float]:
    return {key: value for key, value in row.items() if key.startswith(RATES)}


def results(case: Case, name: str, step: int) -> dict:
    return json.loads((case.root / name / "eval" / f"step_{step:08d}.json").read_text())


def plant(case: Case, name: str, solved: int) -> None:
    """Say of the first problems that they were solved before."""
    path = case.root / name / "eval/step_00000000.json"
    found = json.loads(path.read_text())
    for i, problem in enumerate(found["problems"]):
        problem |= {"num_correct": int(i < solved), "is_greedy_correct": i < solved}
    path.write_text(json.dumps(found))


def test_a_run_is_compared_with_its_own_beginning_also_after_a_resume(case: Case) -> None:
    assert case.run(*evaluation(case, after=False), "trainer.max_steps=2", ranks=2) == [0, 0]
    assert rates(case.rows()[0]) == {}
    assert len(results(case, "tiny", 0)["problems"]) == 6
    plant(case, "tiny", 2)
    assert case.run(*evaluation(case), "trainer.max_steps=4", ranks=2) == [0, 0]
    first, last = case.rows()[0], case.rows()[-1]
    found = results(case, "tiny", 4)
    now = [problem["num_correct"] > 0 for problem in found["problems"]]
    assert rates(first) == {}
    assert rates(last)["eval/keep_rate_any"] == sum(now[:2]) / 2
    assert rates(last)["eval/explore_rate_any"] == sum(now[2:]) / 4
    assert {"eval/keep_rate_greedy", "eval/explore_rate_greedy"} <= last.keys()


def test_a_folder_that_another_run_had_before_is_no_baseline(case: Case) -> None:
    assert case.run(*evaluation(case), "trainer.max_steps=1") == [0]
    shutil.rmtree(case.root / "tiny/checkpoints")
    assert case.run(*evaluation(case), "eval.before=false", "trainer.max_steps=2") == [0]
    assert not (case.root / "tiny/eval/step_00000000.json").exists() and rates(case.rows()[-1]) == {}


def test_a_run_is_compared_with_another_one_and_only_on_the_same_problems(
    case: Case, capfd: pytest.CaptureFixture[str]
) -> None:
    assert case.run(*evaluation(case, after=False), "trainer.max_steps=1") == [0]
    plant(case, "tiny", 6)
    named = [
        "exp_manager.name=second",
        f"eval.baseline={case.root}/tiny/eval/step_00000000.json",
        "trainer.max_steps=1",
    ]
    assert case.run(*evaluation(case), *named, ranks=2) == [0, 0]
    for row in case.rows("second"):
        assert rates(row).keys() == {"eval/keep_rate_greedy", "eval/keep_rate_any"}
    named[0] = "exp_manager.name=third"
    capfd.readouterr()
    assert case.run(*evaluation(case), *named, "eval.num_problems=5", ranks=2) == [2, 2]
    assert "1 of its 6 are not evaluated here" in capfd.readouterr().err
    assert case.run(*evaluation(case), *named, "eval.baseline=/nowhere.json", ranks=2) == [2, 2]
    assert "eval.baseline = '/nowhere.json'" in capfd.readouterr().err


def test_results_that_cannot_be_written_end_all_ranks(case: Case, capfd: pytest.CaptureFixture[str]) -> None:
    (case.root / "tiny").mkdir()
    Path(case.root / "tiny/eval").touch()
    assert case.run(*evaluation(case), ranks=2) == [2, 2]
    assert "exp_manager.exp_dir" in capfd.readouterr().err

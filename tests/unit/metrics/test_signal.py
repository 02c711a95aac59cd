"""Warnings of a run that learns nothing: said when a sign appears, once, and again after it had ended."""

from __future__ import annotations

import io

from rich.console import Console

from megatron_rl.metrics import MetricsLogger
from megatron_rl.metrics.signal import SignalWatch

HEALTHY = {
    "groups/all_right_frac": 0.1,
    "groups/all_wrong_frac": 0.3,
    "response_length/cut_frac": 0.1,
    "grad_norm": 0.5,
}
WRONG = HEALTHY | {"groups/all_right_frac": 0.0, "groups/all_wrong_frac": 1.0}
SILENT = WRONG | {"response_length/cut_frac": 0.81, "grad_norm": 0.0}


def said(*rows: dict[str, float]) -> list[str]:
    watch = SignalWatch()
    return [line for row in rows if (line := watch.see(row)) is not None]


def test_a_run_without_signal_gets_one_line_that_names_all_of_it() -> None:
    (line,) = said(*[SILENT] * 40)
    assert "every group of the last 5 steps is wrong" in line
    assert "81 % of responses in the last 5 steps are cut at rollout.max_new_tokens" in line
    assert "the gradient of the last 5 steps is 0" in line
    assert "raise rollout.max_new_tokens" in line and "easier problems" in line and "\n" not in line


def test_a_healthy_run_and_a_short_one_get_none() -> None:
    assert said(*[HEALTHY] * 40) == [] and said(*[SILENT] * 4) == []
    assert said(*[WRONG, WRONG, WRONG, WRONG, HEALTHY] * 8) == [], "one good step in five is a signal"


def test_a_sign_is_said_again_only_after_it_had_ended() -> None:
    assert len(said(*[WRONG] * 8, HEALTHY, *[WRONG] * 5)) == 2
    still = WRONG | {"grad_norm": 0.0}
    assert len(said(*[WRONG] * 8, *[still] * 8, *[WRONG] * 8)) == 2, "what is added is said, what ends is not"


def test_the_share_of_cut_responses_does_not_flicker() -> None:
    around = [HEALTHY | {"response_length/cut_frac": 0.5 + 0.04 * (-1) ** step} for step in range(40)]
    assert len(said(*around)) == 1


def test_all_right_and_nothing_to_compare_are_told_apart() -> None:
    (right,) = said(*[HEALTHY | {"groups/all_right_frac": 1.0, "groups/all_wrong_frac": 0.0}] * 5)
    (equal,) = said(*[HEALTHY | {"groups/all_right_frac": 0.5, "groups/all_wrong_frac": 0.5}] * 5)
    assert "is right" in right and "harder" in right and "has right and wrong rollouts" in equal


def test_rows_without_groups_are_no_sign(tmp_path) -> None:
    assert said(*[{"loss": 1.0, "grad_norm": 0.3}] * 9) == []
    (line,) = said(*[{"loss": 1.0, "grad_norm": 0.0}] * 9)
    assert "gradient" in line and "learning rate" in line


def test_a_reward_that_judges_nothing_is_named() -> None:
    failing = {"grad_norm": 0.0, "num_rollouts": 8.0, "dropped/score_crash": 5.0, "dropped/score_timeout": 3.0}
    (line,) = said(*[failing] * 9)
    assert "no response of the last 5 steps could be judged" in line and "mend the reward" in line
    (line,) = said(*[failing] * 4, failing | {"dropped/score_timeout": 2.0})
    assert "judged" not in line


def test_the_console_shows_the_warning_between_the_steps(tmp_path) -> None:
    console = Console(file=io.StringIO(), force_terminal=False, width=80)
    with MetricsLogger(tmp_path, total_steps=9, console=console) as log:
        for step in range(1, 10):
            log.log(step, SILENT)
    lines = [line for line in console.file.getvalue().splitlines() if "warning" in line]
    assert len(lines) == 1 and lines[0].startswith("step 5: warning: every group")

"""The kill campaign in short. ``make campaign`` is the long one."""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.e2e import campaign


@pytest.mark.slow
@pytest.mark.timeout(600)
def test_six_kills_change_nothing_and_leave_nothing(tmp_path: Path) -> None:
    campaign.prepare(tmp_path)
    tally = campaign.carry_out(campaign.SHORT, tmp_path, num_kills=6, seed=1)
    assert tally.is_clean, tally
    assert tally.kills.total() == 6 and tally.finished >= 2
    assert tally.kills["launcher"] and tally.kills["rank 0"] and tally.kills["scorer"] + tally.kills["fork server"]
    assert campaign.rows_of(tmp_path / "whole")[-1]["step"] == 8

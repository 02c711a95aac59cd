"""The run's key: one for all, readable for its owner alone."""

from __future__ import annotations

from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

from megatron_rl.errors import UserError
from megatron_rl.process.run_key import FILE, VARIABLE, run_key


def test_all_nodes_get_the_key_of_the_first(tmp_path: Path) -> None:
    with ThreadPoolExecutor(16) as nodes:
        keys = set(nodes.map(run_key, [tmp_path / "run"] * 64))
    assert len(keys) == 1 and len(keys.pop()) == 32
    assert [path.name for path in (tmp_path / "run").iterdir()] == [FILE]
    assert (tmp_path / "run" / FILE).stat().st_mode & 0o777 == 0o600


def test_runs_have_different_keys(tmp_path: Path) -> None:
    assert run_key(tmp_path / "a") != run_key(tmp_path / "b")


def test_the_environment_comes_first(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(VARIABLE, "00" * 32)
    assert run_key(tmp_path) == bytes(32) and not list(tmp_path.iterdir())


def test_a_key_that_others_can_read_is_refused(tmp_path: Path) -> None:
    run_key(tmp_path)
    (tmp_path / FILE).chmod(0o640)
    with pytest.raises(UserError, match=r"must belong to this user alone .*mode 640"):
        run_key(tmp_path)


@pytest.mark.parametrize("text", ["", "no key", "00" * 31])
def test_a_damaged_key_is_refused(tmp_path: Path, text: str) -> None:
    run_key(tmp_path)
    (tmp_path / FILE).write_text(text)
    with pytest.raises(UserError, match="must hold 64 hex digits"):
        run_key(tmp_path)


def test_a_folder_that_cannot_be_made_is_named(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(UserError, match=r"exp_manager\.exp_dir"):
        run_key(tmp_path / "file" / "run")

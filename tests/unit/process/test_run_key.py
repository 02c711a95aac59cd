"""The run's key: another one for each start, readable for its owner alone."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

from megatron_rl.errors import UserError
from megatron_rl.process import run_key
from megatron_rl.process.run_key import FILE, VARIABLE, given_key, read_key, write_key


def test_the_last_start_counts(tmp_path: Path) -> None:
    first = write_key(tmp_path / "run")
    second = write_key(tmp_path / "run")
    assert first != second and read_key(tmp_path / "run" / FILE) == second and len(second) == 32
    assert [path.name for path in (tmp_path / "run").iterdir()] == [FILE]
    assert (tmp_path / "run" / FILE).stat().st_mode & 0o777 == 0o600


def test_what_a_killed_start_has_left_is_no_obstacle(tmp_path: Path) -> None:
    (tmp_path / f"{FILE}.tmp").write_text("half")
    assert write_key(tmp_path) == read_key(tmp_path / FILE)


def test_a_file_system_without_hard_links_will_do(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def no_links(*_: object) -> None:
        raise PermissionError(1, "Operation not permitted")

    monkeypatch.setattr(os, "link", no_links)
    assert write_key(tmp_path) == read_key(tmp_path / FILE)


def test_a_file_system_that_keeps_nothing_private_has_a_way_out(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def everybody(path: Path, flags: int, *_: object) -> int:
        descriptor = open_file(path, flags, 0o777)
        os.fchmod(descriptor, 0o777)
        return descriptor

    open_file = os.open
    monkeypatch.setattr(os, "open", everybody)
    with pytest.raises(
        UserError, match=r"alone, but gets owner \d+ and mode 777.* Fix: .*MEGATRON_RL_RUN_KEY to it on every"
    ):
        write_key(tmp_path)
    assert not list(tmp_path.iterdir())


def test_a_key_that_others_can_read_is_refused(tmp_path: Path) -> None:
    write_key(tmp_path)
    (tmp_path / FILE).chmod(0o640)
    with pytest.raises(UserError, match=r"must belong to this user alone.*mode 640.*MEGATRON_RL_RUN_KEY"):
        read_key(tmp_path / FILE)


@pytest.mark.parametrize("data", [b"", b"no key", b"00" * 31, b"\xff\xfe" * 32])
def test_a_damaged_key_is_one_line(tmp_path: Path, data: bytes) -> None:
    write_key(tmp_path)
    (tmp_path / FILE).write_bytes(data)
    with pytest.raises(UserError, match="must hold 64 hex digits"):
        read_key(tmp_path / FILE)


def test_a_key_that_is_not_there_may_still_come_and_a_folder_is_none(tmp_path: Path) -> None:
    assert read_key(tmp_path / FILE) is None
    (tmp_path / FILE).mkdir()
    with pytest.raises(UserError, match="cannot be read"):
        read_key(tmp_path / FILE)


def test_the_environment_may_hold_one(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv(VARIABLE, raising=False)
    assert given_key() is None
    monkeypatch.setenv(VARIABLE, "00" * 32)
    assert given_key() == bytes(32)
    monkeypatch.setenv(VARIABLE, "my key")
    with pytest.raises(UserError, match=f"^{VARIABLE}: must hold 64 hex digits"):
        given_key()


def test_a_folder_that_cannot_be_made_is_named(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(UserError, match=r"exp_manager\.exp_dir"):
        run_key.write_key(tmp_path / "file" / "run")

"""Atomic files and folders, and the errors of a disk."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

from megatron_rl.errors import UserError
from megatron_rl.files import SAME_COMMAND, atomic_file, disk_errors, fresh_folder, publish_folder, write_atomic


@pytest.fixture
def synced(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """Record what is brought to disk and what is renamed, in order, by file name."""
    calls: list[str] = []
    real_sync, real_replace = os.fsync, os.replace

    def fsync(descriptor: int) -> None:
        calls.append(f"sync {Path(os.readlink(f'/proc/self/fd/{descriptor}')).name}")
        real_sync(descriptor)

    def replace(source: Path, target: Path) -> None:
        calls.append(f"rename {source.name} {target.name}")
        real_replace(source, target)

    monkeypatch.setattr(os, "fsync", fsync)
    monkeypatch.setattr(os, "replace", replace)
    return calls


def test_a_file_is_synced_before_it_gets_its_name(tmp_path: Path, synced: list[str]) -> None:
    write_atomic(tmp_path / "made/x.json", "new")
    assert (tmp_path / "made/x.json").read_text() == "new"
    assert synced == ["sync .x.json.tmp", "rename .x.json.tmp x.json", "sync made"]


def test_a_write_that_fails_leaves_the_old_content_and_nothing_else(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    write_atomic(tmp_path / "x.json", b"old")

    def no_space(descriptor: int) -> None:
        raise OSError(28, "No space left on device")

    with monkeypatch.context() as patched:
        patched.setattr(os, "fsync", no_space)
        with pytest.raises(OSError):
            write_atomic(tmp_path / "x.json", b"new")
    with pytest.raises(KeyboardInterrupt), atomic_file(tmp_path / "x.json") as temporary:
        temporary.write_bytes(b"half")
        raise KeyboardInterrupt
    assert [path.name for path in tmp_path.iterdir()] == ["x.json"]
    assert (tmp_path / "x.json").read_bytes() == b"old"


def filled(folder: Path, text: str) -> Path:
    (folder / "inner").mkdir(parents=True)
    (folder / "inner/file").write_text(text)
    return folder


def test_a_folder_is_synced_with_all_it_holds_before_it_gets_its_name(tmp_path: Path, synced: list[str]) -> None:
    publish_folder(filled(tmp_path / "partial", "new"), tmp_path / "final")
    assert (tmp_path / "final/inner/file").read_text() == "new"
    assert sorted(synced[:3]) == ["sync file", "sync inner", "sync partial"]
    assert synced[3:] == ["rename partial final", f"sync {tmp_path.name}"]


def test_a_folder_replaces_another_only_where_that_is_wanted(tmp_path: Path) -> None:
    filled(tmp_path / "final", "old")
    filled(tmp_path / "partial", "new")
    with pytest.raises(OSError):
        publish_folder(tmp_path / "partial", tmp_path / "final")
    assert (tmp_path / "final/inner/file").read_text() == "old"
    publish_folder(tmp_path / "partial", tmp_path / "final", replaces=True)
    assert (tmp_path / "final/inner/file").read_text() == "new"
    assert not (tmp_path / "partial").exists()


class LibraryError(Exception):
    pass


@pytest.mark.parametrize(
    ("error", "reason"),
    [
        (OSError(28, "No space left on device", "somewhere"), "No space left on device"),
        (OSError("cut off"), "cut off"),
        (LibraryError("wrapped"), "wrapped"),
    ],
)
def test_an_error_of_the_disk_names_setting_path_and_reason(error: Exception, reason: str) -> None:
    with (
        pytest.raises(UserError) as caught,
        disk_errors(Path("/x"), field="exp_manager.exp_dir", fix=SAME_COMMAND, also=(LibraryError,)),
    ):
        raise error
    assert caught.value.__cause__ is error
    assert str(caught.value) == f"exp_manager.exp_dir = '/x': could not be written ({reason}). Fix: {SAME_COMMAND}."


def test_other_errors_pass(tmp_path: Path) -> None:
    with pytest.raises(LibraryError), disk_errors(tmp_path):
        raise LibraryError
    with pytest.raises(UserError, match="is taken"), disk_errors(tmp_path):
        raise UserError("x", None, "is taken", "choose another")


def test_without_a_setting_the_path_itself_is_named() -> None:
    with pytest.raises(UserError, match=r"^/x: could not be written \(full\)"), disk_errors(Path("/x")):
        raise OSError(28, "full")


def test_links_under_predictable_names_are_not_followed(tmp_path: Path) -> None:
    (tmp_path / "precious").mkdir()
    (tmp_path / "precious/file").write_text("kept")
    (tmp_path / ".x.json.tmp").symlink_to(tmp_path / "precious/file")
    (tmp_path / "step.tmp").symlink_to(tmp_path / "precious")
    write_atomic(tmp_path / "x.json", "new")
    fresh_folder(tmp_path / "step.tmp")
    (tmp_path / "step.tmp/file").write_text("new")
    assert (tmp_path / "precious/file").read_text() == "kept"
    assert (tmp_path / "x.json").read_text() == (tmp_path / "step.tmp/file").read_text() == "new"
    fresh_folder(tmp_path / "step.tmp")
    assert not any((tmp_path / "step.tmp").iterdir())

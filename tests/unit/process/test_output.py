"""Output whose reader goes away, or was never there; and a Ctrl-C."""

from __future__ import annotations

import os
import signal
import stat
import subprocess
import sys
import time
from pathlib import Path

import pytest

from megatron_rl.process.child import ChildProcess

ROOT = Path(__file__).parents[3]
PROGRAM = """
import os, sys
from megatron_rl.process import lifetime
def program():
    sys.stdin.readline()
    print("one", flush=True)
    print("two", flush=True)
    return 3
lifetime.run(program)
"""


def start(code: str = PROGRAM, log: Path | None = None, **streams: int) -> subprocess.Popen[str]:
    environment = os.environ | ({} if log is None else {"MEGATRON_RL_CONSOLE_LOG": str(log)})
    return subprocess.Popen(
        [sys.executable, "-c", code], stdin=subprocess.PIPE, text=True, env=environment,
        **{"stdout": subprocess.PIPE, "stderr": subprocess.PIPE} | streams,
    )  # fmt: skip


@pytest.mark.parametrize("has_log", [True, False])
def test_after_its_reader_has_gone_output_goes_to_the_log_or_nowhere(tmp_path: Path, has_log: bool) -> None:
    process = start(log=tmp_path / "console.log" if has_log else None)
    process.stdout.close()
    process.stdout = None
    _, error = process.communicate("go\n", timeout=30)
    assert (process.returncode, error) == (3, "")
    if has_log:
        first, *rest = (tmp_path / "console.log").read_text().splitlines()
        assert first == f"process {process.pid}: standard output cannot be written (Broken pipe); it goes on here"
        assert rest == ["one", "two"]


def test_a_log_that_is_a_link_is_replaced_and_not_followed(tmp_path: Path) -> None:
    victim = tmp_path / "victim"
    victim.write_text("mine")
    for name in ("console.log", "server_0.log"):
        (tmp_path / name).symlink_to(victim)
    process = start(log=tmp_path / "console.log")
    process.stdout.close()
    process.stdout = None
    process.communicate("go\n", timeout=30)
    child = ChildProcess(["echo", "three"], log=tmp_path / "server_0.log", environment={})
    while child.status() is None:
        time.sleep(0.01)
    assert victim.read_text() == "mine"
    assert "two" in (tmp_path / "console.log").read_text() and (tmp_path / "server_0.log").read_text() == "three\n"


def test_logs_are_for_their_user_alone(tmp_path: Path) -> None:
    older = tmp_path / "server_1.log"
    older.touch(0o644)
    for log in (tmp_path / "server_0.log", older):
        ChildProcess(["true"], log=log, environment={}).status()
        assert stat.S_IMODE(log.stat().st_mode) == 0o600


def test_a_verb_whose_reader_has_gone_is_silent() -> None:
    verb = [
        sys.executable,
        "-m",
        "megatron_rl.commands",
        "check",
        "--no-files",
        "tests/tiny.yaml",
        "policy.model_path=m",
    ]
    with subprocess.Popen(verb, cwd=ROOT, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True) as process:
        process.stdout.close()
        assert (process.stderr.read(), process.wait(30)) == ("", 0)


def test_a_full_disk_under_the_output_loses_output_only(tmp_path: Path) -> None:
    limit = (
        "import resource, signal; signal.signal(signal.SIGXFSZ, signal.SIG_IGN)\n"
        "resource.setrlimit(resource.RLIMIT_FSIZE, (6, 6))\n"  # the log's first line is longer already
    )
    with (tmp_path / "out").open("w") as out:
        process = start(limit + PROGRAM, log=tmp_path / "console.log", stdout=out.fileno())
        _, error = process.communicate("go\n", timeout=30)
    assert (process.returncode, error) == (3, "")
    assert (tmp_path / "out").read_text() == "one\ntw"


@pytest.mark.parametrize("closed", ["<&-", ">&-", "2>&-", "<&- >&- 2>&-"])
def test_the_number_of_a_closed_stream_is_given_to_nobody(tmp_path: Path, closed: str) -> None:
    code = """
import os, sys
from megatron_rl.process import lifetime
def program():
    with open(sys.argv[1], "w") as file:
        print("to nobody", flush=True)
        print("to nobody", file=sys.stderr, flush=True)
        os.write(1, b""), os.write(2, b"")
        file.write(str(file.fileno()))
    return 3
lifetime.run(program)
"""
    command = ["sh", "-c", f'exec "$0" -c "$1" "$2" {closed}', sys.executable, code, str(tmp_path / "number")]
    assert subprocess.run(command, capture_output=True, timeout=30, check=False).returncode == 3
    assert int((tmp_path / "number").read_text()) > 2


def test_ctrl_c_is_a_status_without_a_traceback() -> None:
    code = PROGRAM.replace("sys.stdin", "os.write(1, b'ready\\n'); sys.stdin")
    listen = "import signal; signal.signal(signal.SIGINT, signal.default_int_handler)\n"
    process = start(listen + code)
    assert process.stdout.readline() == "ready\n"
    process.send_signal(signal.SIGINT)
    assert process.communicate(timeout=30) == ("", "") and process.returncode == 130


def test_a_module_of_the_current_folder_is_nobody_elses(tmp_path: Path) -> None:
    """Programs of ours start with -P; a user's modules are found, but the standard library's first."""
    (tmp_path / "secrets.py").write_text("raise SystemExit('a secret of the user')")
    (tmp_path / "mine.py").write_text("VALUE = 5")
    code = (
        "from megatron_rl.process import lifetime\n"
        "def program():\n    import secrets, mine\n    return mine.VALUE\n"
        "lifetime.run(program)"
    )
    environment = os.environ | {"PYTHONPATH": str(ROOT)}
    command = [sys.executable, "-P", "-c", code]
    assert subprocess.run(command, cwd=tmp_path, env=environment, timeout=30, check=False).returncode == 5


@pytest.mark.parametrize(
    ("program", "said"), [("commands --version", "megatron-rl"), ("launch --nnodes=x", "invalid int value")]
)
def test_nor_where_a_program_starts_without_the_flag(tmp_path: Path, program: str, said: str) -> None:
    for name in ("secrets", "ctypes", "logging"):
        (tmp_path / f"{name}.py").write_text("raise SystemExit('a module of the user')")
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    environment.pop("PYTHONSAFEPATH", None)
    command = [sys.executable, "-m", *f"megatron_rl.{program}".split()]
    done = subprocess.run(
        command, cwd=tmp_path, env=environment, capture_output=True, text=True, timeout=60, check=False
    )
    assert said in done.stdout + done.stderr and "of the user" not in done.stderr, done.stderr


def test_a_server_gets_no_variables_that_are_for_the_trainer_alone(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    given = {"PYTORCH_ALLOC_CONF": "expandable_segments:True", "PYTORCH_CUDA_ALLOC_CONF": "expandable_segments:True"}
    given |= {"CUDA_DEVICE_MAX_CONNECTIONS": "1", "RANK": "3", "NCCL_SOCKET_IFNAME": "eth1", "NCCL_DEBUG": "WARN"}
    for name, value in given.items():
        monkeypatch.setenv(name, value)
    child = ChildProcess(["env"], log=tmp_path / "server_0.log", environment={"OWN": "1"})
    while child.status() is None:
        time.sleep(0.01)
    lines = (tmp_path / "server_0.log").read_text().splitlines()
    names = {line.partition("=")[0] for line in lines}
    assert not names & {"PYTORCH_ALLOC_CONF", "PYTORCH_CUDA_ALLOC_CONF", "CUDA_DEVICE_MAX_CONNECTIONS", "RANK"}
    assert {"NCCL_SOCKET_IFNAME=eth1", "NCCL_DEBUG=WARN", "OWN=1"} <= set(lines)

"""The thread that starts and watches servers: what it gives up, what it tries again, and whom it tells the key."""

from __future__ import annotations

import os
import signal
import socket
import sys
import threading
import time
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path

import pytest

from megatron_rl.config.rollout import ServersConfig
from megatron_rl.process.child import ChildProcess
from megatron_rl.rollout.sglang import supervisor
from megatron_rl.rollout.sglang.supervisor import KILLED_STARTS, Managed, Supervisor

KILLS_ITSELF = "import os; os.kill(os.getpid(), 9)"
LOSES_A_CHILD = "import sys; sys.exit('RuntimeError: Rank 0 scheduler died during initialization (exit code: -9).')"
SERVES = """
import http.server, sys
class Yes(http.server.BaseHTTPRequestHandler):
    def do_GET(self):
        self.send_response(200)
        self.end_headers()
    def log_message(self, *_): pass
http.server.HTTPServer(("127.0.0.1", int(sys.argv[1])), Yes).serve_forever()
"""
Watch = Callable[[Managed], Supervisor]


@pytest.fixture
def watch(monkeypatch: pytest.MonkeyPatch) -> Iterator[Watch]:
    monkeypatch.setattr(supervisor, "LOOK_S", 0.02)
    made: list[Supervisor] = []

    def start(server: Managed) -> Supervisor:
        made.append(Supervisor([server], ServersConfig(), key="the-key"))
        return made[-1]

    yield start
    for each in made:
        each.close()


def managed(folder: Path, program: str, *, port: int = 9) -> Managed:
    log = folder / "log"

    def start(variables: Mapping[str, str]) -> ChildProcess:
        return ChildProcess([sys.executable, "-c", program, str(port)], log=log, environment=dict(variables))

    return Managed("server 0", f"http://127.0.0.1:{port}", log, start)


def free_port() -> int:
    with socket.create_server(("127.0.0.1", 0)) as free:
        return int(free.getsockname()[1])


def wait_for(condition: Callable[[], object]) -> None:
    deadline = time.monotonic() + 30
    while not condition():
        assert time.monotonic() < deadline
        time.sleep(0.01)


@pytest.mark.parametrize(("program", "words"), [(KILLS_ITSELF, "killed by SIGKILL"), (LOSES_A_CHILD, "scheduler died")])
def test_one_that_is_killed_before_it_answers_is_started_again_but_not_for_ever(
    tmp_path: Path, watch: Watch, program: str, words: str
) -> None:
    server = managed(tmp_path, program)
    watched = watch(server)
    wait_for(lambda: watched.failure)
    assert server.num_restarts == KILLED_STARTS and words in str(watched.failure)


def test_one_that_ends_with_an_error_of_its_own_is_not_started_again(tmp_path: Path, watch: Watch) -> None:
    server = managed(tmp_path, "import sys; sys.exit('no such model')")
    watched = watch(server)
    wait_for(lambda: watched.failure)
    assert server.num_restarts == 0 and "no such model" in str(watched.failure)


def test_an_error_of_the_thread_itself_ends_the_run(tmp_path: Path, watch: Watch) -> None:
    def start(_variables: Mapping[str, str]) -> ChildProcess:
        raise OSError(11, "no more processes")

    watched = watch(Managed("server 0", "http://127.0.0.1:9", tmp_path / "log", start))
    wait_for(lambda: watched.failure)
    assert "no more processes" in str(watched.failure)


@pytest.mark.parametrize("is_answering", [True, False])
def test_a_part_of_a_server_follows_the_others(tmp_path: Path, watch: Watch, is_answering: bool) -> None:
    server = managed(tmp_path, SERVES, port=free_port())
    server.is_answering = is_answering
    watched = watch(server)
    wait_for(lambda: server.is_up)
    first = server.process
    watched.follow({"server 0": 1, "server 1": 9})
    time.sleep(0.2)
    assert server.process is first and watched.starts() == {"server 0": 1}
    watched.follow({"server 0": 3})
    wait_for(lambda: server.is_up and server.process is not first)
    assert watched.starts() == {"server 0": 3} and watched.failure is None
    assert server.reasons == ["has lost its part on another node"]
    assert watched.take_restarts() == int(is_answering), "a server counts once"


def test_a_proxy_of_the_environment_never_sees_the_key(
    tmp_path: Path, watch: Watch, monkeypatch: pytest.MonkeyPatch
) -> None:
    with socket.create_server(("127.0.0.1", 0)) as proxy:
        asked: list[bytes] = []

        def listen() -> None:
            while True:
                try:
                    connection, _ = proxy.accept()
                except OSError:
                    return
                asked.append(connection.recv(4096))
                connection.close()

        threading.Thread(target=listen, daemon=True).start()
        for name in ("http_proxy", "HTTP_PROXY", "all_proxy"):
            monkeypatch.setenv(name, f"http://127.0.0.1:{proxy.getsockname()[1]}")
        monkeypatch.delenv("no_proxy", raising=False)
        server = managed(tmp_path, SERVES, port=free_port())
        watch(server)
        wait_for(lambda: server.is_up)
        assert asked == []


def test_behind_a_closed_gate_nothing_starts_and_what_ends_stays_down(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Colocated servers: the gate is open while the trainer has released its memory."""
    monkeypatch.setattr(supervisor, "LOOK_S", 0.02)
    server = managed(tmp_path, SERVES, port=free_port())
    watched = Supervisor([server], ServersConfig(), key="the-key", may_start=False)
    try:
        time.sleep(0.3)
        assert watched.running() == {} and server.process is None and watched.failure is None
        watched.allow_starts()
        wait_for(lambda: watched.running() == {server.url: True})
        first = server.process
        assert first is not None
        watched.hold_starts()
        time.sleep(0.2)
        assert server.process is first, "what serves goes on"
        os.kill(first.pid, signal.SIGKILL)
        wait_for(lambda: watched.running() == {})
        time.sleep(0.3)
        assert server.process is None and watched.failure is None and server.num_restarts == 1
        watched.allow_starts()
        wait_for(lambda: watched.running() == {server.url: True})
        assert server.num_restarts == 1 and server.process is not first
    finally:
        watched.close()


def test_one_that_is_starting_when_the_gate_closes_is_told_of(tmp_path: Path, watch: Watch) -> None:
    """Only then can its memory be waited for."""
    server = managed(tmp_path, f"import time; time.sleep(1.5)\n{SERVES}", port=free_port())
    watched = watch(server)
    wait_for(lambda: server.process)
    watched.hold_starts()
    assert watched.running() == {server.url: False}
    wait_for(lambda: watched.running() == {server.url: True})


def meet(nodes: list[Supervisor]) -> None:
    """Let the supervisors compare, as the engine's ranks do."""
    starts = [node.starts() for node in nodes]
    down = {name for node in nodes for name in node.down()}
    for node in nodes:
        node.follow({name: max(each[name] for each in starts) for name in starts[0]}, down)


@pytest.mark.parametrize("when", ["before", "behind"])
def test_behind_a_closed_gate_no_part_runs_without_the_other(tmp_path: Path, watch: Watch, when: str) -> None:
    """The other part ends and starts again just before the gate closes, or ends behind it."""
    parts = [managed(tmp_path / str(node), SERVES, port=free_port()) for node in range(2)]
    parts[1].is_answering = False
    nodes = [watch(part) for part in parts]
    wait_for(lambda: all(part.is_up for part in parts))
    meet(nodes)
    first = parts[0].process
    assert first is not None and not any(node.has_halves() for node in nodes)
    if when == "behind":
        for node in nodes:
            node.hold_starts()
    os.kill(first.pid, signal.SIGKILL)
    wait_for(lambda: parts[0].process is not first)
    for node in nodes:
        node.hold_starts()
    meet(nodes)
    assert nodes[1].has_halves()
    wait_for(lambda: not any(node.has_halves() for node in nodes) and not meet(nodes) and len(nodes[0].down()) == 1)
    assert [part.process for part in parts] == [None, None]
    meet(nodes)
    for node in nodes:
        node.allow_starts()
    wait_for(lambda: all(part.is_up for part in parts))
    started = [part.process for part in parts]
    meet(nodes)
    time.sleep(0.2)
    assert [part.process for part in parts] == started and parts[0].num_starts == parts[1].num_starts


LACKS_A_PACKAGE = "import no_such_package_of_sglang"
DOES_NOT_FIT = "raise ImportError('sgl_kernel.so: undefined symbol: _ZN2at')"
HAS_NO_MEMORY = "raise RuntimeError('Not enough memory')"


@pytest.mark.parametrize(
    ("program", "expected"),
    [
        (LACKS_A_PACKAGE, "needs the package no_such_package_of_sglang, which is not installed here"),
        (DOES_NOT_FIT, "undefined symbol: _ZN2at). Fix: install versions that go together: make clean"),
        (HAS_NO_MEMORY, "too little memory is cured by"),
    ],
)
def test_server_that_dies_at_once_says_what_helps(watch: Watch, tmp_path: Path, program: str, expected: str) -> None:
    running = watch(managed(tmp_path, program))
    wait_for(lambda: running.failure)
    text = str(running.failure)
    assert expected in text and str(tmp_path / "log") in text
    assert ("memory" in text) == (program == HAS_NO_MEMORY)
    assert ("make sglang PLATFORM=" in text) == (program != HAS_NO_MEMORY)

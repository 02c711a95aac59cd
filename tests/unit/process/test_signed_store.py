"""Values in a store are believed only if this run wrote them."""

from __future__ import annotations

import threading
import time
from concurrent.futures import Future
from datetime import timedelta
from pathlib import Path

import pytest
import torch
import torch.distributed as dist

from megatron_rl.errors import UserError
from megatron_rl.process.run_key import FILE, VARIABLE, write_key
from megatron_rl.process.signed_store import UNSIGNED, SignedStore, answer, find_key, open_store
from tests.forked import run_ranks

TIMEOUT = timedelta(seconds=5)
KEY = b"k" * 32


def stores() -> tuple[SignedStore, dist.TCPStore]:
    """A signed store, and a stranger's connection to the same port."""
    store, port = open_store("127.0.0.1", KEY, port=None, timeout=TIMEOUT)
    return store, dist.TCPStore("127.0.0.1", port, is_master=False, timeout=TIMEOUT)


def test_what_one_member_writes_another_reads() -> None:
    store, port = open_store("127.0.0.1", KEY, port=None, timeout=TIMEOUT)
    other, _ = open_store("127.0.0.1", KEY, port=port, timeout=TIMEOUT)
    store.set("name", "value")
    other.multi_set(["a", "b"], [b"\x00\xff", b""])
    assert other.get("name") == b"value" and store.multi_get(["a", "b"]) == [b"\x00\xff", b""]
    assert store.check(["name"]) and not store.check(["name", "other"])
    assert store.delete_key("name") and not other.check(["name"])
    assert store.add("counter", 2) == 2 and other.add("counter", 3) == 5


@pytest.mark.parametrize("forged", [b"", b"value", b"\x00" * 32 + b"value"])
def test_a_strangers_value_is_refused(forged: bytes) -> None:
    store, stranger = stores()
    stranger.set("report", forged)  # type: ignore[arg-type]
    with pytest.raises(RuntimeError, match=UNSIGNED):
        store.get("report")


def test_a_value_does_not_fit_another_name_nor_a_changed_one() -> None:
    store, stranger = stores()
    store.set("report/0", "proven")
    signed = stranger.get("report/0")
    stranger.set("report/1", signed)  # type: ignore[arg-type]
    stranger.set("report/2", signed[:-1] + b"N")  # type: ignore[arg-type]
    assert store.get("report/0") == b"proven"
    for name in ("report/1", "report/2"):
        with pytest.raises(RuntimeError, match=UNSIGNED):
            store.get(name)


def test_the_key_of_another_run_does_not_fit() -> None:
    store, port = open_store("127.0.0.1", KEY, port=None, timeout=TIMEOUT)
    other, _ = open_store("127.0.0.1", b"o" * 32, port=port, timeout=TIMEOUT)
    other.set("report", "proven")
    with pytest.raises(RuntimeError, match=UNSIGNED):
        store.get("report")


def test_the_store_works_below_a_prefix() -> None:
    store, _ = stores()
    below = dist.PrefixStore("group", store)
    below.set("handle", "[1, 2]")
    assert below.get("handle") == b"[1, 2]" and below.check(["handle"]) and store.get("group/handle") == b"[1, 2]"
    assert below.delete_key("handle") and not below.check(["handle"])


class Robbed(SignedStore):
    """A member's store whose values a stranger overwrites at once."""

    def set(self, key: str, value: str | bytes) -> None:
        super().set(key, value)
        self._inner.set(key, b"\x01" * 200)  # type: ignore[arg-type]


def meet(port: int, kind: type[SignedStore]) -> str:
    store, _ = open_store("127.0.0.1", KEY, port=port, timeout=TIMEOUT)
    store = kind(store._inner, KEY)
    try:
        group = dist.ProcessGroupGloo(dist.PrefixStore("group", store), dist.get_rank(), 2, TIMEOUT)
        total = torch.ones(1)
        group.allreduce([total]).wait()
        return f"sum {total.item():g}"
    except RuntimeError as error:
        return "refused" if UNSIGNED in str(error) else str(error)


def test_ranks_meet_over_it() -> None:
    _store, port = open_store("127.0.0.1", KEY, port=None, timeout=TIMEOUT)
    assert run_ranks(meet, 2, port, SignedStore) == ["sum 2", "sum 2"]


def test_the_forged_address_of_a_peer_is_refused() -> None:
    _store, port = open_store("127.0.0.1", KEY, port=None, timeout=TIMEOUT)
    assert run_ranks(meet, 2, port, Robbed) == ["refused", "refused"]


# ---- whose key it is


def asking(store: dist.TCPStore, folder: Path, limit_s: float = 5.0) -> Future[bytes]:
    """A member that looks for the key, in a thread."""
    result: Future[bytes] = Future()

    def ask() -> None:
        try:
            result.set_result(find_key(store, folder / FILE, "1", limit_s))
        except (UserError, dist.DistError) as error:
            result.set_exception(error)

    threading.Thread(target=ask, daemon=True).start()
    return result


def answered(store: dist.TCPStore, key: bytes) -> str:
    """Wait for the question, answer it, return the name of the answer."""
    while not answer(store, key, "1"):
        time.sleep(0.01)
    return f"answer to {store.get('question of 1').hex()}"


def test_the_file_of_an_earlier_start_is_read_again(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    _, store = stores()
    write_key(tmp_path)
    old = (tmp_path / FILE).read_bytes()
    key = write_key(tmp_path)
    new = (tmp_path / FILE).read_bytes()
    (tmp_path / FILE).write_bytes(old)  # what a client of NFS sees for some seconds
    member = asking(store, tmp_path)
    answered(store, key)
    time.sleep(0.5)
    assert not member.done()
    (tmp_path / FILE).write_bytes(new)
    assert member.result() == key
    assert capsys.readouterr().out.count("is not the key of this start yet") == 1


def test_answers_of_an_earlier_start_prove_nothing(tmp_path: Path) -> None:
    _, store = stores()
    old = write_key(tmp_path)
    first = asking(store, tmp_path)
    recorded = store.get(answered(store, old))
    assert first.result() == old
    store.delete_key("question of 1")
    second = asking(store, tmp_path, limit_s=1.0)
    while not store.check(["question of 1"]):
        time.sleep(0.01)
    store.set(f"answer to {store.get('question of 1').hex()}", recorded)  # type: ignore[arg-type]
    with pytest.raises(UserError, match=r"exp_manager.exp_dir.*must be one folder for all nodes.*MEGATRON_RL_RUN_KEY"):
        second.result()


def test_another_key_in_the_environment_is_one_line_at_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    _, store = stores()
    monkeypatch.setenv(VARIABLE, "00" * 32)
    member = asking(store, tmp_path, limit_s=60.0)
    answered(store, KEY)
    with pytest.raises(UserError, match=f"^{VARIABLE}: is another key than that of node 0"):
        member.result(5.0)


def test_without_an_answer_the_nodes_do_not_meet(tmp_path: Path) -> None:
    _, store = stores()
    write_key(tmp_path)
    with pytest.raises(dist.DistError, match="node 0 gave no answer"):
        asking(store, tmp_path, limit_s=0.3).result()

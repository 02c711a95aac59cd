"""Values in a store are believed only if this run wrote them."""

from __future__ import annotations

from datetime import timedelta

import pytest
import torch
import torch.distributed as dist

from megatron_rl.process.signed_store import UNSIGNED, SignedStore, open_store
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

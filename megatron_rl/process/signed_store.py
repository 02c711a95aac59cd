"""A store whose values only this run can write, and the key that says so.

A ``TCPStore`` answers everybody who reaches its port. What our processes read from one decides where they connect to and what
they take for true (addresses of peers, digests of weights, the end of a node), so each value carries a signature:

    key in the store  ->  HMAC-SHA256(run key, key in the store, value), value

A value without it raises at the reader. Keys in the store are used once in a start, and each start has another run key, so an
old value does not fit a new place. Counters (``add``) stay bare: a stranger can spoil one, and the run ends, but nobody
believes a number that matters.

Who has to read the run key from a file may find that of an earlier start there. Before it believes anything, it asks the
starter to sign a name that it has just drawn:

    find_key  --- question of <name>: a number --->  answer
              <--- answer to <number>, signed -----
"""

from __future__ import annotations

import hashlib
import hmac
import secrets
import time
from datetime import timedelta
from pathlib import Path

import torch.distributed as dist

from megatron_rl.errors import UserError
from megatron_rl.process.network import listening_socket
from megatron_rl.process.run_key import VARIABLE, WAY_OUT, given_key, read_key


def open_store(host: str, key: bytes, *, port: int | None, timeout: timedelta) -> tuple[SignedStore, int]:
    """Open a signed store: listen on one address, or connect to the one who does.

    Args:
        host: address to listen on, or to connect to.
        key: of ``SignedStore``.
        port: None listens on any free port.
        timeout: limit of connecting, and of waits for a value.

    Returns:
        The store and its port.
    """
    if port is not None:
        return SignedStore(dist.TCPStore(host, port, is_master=False, timeout=timeout), key), port
    listener = listening_socket(host)
    port = int(listener.getsockname()[1])
    store = dist.TCPStore(
        host, port, is_master=True, wait_for_workers=False, timeout=timeout, master_listen_fd=listener.detach()
    )
    return SignedStore(store, key), port


UNSIGNED = "was not written by this run"
"""Words of the error about a value without our signature; it may come through C++, which keeps an error's words only."""


class SignedStore(dist.Store):
    """A store in front of another one. Process groups take it as any store.

    Keep a reference to it for as long as a group uses it: torch's C++ side finds these methods through the Python object.
    """

    def __init__(self, inner: dist.Store, key: bytes) -> None:
        """Args:
        inner: keeps the signed values.
        key: secret that all members share.
        """
        super().__init__()
        self._inner, self._key = inner, key

    def set(self, key: str, value: str | bytes) -> None:
        """Store a value with its signature."""
        data = value.encode() if isinstance(value, str) else bytes(value)
        self._inner.set(key, self._signature(key, data) + data)  # type: ignore[arg-type]

    def get(self, key: str) -> bytes:
        """Wait for a value and return it.

        Raises:
            RuntimeError: it was not written by a holder of the key.
        """
        signed = self._inner.get(key)
        signature, data = signed[: hashlib.sha256().digest_size], signed[hashlib.sha256().digest_size :]
        if not hmac.compare_digest(signature, self._signature(key, data)):
            raise RuntimeError(f"the value of {key} in the store {UNSIGNED}")
        return data

    def multi_get(self, keys: list[str]) -> list[bytes]:
        """Wait for values and return them."""
        return [self.get(key) for key in keys]

    def multi_set(self, keys: list[str], values: list[bytes]) -> None:  # type: ignore[override]
        """Store values with their signatures."""
        for key, value in zip(keys, values, strict=True):
            self.set(key, value)

    def add(self, key: str, amount: int) -> int:
        """Add to a counter, which has no signature."""
        return self._inner.add(key, amount)

    def check(self, keys: list[str]) -> bool:
        """Return whether all keys have a value, whoever wrote it."""
        return self._inner.check(keys)

    def wait(self, keys: list[str], timeout: timedelta | None = None) -> None:  # type: ignore[override]
        """Wait until all keys have a value, whoever wrote it."""
        if timeout is None:
            self._inner.wait(keys)
        else:
            self._inner.wait(keys, timeout)

    def delete_key(self, key: str) -> bool:
        """Forget a value."""
        return self._inner.delete_key(key)

    def num_keys(self) -> int:
        """Return the number of values."""
        return self._inner.num_keys()

    def set_timeout(self, timeout: timedelta) -> None:
        """Set the limit of waits."""
        self._inner.set_timeout(timeout)

    def clone(self) -> SignedStore:
        """Return a store on a connection of its own, for another thread."""
        return SignedStore(self._inner.clone(), self._key)  # type: ignore[attr-defined]

    def has_extended_api(self) -> bool:
        """Return False: appending to a value would break its signature."""
        return False

    deleteKey, getNumKeys = delete_key, num_keys  # the names by which C++ asks for these two

    def _signature(self, key: str, data: bytes) -> bytes:
        name = key.encode()
        return hmac.digest(self._key, len(name).to_bytes(8, "big") + name + data, "sha256")


def answer(store: dist.Store, key: bytes, name: str) -> bool:
    """Prove the run key to the member of this name, who asks in ``find_key``; return False if it has not asked yet."""
    question = _question(name)
    if not store.check([question]):
        return False
    SignedStore(store, key).set(_answer(store.get(question)), b"")
    return True


def find_key(store: dist.Store, path: Path, name: str, limit_s: float) -> bytes:
    """Return the run key of this start, which the other side proves by ``answer``.

    It is the one in the environment, or in a file: over NFS, the file of an earlier start can be seen for some seconds more.

    Args:
        store: without signatures.
        path: the file.
        name: of this member, in the store.
        limit_s: time limit in seconds.

    Raises:
        UserError: the environment holds another key than that of the other side, or the file does so to the end.
        DistError: nobody answers, or the connection breaks.
    """
    end, number, given, is_answered = time.monotonic() + limit_s, secrets.token_bytes(16), given_key(), False
    store.set(_question(name), number)  # type: ignore[arg-type]
    while time.monotonic() < end:
        if store.check([_answer(number)]):
            key = given or read_key(path)
            if key is not None:
                try:
                    SignedStore(store, key).get(_answer(number))
                    return key
                except RuntimeError as error:
                    if UNSIGNED not in str(error):
                        raise
            if given is not None:
                raise UserError(VARIABLE, None, "is another key than that of node 0", WAY_OUT)
            if not is_answered:
                print(f"{path} is not the key of this start yet: reading it again for up to {limit_s:g} s", flush=True)
            is_answered = True
        time.sleep(0.2)
    if not is_answered:
        raise dist.DistError(f"node 0 gave no answer for {limit_s:g} s")
    rule = "must be one folder for all nodes: its .key is not the one that node 0 has written"
    fix = f"choose a folder on a file system that all nodes share, by its full path; or {WAY_OUT}"
    raise UserError("exp_manager.exp_dir", str(path.parent), rule, fix)


def _question(name: str) -> str:
    return f"question of {name}"


def _answer(number: bytes) -> str:
    return f"answer to {number[:16].hex()}"

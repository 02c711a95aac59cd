"""A store whose values only this run can write, and the key that says so.

A ``TCPStore`` answers everybody who reaches its port. What our processes read from one decides where they connect to and what
they take for true (addresses of peers, digests of weights, the end of a node), so each value carries a signature:

    key in the store  ->  HMAC-SHA256(run key, key in the store, value), value

A value without it raises at the reader. Keys in the store are used once in a run, so an old value does not fit a new place.
Counters (``add``) stay bare: a stranger can spoil one, and the run ends, but nobody believes a number that matters.
"""

from __future__ import annotations

import hashlib
import hmac
from datetime import timedelta

import torch.distributed as dist

from megatron_rl.process.network import listening_socket


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

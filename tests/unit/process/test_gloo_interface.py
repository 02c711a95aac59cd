"""The interface of gloo's groups."""

from __future__ import annotations

import os
from types import SimpleNamespace

import psutil
import pytest

from megatron_rl.process.network import keep_gloo_on, keep_gloo_on_loopback

VARIABLE = "GLOO_SOCKET_IFNAME"


@pytest.fixture(autouse=True)
def interfaces(monkeypatch: pytest.MonkeyPatch) -> None:
    found = {"lo": ["127.0.0.1"], "eth0": ["fe80::1", "198.51.100.7"], "ib0": ["203.0.113.9"]}
    as_told = {name: [SimpleNamespace(address=each) for each in addresses] for name, addresses in found.items()}
    monkeypatch.setattr(psutil, "net_if_addrs", lambda: as_told)
    monkeypatch.setenv(VARIABLE, "")
    monkeypatch.delenv(VARIABLE)


@pytest.mark.parametrize(("address", "interface"), [("203.0.113.9", "ib0"), ("127.0.0.1", "lo"), ("192.0.2.1", None)])
def test_it_is_that_of_the_address(address: str, interface: str | None) -> None:
    keep_gloo_on(address)
    assert os.environ.get(VARIABLE) == interface


def test_a_user_names_another_one_for_the_trainer_and_none_for_a_server_on_one_machine(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setenv(VARIABLE, "eth0")
    keep_gloo_on("203.0.113.9")
    assert os.environ[VARIABLE] == "eth0"
    keep_gloo_on_loopback()
    assert os.environ[VARIABLE] == "lo"

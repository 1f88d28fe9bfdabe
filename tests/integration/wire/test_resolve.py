"""Host names stand for all their addresses, and are looked up again."""

from __future__ import annotations

import asyncio
import socket
from typing import Any

import pytest

from headrace.errors import ConfigError
from headrace.wire import link, topology
from headrace.wire.resolve import check_address, is_wildcard, resolve, split_tcp
from tests.integration.wire.test_links import Wires, _register, until, wires
from tests.unit.wire.test_session import Recorder

__all__ = ["wires"]


@pytest.fixture
def names(monkeypatch: pytest.MonkeyPatch) -> dict[str, list[str]]:
    """A name service of the test's own; under "asked" is the last name that it did not know."""
    table: dict[str, list[str]] = {"asked": []}

    async def getaddrinfo(self: Any, host: str, port: int, **_: Any) -> list[Any]:
        if host not in table:
            table["asked"] = [host]
            raise socket.gaierror(socket.EAI_NONAME, "unknown")
        return [(socket.AF_INET, socket.SOCK_STREAM, 6, "", (address, port)) for address in table[host]]

    monkeypatch.setattr(asyncio.base_events.BaseEventLoop, "getaddrinfo", getaddrinfo)
    return table


async def test_name_stands_for_all_its_addresses(names: dict[str, list[str]]) -> None:
    names["router"] = ["10.0.0.2", "10.0.0.1", "10.0.0.1"]
    assert await resolve("tcp://router", default_port=7000) == ["tcp://10.0.0.1:7000", "tcp://10.0.0.2:7000"]
    assert await resolve("tcp://nobody:1", default_port=7000) is None
    assert await resolve("ipc:///run/x", default_port=7000) == ["ipc:///run/x"]


async def test_address_that_joins_the_name_is_dialled(
    wires: Wires, names: dict[str, list[str]], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Goal: a second router behind the name is found without a restart. Method: two loopback addresses, one added later."""
    monkeypatch.setattr(link, "RESOLVE_INTERVAL_S", 0.05)
    first, second, tokenizer = Recorder(), Recorder(), Recorder()
    front = wires("router", "router-0").bind(topology.ROUTER_BACKPLANE, "tcp://127.0.0.1:0", first)
    port = split_tcp(front.address)[1]
    wires("router", "router-1").bind(topology.ROUTER_BACKPLANE, f"tcp://127.0.0.2:{port}", second)
    back = wires("tokenizer", "tokenizer-0").dial(
        topology.ROUTER_BACKPLANE, [f"tcp://router:{port}"], tokenizer, register=_register("tokenizer-0")
    )
    await until(lambda: names["asked"])
    assert not tokenizer.peers
    names["router"] = ["127.0.0.1"]
    await until(lambda: first.peers)
    assert not second.peers
    names["router"] = ["127.0.0.1", "127.0.0.2"]
    # Each has registered it before it hears of that.
    await until(lambda: {peer.instance for peer in back.peers.values()} == {"router-0", "router-1"})
    assert second.peers


@pytest.mark.parametrize(
    "address", ["http://x:1", "tcp://", "tcp://x:port", "tcp://x:70000", "ipc://relative", "ipc:///" + "x" * 200]
)
def test_address_that_cannot_be_used_is_refused(address: str) -> None:
    with pytest.raises(ConfigError, match="address"):
        check_address(address)


@pytest.mark.parametrize(
    ("address", "expected"), [("tcp://*:1", True), ("tcp://0.0.0.0:1", True), ("tcp://[::]:1", True), ("tcp://127.0.0.1:1", False)]
)
def test_wildcards_are_known(address: str, expected: bool) -> None:
    assert is_wildcard(address) is expected

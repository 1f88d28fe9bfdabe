"""Addresses: what a setting says, what it resolves to.

A `tcp://host:port` target stands for all addresses of its host name, looked up anew every few seconds, so that several routers or
schedulers behind one DNS name (compose, a Kubernetes headless service) are all dialled. `ipc://path` stands for itself.
"""

from __future__ import annotations

import asyncio
import socket

from headrace.errors import ConfigError

IPC_PATH_BYTES_MAX = 107
"""Longest path of a Unix socket on Linux, without its final zero byte."""


def split_tcp(address: str, *, default_port: int = 0) -> tuple[str, int]:
    """Host and port of `tcp://host[:port]`.

    Raises:
        ConfigError: Not such an address.
    """
    scheme, _, rest = address.partition("://")
    host, colon, port = rest.rpartition(":") if not rest.endswith("]") else (rest, "", "")
    if not colon:
        host, port = rest, str(default_port)
    if scheme != "tcp" or not host or not port.isdigit() or int(port) > 65535:
        raise ConfigError(f"address {address!r} is not tcp://host:port or ipc://path")
    return host.strip("[]"), int(port)


def check_address(address: str) -> str:
    """The address itself, when it is one that a link can use."""
    if address.startswith("ipc://"):
        path = address.removeprefix("ipc://")
        if not path.startswith("/") or len(path.encode()) > IPC_PATH_BYTES_MAX:
            raise ConfigError(
                f"ipc address {address!r} needs an absolute path of at most {IPC_PATH_BYTES_MAX} bytes; set a shorter run_directory"
            )
        return address
    split_tcp(address)
    return address


def is_wildcard(address: str) -> bool:
    """Whether binding the address opens it on every interface."""
    return address.startswith("tcp://") and split_tcp(address)[0] in ("*", "0.0.0.0", "::")


async def resolve(target: str, *, default_port: int, timeout_s: float = 5.0) -> list[str] | None:
    """All addresses a target stands for, sorted; None when the name cannot be looked up now.

    Raises:
        ConfigError: The target is no address.
    """
    if target.startswith("ipc://"):
        return [target]
    host, port = split_tcp(target, default_port=default_port)
    loop = asyncio.get_running_loop()
    try:
        found = await asyncio.wait_for(loop.getaddrinfo(host, port, type=socket.SOCK_STREAM), timeout_s)
    except (OSError, TimeoutError):
        return None
    addresses = {
        f"tcp://[{address[0]}]:{port}" if family == socket.AF_INET6 else f"tcp://{address[0]}:{port}"
        for family, _, _, _, address in found
    }
    return sorted(addresses)

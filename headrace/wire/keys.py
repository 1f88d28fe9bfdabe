"""CURVE keys: one pair a role, made once by `headrace keys create`, and the handler that admits only known keys.

A role's secret proves who it is; a bound address admits the public keys of the roles that have an edge to it. Files hold one key
each in Z85 text, secrets with mode 0600.

Source: ZeroMQ RFC 26 (CurveZMQ), RFC 27 (ZAP).
"""

from __future__ import annotations

import os
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path

import zmq
from zmq.utils import z85

from headrace.errors import ConfigError
from headrace.wire.topology import ROLES

_KEY_BYTES = 40


@dataclass(frozen=True, slots=True)
class Keys:
    """One role's secret and everyone's public keys, Z85 text."""

    role: str
    secret: bytes
    public: dict[str, bytes]


def create_keys(directory: Path) -> bool:
    """Make a pair for every role. An existing whole set is kept (False); half a set is an error.

    Raises:
        ConfigError: Some but not all key files are there.
    """
    paths = [directory / f"{role}.{kind}" for role in ROLES for kind in ("public", "secret")]
    existing = [path for path in paths if path.exists()]
    if len(existing) == len(paths):
        return False
    if existing:
        missing = next(path.name for path in paths if not path.exists())
        raise ConfigError(
            f"{directory} holds {len(existing)} of {len(paths)} key files ({missing} is missing): "
            "restore it, or empty the directory and create the keys anew"
        )
    directory.mkdir(mode=0o700, parents=True, exist_ok=True)
    for role in ROLES:
        public, secret = zmq.curve_keypair()
        _write(directory / f"{role}.secret", secret, 0o600)
        _write(directory / f"{role}.public", public, 0o644)
    return True


def load_keys(directory: Path, role: str) -> Keys:
    """Read a role's secret and all public keys.

    Raises:
        ConfigError: A file is missing or holds no key.
    """
    return Keys(
        role=role,
        secret=_read(directory / f"{role}.secret"),
        public={name: _read(directory / f"{name}.public") for name in ROLES},
    )


def _write(path: Path, key: bytes, mode: int) -> None:
    descriptor = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL, mode)
    with os.fdopen(descriptor, "wb") as file:
        file.write(key + b"\n")


def _read(path: Path) -> bytes:
    try:
        key = path.read_bytes().strip()
    except OSError as error:
        raise ConfigError(f"key file {path} cannot be read ({error.strerror}): run `headrace keys create {path.parent}`") from error
    if len(key) != _KEY_BYTES:
        raise ConfigError(
            f"key file {path} holds {len(key)} bytes, a key has {_KEY_BYTES}: run `headrace keys create` into an empty directory"
        )
    return key


class Doorkeeper:
    """Answers ZAP requests of one context: an address admits the public keys it was told of, and nobody else."""

    ENDPOINT = "inproc://zeromq.zap.01"

    def __init__(self) -> None:
        self._admitted: dict[bytes, set[bytes]] = {}

    def admit(self, domain: str, public_keys: Iterable[bytes]) -> None:
        """Let these keys in at the sockets of a ZAP domain."""
        self._admitted.setdefault(domain.encode(), set()).update(z85.decode(key) for key in public_keys)

    def answer(self, request: list[bytes]) -> list[bytes]:
        """The reply to one ZAP request: [version, request id, domain, address, identity, mechanism, credentials...]."""
        version, request_id, domain, mechanism = request[0], request[1], request[2], request[5]
        is_known = mechanism == b"CURVE" and len(request) > 6 and request[6] in self._admitted.get(domain, set())
        status, text = (b"200", b"OK") if is_known else (b"400", b"unknown key")
        return [version, request_id, status, text, b"", b""]

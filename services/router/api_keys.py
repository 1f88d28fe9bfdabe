"""Who may ask: keys of clients, checked the same way over HTTP and gRPC. Pure.

Only digests are kept and compared, so neither a dump of the process nor the time a refusal takes tells a key.
"""

from __future__ import annotations

from collections.abc import Iterable
from hashlib import sha256
from typing import Final

from headrace.errors import ConfigError, UnauthenticatedError

KEY_CHARACTERS_MIN: Final = 16
_SCHEME: Final = "bearer "
_NAME_CHARACTERS: Final = 32


class ApiKeys:
    """The keys that are taken; without any, everybody may ask."""

    def __init__(self, keys: Iterable[str] = ()) -> None:
        self._digests = {_digest(key) for key in keys}

    def check(self, authorization: str) -> str:
        """Let a client pass, or not.

        Args:
            authorization: The header or metadata of that name: `Bearer KEY`.

        Returns:
            The name of the client's key, which tells what it stores from what others store: a part of the key's digest, the
            same however the key was sent. Empty where everybody may ask.

        Raises:
            UnauthenticatedError: There is no key, or one that is not taken.
        """
        if not self._digests:
            return ""
        if not authorization:
            raise UnauthenticatedError("a key is required: send it as `Authorization: Bearer KEY`", param="authorization")
        digest = _digest(authorization[len(_SCHEME) :].strip())
        if not authorization.lower().startswith(_SCHEME) or digest not in self._digests:
            raise UnauthenticatedError("the key is not one of those that are taken here", param="authorization")
        return digest.hex()[:_NAME_CHARACTERS]


def parse_keys(text: str, source: str) -> list[str]:
    """Keys of a file: one a line; empty lines and those that begin with # are left out.

    Raises:
        ConfigError: There is none, or one is too short to be a secret; it names the line.
    """
    keys = []
    for number, line in enumerate(text.splitlines(), start=1):
        key = line.strip()
        if not key or key.startswith("#"):
            continue
        if len(key) < KEY_CHARACTERS_MIN or not key.isascii() or " " in key:
            raise ConfigError(
                f"{source}: line {number} must be a key of {KEY_CHARACTERS_MIN} or more ASCII characters without spaces"
            )
        keys.append(key)
    if not keys:
        raise ConfigError(f"{source}: holds no key; with it nobody could ask")
    return keys


def _digest(key: str) -> bytes:
    return sha256(key.encode("utf-8", "surrogateescape")).digest()

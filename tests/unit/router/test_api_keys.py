from __future__ import annotations

from pathlib import Path

import pytest

from headrace.errors import ConfigError, UnauthenticatedError
from services.router.api_keys import ApiKeys, parse_keys
from services.router.config import Settings
from services.router.security import load_security

KEY = "sk-0123456789abcdef"


def test_without_keys_everybody_may_ask() -> None:
    assert ApiKeys().check("") == ApiKeys().check("Bearer anything") == ""


def test_only_keys_that_are_taken_pass() -> None:
    keys = ApiKeys([KEY, KEY + "2"])
    name = keys.check(f"Bearer {KEY}")
    assert keys.check(f"bearer  {KEY} ") == name
    assert name not in ("", keys.check(f"Bearer {KEY}2"))
    assert KEY not in name
    for wrong in ("", KEY, "Bearer ", f"Bearer {KEY}x", f"Basic {KEY}", "Bearer \udcff"):
        with pytest.raises(UnauthenticatedError) as caught:
            keys.check(wrong)
        assert KEY not in caught.value.message


def test_a_file_of_keys(tmp_path: Path) -> None:
    assert parse_keys(f"# team a\n{KEY}\n\n  {KEY}2  \n", "f") == [KEY, KEY + "2"]
    for text, word in [("", "no key"), ("# none\n", "no key"), (f"{KEY}\nshort", "line 2"), ("a b c d e f g h i j", "line 1")]:
        with pytest.raises(ConfigError, match=word):
            parse_keys(text, "f")
    path = tmp_path / "keys"
    path.write_text(KEY)
    load_security(Settings(api_keys_file=str(path))).keys.check(f"Bearer {KEY}")


def test_settings_that_protect_nothing_stop_the_start(tmp_path: Path) -> None:
    missing = str(tmp_path / "missing")
    text = tmp_path / "text"
    text.write_text("no certificate")
    for settings, word in [
        (Settings(api_keys_file=missing), "router.api_keys_file: .*cannot be read"),
        (Settings(grpc_tls_cert=missing), "router.grpc_tls_key must be set"),
        (Settings(grpc_tls_key=missing), "router.grpc_tls_cert must be set"),
        (Settings(grpc_tls_client_ca=missing), "router.grpc_tls_cert must be set"),
        (Settings(grpc_tls_cert=str(text), grpc_tls_key=str(text)), "no PEM file"),
    ]:
        with pytest.raises(ConfigError, match=word):
            load_security(settings)

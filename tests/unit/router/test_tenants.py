"""Whose a request is: what it says, else its key, and the key itself goes nowhere."""

from __future__ import annotations

import pytest

from headrace.errors import InvalidRequestError
from services.router.tenants import USER_CHARACTERS_MAX, tenant_of


def test_user_comes_before_the_key_and_nothing_is_nobody() -> None:
    assert tenant_of("me", "Bearer secret") == "user:me"
    assert tenant_of("", "") == tenant_of(None, "") == ""
    assert tenant_of(None, "Bearer secret").startswith("key:")


def test_keys_differ_and_are_not_sent_on() -> None:
    one, other = tenant_of(None, "Bearer secret"), tenant_of(None, "Bearer secrets")
    assert one != other
    assert one == tenant_of(None, "Bearer secret")
    assert "secret" not in one


def test_nobody_can_pose_as_a_key() -> None:
    key = tenant_of(None, "Bearer secret")
    assert tenant_of(key, "") != key


def test_a_user_too_long_is_refused_with_the_limit() -> None:
    assert tenant_of("x" * USER_CHARACTERS_MAX, "")
    with pytest.raises(InvalidRequestError, match="at most 256 characters") as refusal:
        tenant_of("x" * (USER_CHARACTERS_MAX + 1), "")
    assert refusal.value.param == "user"

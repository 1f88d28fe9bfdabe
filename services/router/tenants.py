"""Whose a request is."""

from __future__ import annotations

from hashlib import sha256
from typing import Final

from services.router.limits import refuse

USER_CHARACTERS_MAX: Final = 256


def tenant_of(user: str | None, authorization: str) -> str:
    """The tenant a request is counted to: its `user`, else its API key, else the nameless one.

    Args:
        user: The request's field.
        authorization: The header or metadata of that name; only its hash goes on from here.

    Raises:
        InvalidRequestError: `user` is too long.
    """
    if user:
        if len(user) > USER_CHARACTERS_MAX:
            refuse("user", f"at most {USER_CHARACTERS_MAX} characters", user)
        return f"user:{user}"
    if authorization:
        return f"key:{sha256(authorization.encode()).hexdigest()[:32]}"
    return ""

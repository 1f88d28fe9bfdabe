"""Whose a request is."""

from __future__ import annotations

from hashlib import sha256
from typing import Final

from services.router.limits import refuse

USER_CHARACTERS_MAX: Final = 256


def cache_namespace(salt: str, tenant: str | None) -> str:
    """The name inside which cached prefixes are shared: of a salt, and of a tenant where tenants are kept apart (not None).

    With the tenant's length in front no salt can be chosen that makes one tenant's name another's.
    """
    return salt if tenant is None else f"{len(tenant)}:{tenant}{salt}"


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

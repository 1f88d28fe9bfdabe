"""The paths of every protocol that has files of its own, over one engine. Part of the shell."""

from __future__ import annotations

from services.router.generation import Engine
from services.router.http.anthropic_routes import AnthropicRoutes
from services.router.http.routing import Route


def protocol_routes(engine: Engine) -> list[Route]:
    """Routes for `HttpApp`."""
    return AnthropicRoutes(engine).routes()

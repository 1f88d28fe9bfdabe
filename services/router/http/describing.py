"""/openapi.json and /docs: the API's description, for programs and for people. Part of the shell.

The page is one file without anything from elsewhere, and may load nothing.
"""

from __future__ import annotations

from importlib.metadata import version
from pathlib import Path

from services.router.http import openapi
from services.router.http.exchange import Exchange
from services.router.http.routing import Route

PAGE = Path(__file__).with_name("docs.html")
_POLICY = b"default-src 'none'; style-src 'unsafe-inline'; script-src 'unsafe-inline'; connect-src 'self'; frame-ancestors 'none'"


class DescribingRoutes:
    """The API's own description."""

    def __init__(self) -> None:
        self._description = openapi.description(version("headrace"))
        self._page = PAGE.read_bytes()

    def routes(self) -> list[Route]:
        """Paths with their handlers."""
        return [
            Route("/openapi.json", {"GET": self._describe}, is_open=True),
            Route("/docs", {"GET": self._show_page}, is_open=True),
        ]

    async def _describe(self, exchange: Exchange) -> None:
        await exchange.respond(200, self._description)

    async def _show_page(self, exchange: Exchange) -> None:
        headers = [(b"content-security-policy", _POLICY)]
        await exchange.respond(200, self._page, content_type=b"text/html; charset=utf-8", headers=headers)

"""Which handler a path and method belong to, and in which protocol's shape its errors are told. Pure."""

from __future__ import annotations

from collections.abc import Awaitable, Callable, Iterable, Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING
from urllib.parse import unquote

from headrace.errors import HeadraceError
from services.router.http import openai_answers

if TYPE_CHECKING:
    from services.router.http.exchange import Exchange

Handler = Callable[["Exchange"], Awaitable[None]]
ErrorShape = Callable[[HeadraceError], object]


@dataclass(frozen=True, slots=True)
class Route:
    """One path, which may hold names in braces, each for one segment; `/v1/models/{model*}` takes the rest, slashes and all."""

    template: str
    methods: Mapping[str, Handler]
    error_object: ErrorShape = openai_answers.error_object
    is_open: bool = False
    """Answered without a key."""


class RouteTable:
    """Finds routes by path."""

    def __init__(self, routes: Iterable[Route]) -> None:
        self._exact: dict[str, Route] = {}
        self._templates: list[tuple[list[str], Route]] = []
        for route in routes:
            if "{" in route.template:
                self._templates.append((route.template.split("/"), route))
            else:
                self._exact[route.template] = route

    def find(self, path: str) -> tuple[Route, dict[str, str]] | None:
        """The route of a path, as the client wrote it, with the values of its names."""
        exact = self._exact.get(path)
        if exact is not None:
            return exact, {}
        segments = path.split("/")
        for template, route in self._templates:
            values = _match(template, segments)
            if values is not None:
                return route, values
        return None


def _match(template: list[str], segments: list[str]) -> dict[str, str] | None:
    takes_rest = template[-1].endswith("*}")
    if len(segments) < len(template) or (len(segments) > len(template) and not takes_rest):
        return None
    values = {}
    for index, part in enumerate(template):
        if not part.startswith("{"):
            if part != segments[index]:
                return None
            continue
        is_rest = part.endswith("*}")
        value = "/".join(segments[index:]) if is_rest else segments[index]
        if not value:
            return None
        values[part.strip("{*}")] = unquote(value)
    return values

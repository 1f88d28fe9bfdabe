"""Paths that embed and compare texts. Part of the shell; shapes stand in embeddings.py."""

from __future__ import annotations

import time

from services.router.generation import EmbedAnswer, EmbedRequest, Engine
from services.router.http import embeddings, serving
from services.router.http.exchange import Exchange, unless_disconnected
from services.router.http.routing import Route
from services.router.tenants import tenant_of


class EmbeddingsRoutes:
    """/v1/embeddings and what is made of vectors."""

    def __init__(self, engine: Engine) -> None:
        self._engine = engine

    def routes(self) -> list[Route]:
        """Paths with their handlers."""
        return [
            Route("/v1/embeddings", {"POST": self._embed}),
            Route("/v1/score", {"POST": self._score}),
            Route("/v1/rerank", {"POST": self._rerank}),
        ]

    async def _embed(self, exchange: Exchange) -> None:
        call = embeddings.parse_embeddings(await exchange.read_body())
        answer = await self._answer(exchange, call.request, call.user)
        await exchange.respond(200, embeddings.embeddings(answer, is_base64=call.is_base64))

    async def _score(self, exchange: Exchange) -> None:
        call = embeddings.parse_score(await exchange.read_body())
        answer = await self._answer(exchange, call.request, call.user)
        request_id = exchange.open_call.request_id
        await exchange.respond(200, embeddings.scores(answer, call, request_id=request_id, created_unix_s=int(time.time())))

    async def _rerank(self, exchange: Exchange) -> None:
        call = embeddings.parse_rerank(await exchange.read_body())
        answer = await self._answer(exchange, call.request, call.user)
        await exchange.respond(200, embeddings.ranking(answer, call, request_id=exchange.open_call.request_id))

    async def _answer(self, exchange: Exchange, request: EmbedRequest, user: str | None) -> EmbedAnswer:
        call = exchange.open_call
        call.tenant = tenant_of(user, serving.authorization(exchange)) if exchange.tenant is None else exchange.tenant
        return await unless_disconnected(exchange, self._engine.embed(request, call))

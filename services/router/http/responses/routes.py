"""Paths of the Responses and Conversations APIs. Part of the shell; everything that decides stands in the files beside it."""

from __future__ import annotations

import time
from collections.abc import Sequence
from functools import partial
from typing import Any

import orjson

from headrace.errors import HeadraceError, InvalidRequestError, NotFoundError
from services.router.generation import Engine, GenerationRequest
from services.router.http import serving
from services.router.http.exchange import Exchange
from services.router.http.rendering import Usage
from services.router.http.responses import answers, shapes
from services.router.http.responses.background import BackgroundRuns, Run
from services.router.http.responses.history import History, KeyHistory
from services.router.http.responses.items import UNIONS, Item, listed, named_messages
from services.router.http.routing import Route
from services.router.http.validation import load_object, validate
from services.router.storage_thread import StorageThread

BACKGROUND_ENDPOINT = "/v1/responses (background)"


class ResponsesRoutes:
    """POST /v1/responses and what belongs to it."""

    def __init__(self, engine: Engine, history: History, thread: StorageThread) -> None:
        self._engine = engine
        self._history = history
        self._thread = thread
        self._runs = BackgroundRuns()

    def routes(self) -> list[Route]:
        """Paths with their handlers."""
        return [
            Route("/v1/responses", {"POST": self._create}),
            Route("/v1/responses/{response_id}", {"GET": self._retrieve, "DELETE": self._delete}),
            Route("/v1/responses/{response_id}/cancel", {"POST": self._cancel}),
            Route("/v1/responses/{response_id}/input_items", {"GET": self._list_input}),
        ]

    def _of(self, exchange: Exchange) -> KeyHistory:
        return self._history.of(exchange.key_name)

    async def start(self) -> None:
        """Drop what former lives left."""
        await self._thread.run(self._history.sweep, time.time())

    async def stop(self) -> None:
        """Keep what ends now."""
        await self._runs.stop()

    async def _create(self, exchange: Exchange) -> None:
        call = shapes.parse_create(await exchange.read_body())
        history = self._of(exchange)
        items = listed(call.items, exchange.open_call.request_id)
        before, items = await self._thread.run(_read_before, history, call, items)
        generation = call.generation([*before, *items])
        if call.body.background is True:
            await self._create_background(exchange, call, generation, items)
            return
        is_streaming = call.body.stream is True
        stream = serving.open_stream(exchange, self._engine, generation, user=call.body.user, is_streaming=is_streaming)
        answer = self._answer(call, exchange.open_call.request_id, stream.model)

        async def keep(usage: Usage) -> None:
            answer.end(usage)
            await _keep(self._thread, history, call, answer, items)

        await serving.send_answer(exchange, stream, answer, is_streaming=is_streaming, before_end=keep)

    def _answer(self, call: shapes.ResponseCall, request_id: str, model: str) -> answers.ResponseAnswer:
        return answers.ResponseAnswer(call, request_id, model=model, created_unix_s=int(time.time()))

    async def _create_background(
        self, exchange: Exchange, call: shapes.ResponseCall, generation: GenerationRequest, items: list[Item]
    ) -> None:
        """Begin a run that has a call of its own: the client's ends with this answer."""
        headers, history = exchange.headers, self._of(exchange)
        own = self._engine.begin_call(
            protocol="http",
            endpoint=BACKGROUND_ENDPOINT,
            traceparent=exchange.open_call.context.traceparent or headers.get("traceparent", ""),
            tracestate=headers.get("tracestate", ""),
        )
        own.timeout_s = exchange.open_call.timeout_s
        try:
            stream = serving.open_stream_for(own, exchange, self._engine, generation, user=call.body.user)
            answer = self._answer(call, own.request_id, stream.model)
            try:
                await self._thread.run(history.responses.begin, answer.response(), items, time.time())
            except BaseException:
                stream.close()
                raise
        except HeadraceError as error:
            self._engine.end_call(own, status=str(error.http_status), error_code=error.code)
            raise

        async def keep(ended: answers.ResponseAnswer) -> None:
            await _keep(self._thread, history, call, ended, items)

        queued = orjson.dumps(answer.response())
        release = partial(self._history.release, answer.id)
        self._runs.start(Run(self._engine, own, stream, answer, keep, release=release, key_name=exchange.key_name))
        if call.body.stream is True:
            await self._runs.send_events(exchange, answer.id, starting_after=None)
        else:
            await exchange.respond(200, queued)

    async def _retrieve(self, exchange: Exchange) -> None:
        asked = validate(shapes.RetrieveQuery, _without_include(exchange.query))
        response_id = exchange.path_values["response_id"]
        if asked.starting_after is not None and not asked.stream:
            raise InvalidRequestError("starting_after must be left out unless stream is true", param="starting_after")
        run = self._runs.running(response_id, exchange.key_name)
        responses = self._of(exchange).responses
        read = responses.finished if asked.stream else responses.get
        kept = run.answer.response() if run is not None else await self._thread.run(read, response_id, time.time())
        if asked.stream:
            await self._runs.send_events(exchange, response_id, starting_after=asked.starting_after)
        else:
            await exchange.respond(200, orjson.dumps(kept))

    async def _delete(self, exchange: Exchange) -> None:
        response_id = exchange.path_values["response_id"]
        run = self._runs.running(response_id, exchange.key_name)
        if run is not None:
            await run.cancel()
        await self._thread.run(self._of(exchange).responses.delete, response_id, time.time())
        self._runs.forget(response_id)
        await exchange.respond(200, answers.deleted("response", response_id))

    async def _cancel(self, exchange: Exchange) -> None:
        response_id = exchange.path_values["response_id"]
        run = self._runs.running(response_id, exchange.key_name)
        if run is not None:
            await run.cancel()
        kept = await self._thread.run(self._of(exchange).responses.finished, response_id, time.time())
        if not kept["background"]:
            raise InvalidRequestError(
                "only a background response can be cancelled; end others by closing the connection", param="response_id"
            )
        await exchange.respond(200, orjson.dumps(kept))

    async def _list_input(self, exchange: Exchange) -> None:
        asked = validate(shapes.PageQuery, _without_include(exchange.query))
        items = await self._thread.run(self._of(exchange).responses.input_items, exchange.path_values["response_id"], time.time())
        await exchange.respond(200, page_of(items, asked))


def _read_before(history: KeyHistory, call: shapes.ResponseCall, items: list[Item]) -> tuple[list[Item], list[Item]]:
    """What came before a call, and its items with references resolved. Runs on the history's thread."""
    now_s = time.time()
    before: list[Item] = []
    if call.body.previous_response_id is not None:
        before = history.responses.transcript(call.body.previous_response_id, now_s)
    elif call.conversation_id is not None:
        before = history.conversations.items(call.conversation_id, now_s)
    return before, history.resolve(items, now_s)


async def _keep(
    thread: StorageThread, history: KeyHistory, call: shapes.ResponseCall, answer: answers.ResponseAnswer, items: Sequence[Item]
) -> None:
    """Keep an answer as it stands, as far as the call wants that."""
    if call.is_stored:
        await thread.run(history.responses.put, answer.response(), items, time.time())
    if call.conversation_id is not None and answer.status in ("completed", "incomplete"):
        added = [*items, *answer.output]
        await thread.run(history.conversations.append, call.conversation_id, added, time.time())


class ConversationsRoutes:
    """POST /v1/conversations and what belongs to it."""

    def __init__(self, history: History, thread: StorageThread) -> None:
        self._history = history
        self._thread = thread

    def routes(self) -> list[Route]:
        """Paths with their handlers."""
        root = "/v1/conversations/{conversation_id}"
        return [
            Route("/v1/conversations", {"POST": self._create}),
            Route(root, {"GET": self._show, "POST": self._update, "DELETE": self._delete}),
            Route(f"{root}/items", {"GET": self._list_items, "POST": self._add_items}),
            Route(f"{root}/items/{{item_id}}", {"GET": self._show_item, "DELETE": self._delete_item}),
        ]

    def _of(self, exchange: Exchange) -> KeyHistory:
        return self._history.of(exchange.key_name)

    async def _create(self, exchange: Exchange) -> None:
        raw = await exchange.read_body()
        asked = validate(shapes.ConversationBody, _with_named(load_object(raw) if raw else {}), unions=UNIONS)
        shapes.check_metadata(asked.metadata)
        request_id = exchange.open_call.request_id
        conversation = {
            "id": f"conv_{request_id}",
            "object": "conversation",
            "created_at": int(time.time()),
            "metadata": asked.metadata or {},
        }
        items = await self._thread.run(self._of(exchange).resolve, listed(asked.items or (), request_id), time.time())
        await self._thread.run(self._of(exchange).conversations.put, conversation, items, time.time())
        await exchange.respond(200, orjson.dumps(conversation))

    async def _show(self, exchange: Exchange) -> None:
        name = exchange.path_values["conversation_id"]
        await exchange.respond(200, orjson.dumps(await self._thread.run(self._of(exchange).conversations.get, name, time.time())))

    async def _update(self, exchange: Exchange) -> None:
        asked = validate(shapes.UpdateBody, load_object(await exchange.read_body()))
        shapes.check_metadata(asked.metadata)
        name = exchange.path_values["conversation_id"]
        updated = await self._thread.run(self._of(exchange).conversations.update, name, asked.metadata or {}, time.time())
        await exchange.respond(200, orjson.dumps(updated))

    async def _delete(self, exchange: Exchange) -> None:
        name = exchange.path_values["conversation_id"]
        await self._thread.run(self._of(exchange).conversations.delete, name, time.time())
        await exchange.respond(200, answers.deleted("conversation.deleted", name))

    async def _list_items(self, exchange: Exchange) -> None:
        asked = validate(shapes.PageQuery, _without_include(exchange.query))
        await exchange.respond(200, page_of(await self._items(exchange), asked))

    async def _add_items(self, exchange: Exchange) -> None:
        asked = validate(shapes.ItemsBody, _with_named(load_object(await exchange.read_body())), unions=UNIONS)
        items = await self._thread.run(self._of(exchange).resolve, listed(asked.items, exchange.open_call.request_id), time.time())
        await self._thread.run(self._of(exchange).conversations.append, exchange.path_values["conversation_id"], items, time.time())
        await exchange.respond(200, answers.page(items, has_more=False))

    async def _show_item(self, exchange: Exchange) -> None:
        wanted = exchange.path_values["item_id"]
        for item in await self._items(exchange):
            if item["id"] == wanted:
                await exchange.respond(200, orjson.dumps(item))
                return
        raise NotFoundError(f"there is no item {wanted[:100]!r} in this conversation", param="item_id")

    async def _delete_item(self, exchange: Exchange) -> None:
        name = exchange.path_values["conversation_id"]
        await self._thread.run(self._of(exchange).conversations.delete_item, name, exchange.path_values["item_id"], time.time())
        await exchange.respond(200, orjson.dumps(await self._thread.run(self._of(exchange).conversations.get, name, time.time())))

    async def _items(self, exchange: Exchange) -> list[Item]:
        return await self._thread.run(self._of(exchange).conversations.items, exchange.path_values["conversation_id"], time.time())


def page_of(objects: Sequence[dict[str, Any]], asked: shapes.PageQuery) -> bytes:
    """The wanted part of a list that is there whole, oldest first.

    Raises:
        InvalidRequestError: `after` names nothing in it.
    """
    ordered = list(objects) if asked.order == "asc" else list(reversed(objects))
    first = 0
    if asked.after is not None:
        ids = [item["id"] for item in ordered]
        if asked.after not in ids:
            raise InvalidRequestError(f"after must be the id of an item of the list; got {asked.after[:100]!r}", param="after")
        first = ids.index(asked.after) + 1
    part = ordered[first : first + asked.limit]
    return answers.page(part, has_more=first + asked.limit < len(ordered))


def _with_named(body: dict[str, Any]) -> dict[str, Any]:
    return {**body, "items": named_messages(body["items"])} if "items" in body else body


def _without_include(query: dict[str, str]) -> dict[str, Any]:
    """`include` asks for parts of items that are always there or never."""
    return {name: value for name, value in query.items() if name.partition("[")[0] != "include"}

"""Responses that are made while nobody waits, and those who look on. Part of the shell.

A run keeps its events, so that a client can come back and read on from any of them, until so many later runs have ended.
"""

from __future__ import annotations

import asyncio
from collections import OrderedDict
from collections.abc import Awaitable, Callable

from headrace.errors import HeadraceError, InvalidRequestError, RequestFailedError
from headrace.telemetry import logs
from services.router.generation import Call, Engine, OutputStream
from services.router.http import sse
from services.router.http.exchange import Exchange, unless_disconnected
from services.router.http.responses.answers import ResponseAnswer
from services.router.http.serving import usage_of

log = logs.get_logger()

ENDED_RUNS_MAX = 256
EVENTS_BYTES_MAX = 64 * 1024 * 1024
"""Most bytes of events kept of runs that have ended."""
_STOP_WAIT_S = 5.0

Keep = Callable[[ResponseAnswer], Awaitable[None]]


class Run:
    """One response on its way, and its events so far; the place of an event is its sequence number."""

    def __init__(
        self,
        engine: Engine,
        call: Call,
        stream: OutputStream,
        answer: ResponseAnswer,
        keep: Keep,
        *,
        release: Callable[[], None],
        key_name: str,
    ) -> None:
        """`release` is told when its end has been kept, as far as possible; `key_name` is that of the key whose it is."""
        self.answer = answer
        self.key_name = key_name
        self.events: list[bytes] = answer.queued()
        self.is_over = False
        self.is_cancelled = False
        self._engine = engine
        self._call = call
        self._stream = stream
        self._keep = keep
        self._release = release
        self._news = asyncio.Event()
        self._over = asyncio.Event()

    @property
    def num_bytes(self) -> int:
        """Size of the events."""
        return sum(map(len, self.events))

    async def work(self) -> None:
        """Make the response; every end is kept, where that is possible, and told."""
        error: HeadraceError | None = None
        try:
            await self._generate()
        except HeadraceError as failure:
            error = failure
        except Exception:
            log.exception("background_response.failed", request_id=self._call.request_id)
            error = RequestFailedError("internal error; the router's log has the details")
        finally:
            self._stream.close()
        if error is not None:
            self.answer.abandon("cancelled" if self.is_cancelled else "failed", None if self.is_cancelled else error)
            await self._keep_or_log()
        self._release()
        self._tell([self.answer.last_event()])
        self.is_over = True
        self._over.set()
        status = "499" if self.is_cancelled else "200" if error is None else str(error.http_status)
        self._engine.end_call(self._call, status=status, error_code=None if error is None else error.code)

    async def _generate(self) -> None:
        is_begun = False
        while not self.answer.is_finished:
            piece = await self._stream.next()
            if not is_begun:
                is_begun = True
                self._tell(self.answer.started())
                await self._keep(self.answer)
            self._tell(self.answer.events_of(piece))
        self.answer.end(usage_of(self._stream))
        await self._keep(self.answer)

    async def _keep_or_log(self) -> None:
        try:
            await self._keep(self.answer)
        except Exception:
            # Whoever looks on is told of the end all the same.
            log.exception("background_response.not_kept", request_id=self._call.request_id)

    async def cancel(self) -> None:
        """End it, and wait until it has."""
        if not self.is_over:
            self.is_cancelled = True
            self._stream.close()
            await self._over.wait()

    async def wait_beyond(self, num_events: int) -> None:
        """Wait until there are more events, or will be none."""
        while len(self.events) <= num_events and not self.is_over:
            self._news.clear()
            await self._news.wait()

    def _tell(self, events: list[bytes]) -> None:
        self.events += events
        self._news.set()


class BackgroundRuns:
    """All runs of this process."""

    def __init__(self) -> None:
        self._running: dict[str, Run] = {}
        self._ended: OrderedDict[str, Run] = OrderedDict()
        self._ended_bytes = 0
        self._tasks: set[asyncio.Task[None]] = set()

    def start(self, run: Run) -> None:
        """Begin a run."""
        self._running[run.answer.id] = run
        task = asyncio.create_task(self._follow_through(run), name="background-response")
        self._tasks.add(task)
        task.add_done_callback(self._tasks.discard)

    async def _follow_through(self, run: Run) -> None:
        await run.work()
        del self._running[run.answer.id]
        self._ended[run.answer.id] = run
        self._ended_bytes += run.num_bytes
        while len(self._ended) > ENDED_RUNS_MAX or self._ended_bytes > EVENTS_BYTES_MAX:
            _, oldest = self._ended.popitem(last=False)
            self._ended_bytes -= oldest.num_bytes

    def running(self, response_id: str, key_name: str) -> Run | None:
        """The run of this key's response, while that is still being made."""
        run = self._running.get(response_id)
        return run if run is not None and run.key_name == key_name else None

    def forget(self, response_id: str) -> None:
        """Drop the events of a run that has ended."""
        run = self._ended.pop(response_id, None)
        if run is not None:
            self._ended_bytes -= run.num_bytes

    async def send_events(self, exchange: Exchange, response_id: str, *, starting_after: int | None) -> None:
        """Send a run's events from one on, to the last, as they come.

        Raises:
            InvalidRequestError: Its events are not kept.
            RequestAbortedError: The client went away; the run goes on.
        """
        run = self._running.get(response_id) or self._ended.get(response_id)
        if run is None:
            message = "stream must be false: the events of this response are not kept any more, or were not made in the background"
            raise InvalidRequestError(message, param="stream")
        num_sent = 0 if starting_after is None else starting_after + 1
        if num_sent > len(run.events):
            message = f"starting_after must be at most {len(run.events) - 1}; got {starting_after}"
            raise InvalidRequestError(message, param="starting_after")
        await exchange.start(200, sse.HEADERS)
        while True:
            events = run.events[num_sent:]
            num_sent += len(events)
            is_last = run.is_over and num_sent == len(run.events)
            await exchange.write_or_cut(b"".join(events), is_last=is_last)
            if is_last:
                return
            await unless_disconnected(exchange, run.wait_beyond(num_sent))

    async def stop(self) -> None:
        """Wait a moment for runs to keep their ends: the router has ended their requests."""
        if self._tasks:
            await asyncio.wait(self._tasks, timeout=_STOP_WAIT_S)
        for task in self._tasks:
            task.cancel()

"""Works batches off, one after the other, behind online traffic. Part of the shell.

Of all routers that share a directory the one that holds its lock does this. What is done is in the results files, line by line, so
the next life goes on where this one ended: a request may be asked twice, and is told once.
"""

from __future__ import annotations

import asyncio
import os
import time
from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass

from headrace.errors import HeadraceError, NotFoundError
from headrace.telemetry import logs
from services.router.file_lock import take_lock
from services.router.http.batches import lines as batch_lines
from services.router.http.batches.in_process import InProcessAnswer, InProcessRequest
from services.router.http.batches.lines import Line
from services.router.http.batches.opening import OpeningStorage
from services.router.http.batches.shapes import file_object
from services.router.http.batches.storage import Row, Storage, Unfinished
from services.router.http.exchange import Application

log = logs.get_logger()

LOCK = "batches.lock"
_POLL_S = 1.0
_RETRY_MAX_S = 30.0


@dataclass(frozen=True, slots=True)
class BatchSettings:
    """How batches are worked off."""

    concurrency: int
    max_requests: int


class BatchRunner:
    """The one task that works batches off."""

    def __init__(self, storage: OpeningStorage, settings: BatchSettings, num_online: Callable[[], int]) -> None:
        """`num_online` tells how many requests are open at this router that somebody waits for."""
        self._storage = storage
        self._settings = settings
        self._num_online = num_online
        self._wake = asyncio.Event()
        self._task: asyncio.Task[None] | None = None
        self._app: Application | None = None
        self._lock: int | None = None

    def start(self, app: Application) -> None:
        """Begin: `app` is asked for every request."""
        self._app = app
        self._task = asyncio.create_task(self._run(), name="batch-runner")

    def wake(self) -> None:
        """There may be something to do."""
        self._wake.set()

    async def stop(self) -> None:
        """End; what is under way is asked again by the next life."""
        if self._task is not None:
            self._task.cancel()
            with suppress(asyncio.CancelledError):
                await self._task
        if self._lock is not None:
            os.close(self._lock)

    async def _run(self) -> None:
        while True:
            try:
                found = await self._next()
                if found is not None:
                    await self._work_off(found)
                    continue
            except HeadraceError as error:
                log.warning("batches.failed", error=error.message)
            except Exception:
                # The batch stays unfinished, and is tried again: others must not wait for ever because of it.
                log.exception("batches.failed")
            self._wake.clear()
            with suppress(TimeoutError):
                async with asyncio.timeout(_POLL_S):
                    await self._wake.wait()

    async def _next(self) -> Unfinished | None:
        if not self._storage.is_there or not self._has_lock():
            return None
        return await self._storage.run(lambda storage: storage.batches.next_unfinished())

    def _has_lock(self) -> bool:
        """Whether this process is the one that works batches off; a lock is let go of by its holder's death."""
        if self._lock is None:
            self._lock = take_lock(self._storage.directory / LOCK)
        return self._lock is not None

    async def _work_off(self, found: Unfinished) -> None:
        assert self._app is not None
        work = _Work(self._app, self._storage, self._settings, self._num_online, found)
        try:
            await work.run()
        except NotFoundError as error:
            await work.fail([{"code": "file_not_found", "message": error.message, "param": "input_file_id", "line": None}])


class _Results:
    """The two files that a batch makes: what was answered, and what went wrong. Each name is the id that its file will have."""

    def __init__(self, batch: Row, key_name: str) -> None:
        """`key_name` is that of the key that sees them."""
        tail = batch["id"].removeprefix("batch_")
        self._batch = batch
        self._key_name = key_name
        self._names = (f"file-{tail}-output", f"file-{tail}-error")

    def told_already(self, storage: Storage) -> tuple[set[str], set[str]]:
        """Names of the requests that they tell of."""
        done, failed = (batch_lines.told_already(storage.files.path(name)) for name in self._names)
        return done, failed

    def append(self, storage: Storage, text: bytes, *, is_error: bool) -> None:
        """Tell more."""
        with storage.files.path(self._names[is_error]).open("ab") as content:
            content.write(text)

    def make_files(self, storage: Storage) -> list[str | None]:
        """Make the results known as files; one without a line is none."""
        ids: list[str | None] = []
        expiry = self._batch["output_expires_after"]
        now_s = time.time()
        for name, kind in zip(self._names, ("output", "error"), strict=True):
            path = storage.files.path(name)
            if not path.exists():
                ids.append(None)
                continue
            made = file_object(
                name,
                filename=f"{self._batch['id']}_{kind}.jsonl",
                purpose="batch_output",
                num_bytes=path.stat().st_size,
                created_s=now_s,
                expires_s=None if expiry is None else int(now_s) + expiry["seconds"],
            )
            storage.files.replace(made, key_name=self._key_name)
            ids.append(name)
        return ids

    def drop(self, storage: Storage) -> None:
        """Forget what was told."""
        for name in self._names:
            storage.files.discard(name)


class _Work:
    """One batch on its way."""

    def __init__(
        self,
        app: Application,
        storage: OpeningStorage,
        settings: BatchSettings,
        num_online: Callable[[], int],
        found: Unfinished,
    ) -> None:
        self._app = app
        self._storage = storage
        self._settings = settings
        self._num_online = num_online
        self._batch = found.batch
        self._key_name = found.key_name
        self._results = _Results(found.batch, found.key_name)
        self._tenant = found.tenant
        self._asking: dict[asyncio.Task[None], InProcessRequest] = {}
        self._ending = asyncio.Event()

    async def run(self) -> None:
        """From its input to its results."""
        checked = await self._storage.run(self._check)
        if checked.errors:
            await self.fail(checked.errors)
            return
        done, failed = await self._storage.run(self._results.told_already)
        counts = {"total": len(checked.lines), "completed": len(done), "failed": len(failed)}
        await self._update(request_counts=counts)
        if self._batch["status"] == "validating":
            await self._update(status="in_progress", in_progress_at=int(time.time()))
        waiting = [line for line in checked.lines if line.custom_id not in done and line.custom_id not in failed]
        try:
            reason = await self._ask_all(waiting)
        finally:
            for task in self._asking:
                task.cancel()
        await self._finish(reason)

    async def fail(self, errors: list[Row]) -> None:
        """It could not begin, or not go on."""
        found = {"object": "list", "data": errors}
        await self._update(status="failed", failed_at=int(time.time()), errors=found)
        await self._storage.run(self._results.drop)

    def _check(self, storage: Storage) -> batch_lines.CheckedInput:
        path = storage.files.path(self._batch["input_file_id"])
        if not path.exists():
            raise NotFoundError(f"the input file {self._batch['input_file_id']} was deleted", param="input_file_id")
        return batch_lines.check_input(path, self._batch["endpoint"], max_requests=self._settings.max_requests)

    async def _ask_all(self, waiting: list[Line]) -> str:
        """Ask every request; says how that ended: "completed", "cancelled" or "expired"."""
        position = 0
        checked_s = 0.0
        while position < len(waiting) or self._asking:
            if time.monotonic() - checked_s >= _POLL_S:
                checked_s = time.monotonic()
                if (reason := await self._reason_to_end()) is not None:
                    await self._give_up(waiting, reason)
                    return reason
                await self._update()
            while position < len(waiting) and len(self._asking) < self._allowed():
                self._begin(waiting[position])
                position += 1
            if self._asking:
                ended, _ = await asyncio.wait(self._asking, timeout=_POLL_S, return_when=asyncio.FIRST_COMPLETED)
                for task in ended:
                    del self._asking[task]
                    task.result()
        return "cancelled" if await self._is_cancelling() else "completed"

    def _allowed(self) -> int:
        """How many may be asked at once: as many fewer as there are requests that somebody waits for, and one at least."""
        return max(1, self._settings.concurrency - self._num_online())

    async def _reason_to_end(self) -> str | None:
        if await self._is_cancelling():
            return "cancelled"
        return "expired" if time.time() >= self._batch["expires_at"] else None

    async def _is_cancelling(self) -> bool:
        found = await self._storage.run(lambda storage: storage.batches.get(self._batch["id"], key_name=self._key_name))
        if found["status"] == "cancelling":
            self._batch |= {"status": "cancelling", "cancelling_at": found["cancelling_at"]}
        return bool(found["status"] == "cancelling")

    async def _give_up(self, waiting: list[Line], reason: str) -> None:
        """Leave what is being asked; of what expires each request is told."""
        self._ending.set()
        for request in self._asking.values():
            request.leave()
        if self._asking:
            await asyncio.wait(self._asking)
        self._asking.clear()
        if reason == "expired":
            done, failed = await self._storage.run(self._results.told_already)
            message = f"the request was not answered within {self._batch['completion_window']}"
            untold = [line for line in waiting if line.custom_id not in done | failed]
            text = b"".join(batch_lines.unasked_line(line.custom_id, "batch_expired", message) for line in untold)
            await self._append(text, is_error=True, count=len(untold))

    def _begin(self, line: Line) -> None:
        # The request is replaced when it is asked again, so the task is known by its latest.
        task = asyncio.create_task(self._ask(line), name="batch-request")
        self._asking[task] = InProcessRequest(self._batch["endpoint"], b"", self._tenant)

    async def _ask(self, line: Line) -> None:
        """Ask one request until it has an answer that is its own, and keep that."""
        text = await self._storage.run(
            lambda storage: storage.files.read(self._batch["input_file_id"], line.offset, line.num_bytes)
        )
        endpoint = self._batch["endpoint"]
        body = batch_lines.request_body(text)
        while not self._ending.is_set():
            request = InProcessRequest(endpoint, body, self._tenant)
            task = asyncio.current_task()
            assert task is not None
            self._asking[task] = request
            answer = await request.ask(self._app)
            if self._ending.is_set():
                return
            if answer.status not in (429, 503):
                await self._keep(line, answer)
                return
            with suppress(TimeoutError):
                async with asyncio.timeout(_retry_after_s(answer)):
                    await self._ending.wait()

    async def _keep(self, line: Line, answer: InProcessAnswer) -> None:
        is_error = answer.status != 200
        request_id = answer.headers.get("x-request-id", "")
        await self._append(
            batch_lines.answer_line(line.custom_id, request_id, answer.status, answer.body), is_error=is_error, count=1
        )

    async def _append(self, text: bytes, *, is_error: bool, count: int) -> None:
        await self._storage.run(lambda storage: self._results.append(storage, text, is_error=is_error))
        self._batch["request_counts"]["failed" if is_error else "completed"] += count

    async def _update(self, **fields: object) -> None:
        self._batch |= fields
        await self._storage.run(lambda storage: storage.batches.update(self._batch))

    async def _finish(self, reason: str) -> None:
        if reason == "completed":
            await self._update(status="finalizing", finalizing_at=int(time.time()))
        ids = await self._storage.run(self._results.make_files)
        await self._update(status=reason, output_file_id=ids[0], error_file_id=ids[1], **{f"{reason}_at": int(time.time())})
        log.info("batch.finished", batch_id=self._batch["id"], status=reason, **self._batch["request_counts"])


def _retry_after_s(answer: InProcessAnswer) -> float:
    text = answer.headers.get("retry-after", "1")
    return min(_RETRY_MAX_S, float(text) if text.isdigit() else 1.0)

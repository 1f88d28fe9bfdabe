"""/v1/files and /v1/batches: uploads within bounds, batches from their input to their results, over a restart."""

from __future__ import annotations

import asyncio
import io
import json
import time
from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any

import pytest

from headrace.errors import DeadlineExceededError, InvalidRequestError, NotFoundError, OverloadedError, RequestFailedError
from services.router.api_keys import ApiKeys
from services.router.generation import OutputPiece
from services.router.http.app import HttpApp
from services.router.http.batches.lines import check_input, told_already
from services.router.http.batches.runner import BatchSettings
from services.router.http.batches.shapes import file_object
from services.router.http.batches.storage import FileLimits, Storage
from services.router.http.batches.upload import Upload, boundary_of
from services.router.http.exchange import Exchange, HttpLimits
from services.router.http.protocols import Protocols
from tests.patience import NEVER_S, WAIT_S
from tests.unit.router.fake_engine import FakeEngine
from tests.unit.router.http_client import LIMITS, Answer, ask, storage_settings
from tests.virtual_time import virtual_time

BOUNDARY = "b0undary"


class Service:
    """Engine and application with everything they keep in a directory."""

    def __init__(self, directory: Path, *script: Any, **changes: Any) -> None:
        self.engine = FakeEngine(*script)
        self.protocols = Protocols(self.engine, storage_settings(directory=directory / "data", **changes))
        self.app = HttpApp(self.engine, LIMITS, self.protocols.routes())

    async def upload(self, content: bytes, purpose: str = "batch", **fields: str) -> Answer:
        kind = f"multipart/form-data; boundary={BOUNDARY}"
        return await ask(self.app, "POST", "/v1/files", raw=form(content, {"purpose": purpose, **fields}), content_type=kind)

    async def batch(self, content: bytes, **fields: Any) -> Answer:
        source = (await self.upload(content)).json["id"]
        body = {"input_file_id": source, "endpoint": "/v1/chat/completions", "completion_window": "24h", **fields}
        return await ask(self.app, "POST", "/v1/batches", body)

    async def until(self, batch_id: str, *statuses: str) -> dict[str, Any]:
        async with asyncio.timeout(WAIT_S):
            while True:
                found: dict[str, Any] = (await ask(self.app, "GET", f"/v1/batches/{batch_id}")).json
                if found["status"] in statuses:
                    return found
                await asyncio.sleep(0.01)

    async def lines(self, file_id: str) -> list[Any]:
        return (await ask(self.app, "GET", f"/v1/files/{file_id}/content")).lines


def form(content: bytes, fields: dict[str, str], *, boundary: str = BOUNDARY) -> bytes:
    parts = [
        f'--{boundary}\r\nContent-Disposition: form-data; name="{name}"\r\n\r\n{text}\r\n'.encode() for name, text in fields.items()
    ]
    head = f'--{boundary}\r\nContent-Disposition: form-data; name="file"; filename="in.jsonl"\r\nContent-Type: text/plain\r\n\r\n'
    return b"".join(parts) + head.encode() + content + f"\r\n--{boundary}--\r\n".encode()


def request_line(name: str, **fields: Any) -> bytes:
    body = {"model": "m", "messages": [{"role": "user", "content": name}]}
    return json.dumps({"custom_id": name, "method": "POST", "url": "/v1/chat/completions", "body": body, **fields}).encode() + b"\n"


@pytest.fixture
async def service(tmp_path: Path) -> AsyncIterator[Any]:
    made: list[Service] = []

    async def make(*script: Any, **changes: Any) -> Service:
        made.append(Service(tmp_path, *script, **changes))
        await made[-1].protocols.start(made[-1].app)
        return made[-1]

    yield make
    for each in made:
        await each.protocols.stop()


async def test_a_file_is_kept_told_given_back_and_deleted(service: Any) -> None:
    here = await service()
    made = (await here.upload(b"a\r\n--b\nc", "user_data")).json
    assert (made["object"], made["bytes"], made["filename"], made["purpose"], made["status"]) == (
        "file",
        8,
        "in.jsonl",
        "user_data",
        "processed",
    )
    path = f"/v1/files/{made['id']}"
    assert (await ask(here.app, "GET", path)).json == made
    content = await ask(here.app, "GET", f"{path}/content")
    assert (content.body, content.headers["content-length"]) == (b"a\r\n--b\nc", "8")
    assert (await ask(here.app, "DELETE", path)).json == {"id": made["id"], "object": "file", "deleted": True}
    for gone in (path, f"{path}/content"):
        assert (await ask(here.app, "GET", gone)).status == 404


async def test_files_are_listed_in_pages_by_purpose(service: Any) -> None:
    here = await service()
    ids = [(await here.upload(b"x", purpose)).json["id"] for purpose in ("batch", "user_data", "batch", "batch")]
    page = (await ask(here.app, "GET", "/v1/files?purpose=batch&limit=2")).json
    assert [row["id"] for row in page["data"]] == [ids[3], ids[2]]
    assert page["has_more"]
    rest = (await ask(here.app, "GET", f"/v1/files?purpose=batch&after={ids[2]}")).json
    assert ([row["id"] for row in rest["data"]], rest["has_more"]) == ([ids[0]], False)
    assert [row["id"] for row in (await ask(here.app, "GET", "/v1/files?order=asc")).json["data"]] == ids
    assert (await ask(here.app, "GET", "/v1/files?limit=0")).json["error"]["param"] == "limit"


async def test_uploads_have_limits_and_leave_nothing_when_refused(service: Any, tmp_path: Path) -> None:
    here = await service()
    too_large = await here.upload(b"x" * 150_000)
    assert (too_large.status, too_large.json["error"]["code"]) == (413, "request_too_large")
    assert "router.max_file_bytes" in too_large.json["error"]["message"]
    for fields, param in (
        ({"purpose": "fun"}, "purpose"),
        ({"color": "red"}, "color"),
        ({"expires_after[seconds]": "9"}, "expires_after[seconds]"),
    ):
        refused = await here.upload(b"x", **fields)
        assert (refused.status, refused.json["error"]["param"]) == (400, param)
    plain = await ask(here.app, "POST", "/v1/files", {"purpose": "batch"})
    assert (plain.status, plain.json["error"]["param"]) == (400, "content-type")
    assert not list((tmp_path / "data" / "files").iterdir())
    for _ in range(5):
        assert (await here.upload(b"x")).status == 200
    full = await here.upload(b"x")
    assert (full.status, full.headers["retry-after"]) == (429, "60")
    assert "router.max_files" in full.json["error"]["message"]


@virtual_time
async def test_a_large_upload_has_time_again_for_each_part_of_it() -> None:
    """Goal: a file may take long, a client that sends nothing may not. Method: parts that together come slower than the timeout."""
    limits = HttpLimits(max_body_bytes=100, body_timeout_s=0.3, max_timeout_s=1, send_timeout_s=1)

    def exchange(num_parts: int) -> Exchange:
        parts = [b"x" * 10] * num_parts

        async def receive() -> dict[str, Any]:
            await asyncio.sleep(0.1)
            return {"type": "http.request", "body": parts.pop(), "more_body": bool(parts)}

        async def send(message: Any) -> None:
            """Nothing is answered here."""

        return Exchange({"path": "/", "method": "POST", "headers": []}, receive, send, limits)

    chunks = [chunk async for chunk in exchange(8).read_chunks(1000, setting="s", bytes_a_timeout=10)]
    assert len(chunks) == 8
    with pytest.raises(DeadlineExceededError):
        _ = [chunk async for chunk in exchange(8).read_chunks(1000, setting="s")]


async def test_all_files_together_have_a_limit(service: Any) -> None:
    here = await service()
    assert (await here.upload(b"x" * 50_000)).status == 200
    assert (await here.upload(b"x" * 50_000)).status == 200
    full = await here.upload(b"x")
    assert "router.files_max_bytes" in full.json["error"]["message"]


@pytest.mark.parametrize("step", [1, 2, 3, 7, 1000])
def test_an_upload_is_read_the_same_however_it_is_cut(step: int) -> None:
    content = b"\r\n--" + BOUNDARY.encode()[:-1] + b"\r\nrest\r\n--" + b"\x00\xff"
    sink = io.BytesIO()
    upload = Upload(boundary_of(f"multipart/form-data; boundary={BOUNDARY}"), sink)
    body = form(content, {"purpose": "batch"})
    for start in range(0, len(body), step):
        upload.feed(body[start : start + step])
    upload.finish()
    assert (sink.getvalue(), upload.fields, upload.filename, upload.num_bytes) == (
        content,
        {"purpose": "batch"},
        "in.jsonl",
        len(content),
    )


@pytest.mark.parametrize(
    ("body", "words"),
    [
        (b"no form", "not valid multipart"),
        (form(b"x", {"purpose": "batch"})[:-20], "ends within a part"),
        (f"--{BOUNDARY}\r\nContent-Disposition: form-data; name=\"a\"\r\n\r\nb\r\n--{BOUNDARY}--\r\n".encode(), "file is required"),
        (form(b"x", {}).replace(b'; filename="in.jsonl"', b""), "with a filename"),
        (form(b"x", {"file": "y"}), "with a filename"),
        (form(b"x", {"purpose": "p" * 2000}), "at most 1024 bytes"),
        (form(b"x", {"n" * 9000: "p"}), "Maximum header size"),
        (form(b"x", {str(index): "p" for index in range(20)}), "at most 16 parts"),
    ],
)  # fmt: skip
def test_a_bad_form_is_refused(body: bytes, words: str) -> None:
    upload = Upload(BOUNDARY.encode(), io.BytesIO())
    with pytest.raises(InvalidRequestError, match=words):
        upload.feed(body)
        upload.finish()


def test_a_file_name_is_only_its_last_part() -> None:
    upload = Upload(BOUNDARY.encode(), io.BytesIO())
    upload.feed(form(b"x", {}).replace(b"in.jsonl", b"../../etc/passwd"))
    assert upload.filename == "passwd"


async def test_a_batch_is_worked_off_to_its_output_and_errors(service: Any) -> None:
    here = await service()
    wrong = request_line("bad", body={"model": "m", "messages": [], "temperature": 0})
    made = (await here.batch(request_line("a") + b"\n" + wrong + request_line("b"), metadata={"k": "v"})).json
    assert (made["status"], made["object"], made["metadata"]) == ("validating", "batch", {"k": "v"})
    done = await here.until(made["id"], "completed")
    assert done["request_counts"] == {"total": 3, "completed": 2, "failed": 1}
    assert all(done[name] for name in ("in_progress_at", "finalizing_at", "completed_at"))
    output = await here.lines(done["output_file_id"])
    assert {line["custom_id"] for line in output} == {"a", "b"}
    assert output[0]["response"]["status_code"] == 200
    assert output[0]["response"]["body"]["choices"][0]["message"]["content"] == "Hello!"
    (error,) = await here.lines(done["error_file_id"])
    assert (error["custom_id"], error["response"]["status_code"]) == ("bad", 400)
    assert error["response"]["body"]["error"]["param"] == "messages"
    assert (await ask(here.app, "GET", f"/v1/files/{done['output_file_id']}")).json["purpose"] == "batch_output"


async def test_a_request_of_a_batch_is_counted_to_whoever_made_it(service: Any) -> None:
    here = await service()
    source = (await here.upload(request_line("a"))).json["id"]
    body = {"input_file_id": source, "endpoint": "/v1/chat/completions", "completion_window": "24h"}
    made = (await ask(here.app, "POST", "/v1/batches", body, authorization="Bearer k")).json
    await here.until(made["id"], "completed")
    (call,) = [call for call in here.engine.calls if call.endpoint == "/v1/chat/completions"]
    assert call.tenant.startswith("key:")


async def test_requests_of_a_batch_need_no_key_of_their_own(service: Any) -> None:
    here = await service()
    here.app._keys = ApiKeys(["secret"])
    content, kind = form(request_line("a"), {"purpose": "batch"}), f"multipart/form-data; boundary={BOUNDARY}"
    refused = await ask(here.app, "POST", "/v1/files", raw=content, content_type=kind)
    assert refused.status == 401
    source = (await ask(here.app, "POST", "/v1/files", raw=content, content_type=kind, authorization="Bearer secret")).json["id"]
    body = {"input_file_id": source, "endpoint": "/v1/chat/completions", "completion_window": "24h"}
    made = (await ask(here.app, "POST", "/v1/batches", body, authorization="Bearer secret")).json
    here.app._keys = ApiKeys(["another"])
    found: dict[str, Any] = {}
    async with asyncio.timeout(WAIT_S):
        while found.get("status") != "completed":
            await asyncio.sleep(0.01)
            found = await here.protocols._storage.run(
                lambda storage: storage.batches.get(made["id"], key_name=ApiKeys(["secret"]).check("Bearer secret"))
            )
    assert found["request_counts"]["completed"] == 1


async def test_a_batch_with_bad_lines_fails_and_names_them(service: Any) -> None:
    here = await service()
    content = request_line("a") + b"{\n" + request_line("a") + request_line("b", method="GET") + request_line("c", url="/v1/x")
    failed = await here.until((await here.batch(content)).json["id"], "failed")
    assert [(error["code"], error["line"]) for error in failed["errors"]["data"]] == [
        ("invalid_json_line", 2), ("duplicate_custom_id", 3), ("invalid_method", 4), ("mismatched_endpoint", 5)
    ]  # fmt: skip
    assert failed["output_file_id"] is None
    assert not here.engine.requests
    empty = await here.until((await here.batch(b"\n")).json["id"], "failed")
    assert empty["errors"]["data"][0]["code"] == "empty_file"


def test_lines_are_checked_for_all_they_must_be(tmp_path: Path) -> None:
    path = tmp_path / "in"
    lines = [
        request_line("a"), request_line("", custom_id=5), request_line("s", body={"stream": True}), request_line("u", extra=1),
        request_line("o", body=[]), b"[1]\n",
    ]  # fmt: skip
    path.write_bytes(b"".join(lines))
    checked = check_input(path, "/v1/chat/completions", max_requests=20)
    assert [line.custom_id for line in checked.lines] == ["a"]
    assert [(error["line"], error["param"]) for error in checked.errors] == [
        (2, "custom_id"), (3, "body.stream"), (4, "extra"), (5, "body"), (6, None)
    ]  # fmt: skip
    path.write_bytes(b"".join(request_line(str(index)) for index in range(21)))
    (error,) = check_input(path, "/v1/chat/completions", max_requests=20).errors
    assert error["code"] == "too_many_requests"


def test_lines_that_are_nested_too_deeply_are_told_of(tmp_path: Path) -> None:
    deep = '{"a":' * 900 + "{}" + "}" * 900
    line = '{"custom_id": "a", "method": "POST", "url": "/v1/chat/completions", "body": {"model": "m", "messages": %s}}\n'
    path = tmp_path / "in"
    path.write_text(line % deep + line.replace('"POST"', deep.replace("%", "%%")) % "[]" + "[" * 1000 + "]" * 1000)
    checked = check_input(path, "/v1/chat/completions", max_requests=20)
    assert [(error["line"], error["param"]) for error in checked.errors] == [(1, "body"), (2, "method"), (3, None)]


async def test_cancelling_a_batch_keeps_what_is_done(service: Any) -> None:
    here = await service(OutputPiece("a", (1,)), NEVER_S, batches=BatchSettings(concurrency=2, max_requests=20))
    first = [OutputPiece("done", (1,), "stop")]
    opened = here.engine.open_stream

    def open_first_short(request: Any, call: Any) -> Any:
        script, here.engine.script = here.engine.script, first if not here.engine.streams else here.engine.script
        stream = opened(request, call)
        here.engine.script = script
        return stream

    here.engine.open_stream = open_first_short
    made = (await here.batch(request_line("a") + request_line("b") + request_line("c"))).json
    async with asyncio.timeout(WAIT_S):
        while len(here.engine.streams) < 3:  # noqa: ASYNC110
            await asyncio.sleep(0.01)
    source = await ask(here.app, "DELETE", f"/v1/files/{made['input_file_id']}")
    assert (source.status, source.json["error"]["param"]) == (400, "file_id")
    cancelling = (await ask(here.app, "POST", f"/v1/batches/{made['id']}/cancel")).json
    assert cancelling["status"] == "cancelling"
    cancelled = await here.until(made["id"], "cancelled")
    assert cancelled["request_counts"] == {"total": 3, "completed": 1, "failed": 0}
    assert [line["custom_id"] for line in await here.lines(cancelled["output_file_id"])] == ["a"]
    assert cancelled["error_file_id"] is None
    assert all(stream.num_closes for stream in here.engine.streams)
    again = await ask(here.app, "POST", f"/v1/batches/{made['id']}/cancel")
    assert again.json["status"] == "cancelled"


async def test_a_batch_expires_and_tells_of_each_request(service: Any) -> None:
    here = await service(OutputPiece("a", (1,)), NEVER_S)
    made = (await here.batch(request_line("a") + request_line("b"))).json
    await here.until(made["id"], "in_progress")
    here.protocols._runner._task.cancel()
    late = {**made, "status": "in_progress", "expires_at": int(time.time()) - 1}
    await here.protocols._storage.run(lambda storage: storage.batches.update(late))
    here.protocols._runner.start(here.app)
    expired = await here.until(made["id"], "expired")
    errors = await here.lines(expired["error_file_id"])
    assert {(line["custom_id"], line["error"]["code"]) for line in errors} == {("a", "batch_expired"), ("b", "batch_expired")}
    assert expired["request_counts"]["failed"] == 2


def test_the_input_of_a_batch_outlives_its_expiry_until_the_batch_is_finished(tmp_path: Path) -> None:
    storage = Storage(tmp_path, FileLimits(max_files=5, max_total_bytes=1000, max_batches=3))
    for name in ("input", "other"):
        with storage.files.begin(name) as content:
            content.write(b"x")
        made = file_object(name, filename=name, purpose="batch", num_bytes=1, created_s=0, expires_s=10)
        storage.files.add(made, key_name="")
    batch = {"id": "batch", "status": "in_progress", "input_file_id": "input"}
    storage.batches.add(batch, "", key_name="")
    storage.files.sweep(11)
    assert storage.files.read("input", 0, 1) == b"x"
    with pytest.raises(NotFoundError):
        storage.files.read("other", 0, 1)
    with pytest.raises(NotFoundError):
        storage.files.get("input", 11, key_name="")
    storage.batches.update({**batch, "status": "completed"})
    storage.files.sweep(11)
    with pytest.raises(NotFoundError):
        storage.files.read("input", 0, 1)
    storage.close()


async def test_a_batch_goes_on_where_a_former_life_ended(service: Any, tmp_path: Path) -> None:
    before = Service(tmp_path, OutputPiece("a", (1,)), NEVER_S)
    await before.protocols.start(before.app)
    made = (await before.batch(request_line("a") + request_line("b") + request_line("c"))).json
    await before.until(made["id"], "in_progress")
    await before.protocols.stop()
    # What a death may leave: a line that is whole, and one that is not.
    output = tmp_path / "data" / "files" / f"file-{made['id'].removeprefix('batch_')}-output"
    output.write_bytes(b'{"custom_id": "a", "response": {"status_code": 200}}\n{"custom_id": "b", "resp')
    after = await service()
    done = await after.until(made["id"], "completed")
    assert done["request_counts"] == {"total": 3, "completed": 3, "failed": 0}
    told = [line["custom_id"] for line in await after.lines(done["output_file_id"])]
    assert (told[0], sorted(told)) == ("a", ["a", "b", "c"])
    assert len(after.engine.requests) == 2
    assert told_already(output) == {"a", "b", "c"}


async def test_an_overloaded_router_is_asked_again(service: Any) -> None:
    here = await service()
    here.engine.refusal = OverloadedError("full", retry_after_s=1)
    made = (await here.batch(request_line("a"))).json
    await here.until(made["id"], "in_progress")
    here.engine.refusal = None
    done = await here.until(made["id"], "completed")
    assert done["request_counts"]["completed"] == 1


async def test_a_failed_request_is_told_with_its_status(service: Any) -> None:
    here = await service(RequestFailedError("broke"))
    done = await here.until((await here.batch(request_line("a"))).json["id"], "completed")
    (line,) = await here.lines(done["error_file_id"])
    assert (line["response"]["status_code"], line["response"]["body"]["error"]["message"]) == (500, "broke")


async def test_batches_give_way_to_online_requests(service: Any) -> None:
    here = await service(NEVER_S, OutputPiece("a", (1,), "stop"), batches=BatchSettings(concurrency=4, max_requests=20))
    opened = here.engine.open_stream
    most = 0

    def open_streams() -> list[Any]:
        return [stream for stream in here.engine.streams if not stream.num_closes]

    def open_one(request: Any, call: Any) -> Any:
        nonlocal most
        stream = opened(request, call)
        most = max(most, len(open_streams()))
        return stream

    async def peak(others: int, expected: int) -> int:
        """The most that are open at a time while six are answered, each only once as many are open as are expected."""
        nonlocal most
        most = 0
        here.engine.num_online_requests = others
        made = (await here.batch(b"".join(request_line(str(index)) for index in range(6)))).json
        num_asked = len(here.engine.streams)
        while (await ask(here.app, "GET", f"/v1/batches/{made['id']}")).json["status"] != "completed":
            if len(open_streams()) == expected or len(here.engine.streams) == num_asked + 6:
                for stream in open_streams():
                    stream.closed.set()
            await asyncio.sleep(0.005)
        return most

    here.engine.open_stream = open_one
    async with asyncio.timeout(WAIT_S):
        assert await peak(0, 4) == 4
        assert await peak(3, 1) == 1
    assert not any(call.is_online for call in here.engine.calls if call.endpoint == "/v1/chat/completions")


async def test_only_one_router_of_a_directory_works_batches_off(service: Any, tmp_path: Path) -> None:
    first = await service()
    assert (await first.until((await first.batch(request_line("a"))).json["id"], "completed"))["status"]
    second = await service()
    # Request ids are unlike in two processes; those of two fakes are not.
    second.engine.calls = list(first.engine.calls)
    made = (await second.batch(request_line("b"))).json
    assert (await second.until(made["id"], "completed"))["request_counts"]["completed"] == 1
    assert len(first.engine.requests) == 2
    assert not second.engine.requests


@pytest.mark.parametrize(
    ("fields", "param"),
    [
        ({"endpoint": "/v1/images"}, "endpoint"),
        ({"completion_window": "1h"}, "completion_window"),
        ({"input_file_id": "file-nope"}, "file_id"),
        ({"metadata": {"k": 5}}, "metadata.k"),
        ({"windw": 1}, "windw"),
    ],
)
async def test_bad_batches_are_refused(service: Any, fields: dict[str, Any], param: str) -> None:
    here = await service()
    refused = await here.batch(request_line("a"), **fields)
    assert refused.status in (400, 404)
    assert refused.json["error"]["param"] == param


async def test_a_batch_needs_a_file_of_its_purpose_and_there_is_a_limit_to_them(service: Any) -> None:
    here = await service(NEVER_S)
    source = (await here.upload(b"x", "user_data")).json["id"]
    body = {"input_file_id": source, "endpoint": "/v1/completions", "completion_window": "24h"}
    assert (await ask(here.app, "POST", "/v1/batches", body)).json["error"]["param"] == "input_file_id"
    made = [await here.batch(request_line("a")) for _ in range(4)]
    assert [answer.status for answer in made] == [200, 200, 200, 429]
    assert "router.max_batches" in made[3].json["error"]["message"]
    listed = (await ask(here.app, "GET", "/v1/batches?limit=2")).json
    assert [row["id"] for row in listed["data"]] == [made[2].json["id"], made[1].json["id"]]
    assert listed["has_more"]

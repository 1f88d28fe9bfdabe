"""What clients leave here belongs to their key: another key's client is answered as if it were not there. All through HTTP."""

from __future__ import annotations

import asyncio
import json
import sqlite3
from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any

import pytest

from services.router.api_keys import ApiKeys
from services.router.generation import OutputPiece
from services.router.http.app import HttpApp
from services.router.http.batches.storage import DATABASE
from services.router.http.protocols import Protocols
from services.router.http.responses.entries import HistoryLimits
from tests.unit.router.fake_engine import FakeEngine
from tests.unit.router.http_client import LIMITS, Answer, ask, storage_settings

MINE, YOURS = "Bearer sk-mine-0123456789", "Bearer sk-yours-0123456789"
KEYS = ApiKeys([MINE.removeprefix("Bearer "), YOURS.removeprefix("Bearer ")])
TURN = {"role": "user", "content": "hi"}

# The tables as they were before rows had keys.
OLD_HISTORY = """
CREATE TABLE entries (
    id TEXT PRIMARY KEY, kind TEXT NOT NULL, status TEXT NOT NULL, previous_id TEXT, conversation_id TEXT,
    created_s REAL NOT NULL, expires_s REAL NOT NULL, num_bytes INTEGER NOT NULL, body BLOB NOT NULL
);
CREATE TABLE items (
    owner TEXT NOT NULL REFERENCES entries (id) ON DELETE CASCADE, position INTEGER NOT NULL, id TEXT NOT NULL, body BLOB NOT NULL,
    PRIMARY KEY (owner, position)
);
"""
OLD_BATCHES = """
CREATE TABLE files (
    seq INTEGER PRIMARY KEY AUTOINCREMENT, id TEXT UNIQUE NOT NULL, purpose TEXT NOT NULL, num_bytes INTEGER NOT NULL,
    expires_s REAL, body BLOB NOT NULL
);
CREATE TABLE batches (
    seq INTEGER PRIMARY KEY AUTOINCREMENT, id TEXT UNIQUE NOT NULL, status TEXT NOT NULL, input_file_id TEXT NOT NULL,
    tenant TEXT NOT NULL, body BLOB NOT NULL
);
"""


class Service:
    """A router's HTTP side with everything it keeps, on a disk; keys are asked for unless a test says otherwise."""

    def __init__(self, directory: Path, *script: Any, keys: ApiKeys | None = KEYS) -> None:
        self.engine = FakeEngine(*script)
        settings = storage_settings(
            directory=directory,
            history_path=str(directory / "history.sqlite"),
            history=HistoryLimits(max_entries=100, max_bytes=1_000_000, ttl_s=1e9),
        )
        self.protocols = Protocols(self.engine, settings)
        self.app = HttpApp(self.engine, LIMITS, self.protocols.routes(), keys)

    async def ask(self, key: str, method: str, path: str, body: Any = None, **named: Any) -> Answer:
        return await ask(self.app, method, path, body, authorization=key, **named)

    async def upload(self, key: str, content: bytes = b"x", purpose: str = "user_data") -> str:
        parts = [
            b'--b\r\nContent-Disposition: form-data; name="purpose"\r\n\r\n' + purpose.encode(),
            b'\r\n--b\r\nContent-Disposition: form-data; name="file"; filename="f"\r\n\r\n' + content,
            b"\r\n--b--\r\n",
        ]
        made = await self.ask(key, "POST", "/v1/files", raw=b"".join(parts), content_type="multipart/form-data; boundary=b")
        assert made.status == 200
        return str(made.json["id"])

    async def batch(self, key: str) -> dict[str, Any]:
        line = {"custom_id": "a", "method": "POST", "url": "/v1/chat/completions", "body": {"model": "m", "messages": [TURN]}}
        source = await self.upload(key, json.dumps(line).encode(), "batch")
        body = {"input_file_id": source, "endpoint": "/v1/chat/completions", "completion_window": "24h"}
        made: dict[str, Any] = (await self.ask(key, "POST", "/v1/batches", body)).json
        return made

    async def until(self, key: str, path: str, *statuses: str) -> dict[str, Any]:
        async with asyncio.timeout(30):
            while True:
                found: dict[str, Any] = (await self.ask(key, "GET", path)).json
                if found["status"] in statuses:
                    return found
                await asyncio.sleep(0.01)

    async def listed(self, key: str, path: str) -> list[str]:
        return [row["id"] for row in (await self.ask(key, "GET", path)).json["data"]]


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


async def same_as_absent(here: Service, key: str, method: str, path: str, name: str, body: Any = None) -> None:
    """The answer about `name` is that about a name nobody ever had, but for the name."""
    found = await here.ask(key, method, path.format(name), body)
    absent = await here.ask(key, method, path.format("nobodys"), body)
    assert found.status == absent.status == 404, path
    assert found.body.replace(name.encode(), b"nobodys") == absent.body


async def test_a_response_is_its_keys_alone(service: Any) -> None:
    here = await service()
    response = (await here.ask(MINE, "POST", "/v1/responses", {"model": "m", "input": "hi"})).json
    name = response["id"]
    for method, path in (
        ("GET", "/v1/responses/{}"),
        ("DELETE", "/v1/responses/{}"),
        ("POST", "/v1/responses/{}/cancel"),
        ("GET", "/v1/responses/{}/input_items"),
        ("GET", "/v1/responses/{}?stream=true"),
    ):
        await same_as_absent(here, YOURS, method, path, name)
    following = {"model": "m", "input": "and?"}
    refused = await here.ask(YOURS, "POST", "/v1/responses", {**following, "previous_response_id": name})
    absent = await here.ask(YOURS, "POST", "/v1/responses", {**following, "previous_response_id": "nobodys"})
    assert refused.status == absent.status == 400
    assert refused.body.replace(name.encode(), b"nobodys") == absent.body
    item = {"type": "item_reference", "id": response["output"][0]["id"]}
    assert (await here.ask(YOURS, "POST", "/v1/responses", {"model": "m", "input": [item, TURN]})).status == 400
    assert (await here.ask(MINE, "POST", "/v1/responses", {**following, "previous_response_id": name})).status == 200
    assert (await here.ask(MINE, "POST", "/v1/responses", {"model": "m", "input": [item, TURN]})).status == 200
    assert (await here.ask(MINE, "GET", f"/v1/responses/{name}")).json == response
    assert (await here.ask(MINE, "DELETE", f"/v1/responses/{name}")).status == 200


async def test_a_key_is_the_same_however_it_is_sent(service: Any) -> None:
    here = await service()
    name = (await here.ask(MINE, "POST", "/v1/responses", {"model": "m", "input": "hi"})).json["id"]
    path, key = f"/v1/responses/{name}", MINE.removeprefix("Bearer ")
    assert (await ask(here.app, "GET", path, x_api_key=key)).status == 200
    assert (await ask(here.app, "GET", path, authorization=f"bearer  {key} ")).status == 200


async def test_a_background_response_is_neither_watched_nor_cancelled_by_others(service: Any) -> None:
    here = await service(OutputPiece("a", (1,)), 30.0)
    body = {"model": "m", "input": "hi", "background": True}
    name = (await here.ask(MINE, "POST", "/v1/responses", body)).json["id"]
    await here.until(MINE, f"/v1/responses/{name}", "in_progress")
    for method, path in (
        ("GET", "/v1/responses/{}"),
        ("GET", "/v1/responses/{}?stream=true"),
        ("POST", "/v1/responses/{}/cancel"),
        ("DELETE", "/v1/responses/{}"),
    ):
        await same_as_absent(here, YOURS, method, path, name)
    assert not here.engine.streams[0].num_closes
    assert (await here.ask(MINE, "POST", f"/v1/responses/{name}/cancel")).json["status"] == "cancelled"
    events = await here.ask(MINE, "GET", f"/v1/responses/{name}?stream=true")
    assert events.status == 200
    await same_as_absent(here, YOURS, "GET", "/v1/responses/{}?stream=true", name)


async def test_a_conversation_is_its_keys_alone(service: Any) -> None:
    here = await service()
    name = (await here.ask(MINE, "POST", "/v1/conversations", {"items": [TURN]})).json["id"]
    (item,) = (await here.ask(MINE, "GET", f"/v1/conversations/{name}/items")).json["data"]
    for method, path, body in (
        ("GET", "/v1/conversations/{}", None),
        ("POST", "/v1/conversations/{}", {"metadata": {"a": "b"}}),
        ("DELETE", "/v1/conversations/{}", None),
        ("GET", "/v1/conversations/{}/items", None),
        ("POST", "/v1/conversations/{}/items", {"items": [TURN]}),
        ("GET", "/v1/conversations/{}/items/" + item["id"], None),
        ("DELETE", "/v1/conversations/{}/items/" + item["id"], None),
    ):
        await same_as_absent(here, YOURS, method, path, name, body)
    assert (await here.ask(YOURS, "POST", "/v1/responses", {"model": "m", "input": "x", "conversation": name})).status == 404
    reference = {"items": [{"type": "item_reference", "id": item["id"]}]}
    assert (await here.ask(YOURS, "POST", "/v1/conversations", reference)).status == 400
    assert (await here.ask(MINE, "GET", f"/v1/conversations/{name}/items")).json["data"] == [item]


async def test_files_and_batches_are_their_keys_alone(service: Any) -> None:
    here = await service()
    mine, yours = await here.upload(MINE), await here.upload(YOURS)
    for method, path in (("GET", "/v1/files/{}"), ("GET", "/v1/files/{}/content"), ("DELETE", "/v1/files/{}")):
        await same_as_absent(here, YOURS, method, path, mine)
    assert await here.listed(MINE, "/v1/files") == [mine]
    assert await here.listed(YOURS, "/v1/files") == [yours]
    assert (await here.ask(YOURS, "GET", f"/v1/files?after={mine}")).status == 400
    batch = await here.batch(MINE)
    for method, path in (("GET", "/v1/batches/{}"), ("POST", "/v1/batches/{}/cancel")):
        await same_as_absent(here, YOURS, method, path, batch["id"])
    done = await here.until(MINE, f"/v1/batches/{batch['id']}", "completed")
    assert done["request_counts"] == {"total": 1, "completed": 1, "failed": 0}
    assert await here.listed(MINE, "/v1/batches") == [batch["id"]]
    assert await here.listed(YOURS, "/v1/batches") == []
    for name in (done["output_file_id"], done["input_file_id"]):
        await same_as_absent(here, YOURS, "GET", "/v1/files/{}/content", name)
    assert (await here.ask(MINE, "GET", f"/v1/files/{done['output_file_id']}/content")).lines[0]["custom_id"] == "a"
    body = {"input_file_id": done["input_file_id"], "endpoint": "/v1/chat/completions", "completion_window": "24h"}
    assert (await here.ask(YOURS, "POST", "/v1/batches", body)).status == 404


async def test_without_keys_everybody_sees_all_and_later_every_key_does(service: Any) -> None:
    open_to_all = await service(keys=None)
    name = (await open_to_all.ask("Bearer anything", "POST", "/v1/responses", {"model": "m", "input": "hi"})).json["id"]
    file_id = await open_to_all.upload("")
    for key in ("", "Bearer other"):
        assert (await open_to_all.ask(key, "GET", f"/v1/responses/{name}")).status == 200
        assert await open_to_all.listed(key, "/v1/files") == [file_id]
    guarded = await service()
    for key in (MINE, YOURS):
        assert (await guarded.ask(key, "GET", f"/v1/responses/{name}")).status == 200
        assert await guarded.listed(key, "/v1/files") == [file_id]
    hidden = await guarded.upload(MINE)
    await same_as_absent(open_to_all, "", "GET", "/v1/files/{}", hidden)


async def test_files_of_an_earlier_version_open_and_what_is_in_them_is_everybodys(service: Any, tmp_path: Path) -> None:
    """Goal: nobody loses what was stored. Method: databases with the old tables, opened by a router that asks for keys."""
    body = {"id": "resp_old", "object": "response", "status": "completed", "background": False}
    history = sqlite3.connect(tmp_path / "history.sqlite")
    history.executescript(OLD_HISTORY)
    row = ("resp_old", "response", "completed", None, None, 0, 4e9, 10, json.dumps(body).encode())
    history.execute("INSERT INTO entries VALUES (?, ?, ?, ?, ?, ?, ?, ?, ?)", row)
    history.execute("INSERT INTO items VALUES ('resp_old', 0, 'msg_old', '{\"id\": \"msg_old\"}')")
    history.commit()
    history.close()
    batches = sqlite3.connect(tmp_path / DATABASE)
    batches.executescript(OLD_BATCHES)
    batches.execute("INSERT INTO files VALUES (1, 'file-old', 'batch', 0, NULL, '{\"id\": \"file-old\", \"bytes\": 0}')")
    batches.execute("INSERT INTO batches VALUES (1, 'batch_old', 'completed', 'file-old', 'key:x', '{\"id\": \"batch_old\"}')")
    batches.commit()
    batches.close()
    for _ in range(2):
        here = await service()
        for key in (MINE, YOURS):
            assert (await here.ask(key, "GET", "/v1/responses/resp_old")).json == body
            assert await here.listed(key, "/v1/responses/resp_old/input_items") == ["msg_old"]
            assert "file-old" in await here.listed(key, "/v1/files")
            assert (await here.ask(key, "GET", "/v1/files/file-old")).json["id"] == "file-old"
            assert (await here.ask(key, "GET", "/v1/batches/batch_old")).json == {"id": "batch_old"}
        new = await here.upload(MINE)
        await same_as_absent(here, YOURS, "GET", "/v1/files/{}", new)


async def test_nobody_learns_of_anothers_batch_by_deleting_a_file_of_everybodys(service: Any) -> None:
    everybodys = await service(30.0, keys=None)
    made = await everybodys.batch("")
    guarded = await service(30.0)
    body = {name: made[name] for name in ("input_file_id", "endpoint", "completion_window")}
    await everybodys.ask("", "POST", f"/v1/batches/{made['id']}/cancel")
    await everybodys.until("", f"/v1/batches/{made['id']}", "cancelled")
    # Ids of two processes are unlike; those of two fakes are not.
    guarded.engine.calls = list(everybodys.engine.calls)
    name = (await guarded.ask(MINE, "POST", "/v1/batches", body)).json["id"]
    for key, is_named in ((MINE, True), (YOURS, False)):
        refused = await guarded.ask(key, "DELETE", f"/v1/files/{made['input_file_id']}")
        assert refused.status == 400
        assert (name in refused.json["error"]["message"]) is is_named

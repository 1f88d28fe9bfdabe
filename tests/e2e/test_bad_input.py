"""Bad input gets one clear error, and every other request goes on."""

from __future__ import annotations

import http.client
import json
import socket
import urllib.error
import urllib.request
from typing import Any
from urllib.parse import urlsplit

import pytest

from tests.e2e.process_tree import wait_until
from tests.e2e.server import Server
from tests.patience import WAIT_S

pytestmark = pytest.mark.slow

MODEL = "smollm2-135m-instruct"


def post(server: Server, path: str, body: bytes, content_type: str = "application/json") -> tuple[int, dict[str, Any]]:
    request = urllib.request.Request(f"{server.http}{path}", data=body, headers={"Content-Type": content_type}, method="POST")
    try:
        with urllib.request.urlopen(request, timeout=WAIT_S) as answer:
            return answer.status, json.loads(answer.read())
    except urllib.error.HTTPError as error:
        return error.code, json.loads(error.read())


def still_answers(server: Server) -> None:
    status, body = post(server, "/v1/completions", json.dumps({"model": MODEL, "prompt": "Hi", "max_tokens": 2}).encode())
    assert (status, body["usage"]["completion_tokens"]) == (200, 2)


@pytest.mark.parametrize(
    ("body", "status", "words"),
    [
        (b"", 400, ["body"]),
        (b"{", 400, ["JSON"]),
        (b"[]", 400, ["object"]),
        (b'{"model": "\xff"}', 400, []),
        ({"model": MODEL}, 400, ["prompt"]),
        ({"model": MODEL, "prompt": 5}, 400, ["prompt"]),
        ({"model": "gpt-17", "prompt": "x"}, 404, ["gpt-17", MODEL]),
        ({"model": MODEL, "prompt": "x", "max_tokenz": 5}, 400, ["max_tokenz"]),
        ({"model": MODEL, "prompt": "x", "max_tokens": -1}, 400, ["max_tokens", "-1"]),
        ({"model": MODEL, "prompt": "x", "max_tokens": 10**12}, 400, ["max_tokens"]),
        ({"model": MODEL, "prompt": "x", "temperature": -0.5}, 400, ["temperature", "-0.5"]),
        ({"model": MODEL, "prompt": "x", "temperature": "hot"}, 400, ["temperature"]),
        ({"model": MODEL, "prompt": "x", "top_p": 1.5}, 400, ["top_p", "1.5"]),
        ({"model": MODEL, "prompt": "x", "n": 0}, 400, ["n must be in [1, 128]; got 0"]),
        ({"model": MODEL, "prompt": "word " * 12000, "max_tokens": 1}, 400, ["8192"]),
        ({"model": MODEL, "prompt": [1, 2, 10**7]}, 400, ["10000000"]),
    ],
)
def test_bad_body_gets_one_clear_error(server: Server, body: Any, status: int, words: list[str]) -> None:
    raw = body if isinstance(body, bytes) else json.dumps(body).encode()
    got, answer = post(server, "/v1/completions", raw)
    assert got == status, answer
    assert set(answer["error"]) == {"message", "type", "param", "code"}
    for word in words:
        assert word in answer["error"]["message"], answer
    still_answers(server)


def test_a_100_mb_body_is_refused_early(server: Server) -> None:
    address = urlsplit(server.http)
    connection = http.client.HTTPConnection(address.hostname or "", address.port, timeout=WAIT_S)
    connection.putrequest("POST", "/v1/completions")
    connection.putheader("Content-Type", "application/json")
    connection.putheader("Content-Length", str(100 * 1024 * 1024))
    connection.endheaders()
    answer = connection.getresponse()
    assert answer.status == 413
    assert "error" in json.loads(answer.read())
    connection.close()
    still_answers(server)


def test_client_that_never_reads_does_not_stop_the_others(server: Server) -> None:
    address = urlsplit(server.http)
    body = json.dumps({"model": MODEL, "prompt": "x", "max_tokens": 500, "ignore_eos": True, "stream": True}).encode()
    with socket.create_connection((address.hostname, address.port), timeout=WAIT_S) as deaf:
        deaf.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 2048)
        head = f"POST /v1/completions HTTP/1.1\r\nHost: x\r\nContent-Type: application/json\r\nContent-Length: {len(body)}\r\n\r\n"
        deaf.sendall(head.encode() + body)
        still_answers(server)


def num_aborted(server: Server) -> float:
    return server.metric("headrace_requests_total", 'status="499"')


def test_disconnect_frees_the_request(server: Server) -> None:
    # Those of the tests before count, too, when they come to their end.
    wait_until(lambda: server.metric("headrace_router_open_requests") == 0, WAIT_S, "nothing is open")
    before = num_aborted(server)
    address = urlsplit(server.http)
    body = json.dumps({"model": MODEL, "prompt": "x", "max_tokens": 4000, "ignore_eos": True, "stream": True}).encode()
    with socket.create_connection((address.hostname, address.port), timeout=WAIT_S) as client:
        head = f"POST /v1/completions HTTP/1.1\r\nHost: x\r\nContent-Type: application/json\r\nContent-Length: {len(body)}\r\n\r\n"
        client.sendall(head.encode() + body)
        client.recv(100)
        # The gauge is set several times a second.
        wait_until(lambda: server.metric("headrace_router_open_requests") >= 1, WAIT_S, "the request is counted")
    wait_until(lambda: server.metric("headrace_router_open_requests") == 0, WAIT_S, "the request is forgotten")
    assert num_aborted(server) == before + 1, "it ended because its client had left"


@pytest.mark.parametrize(("path", "status"), [("/nothing", 404), ("/v1/models", 405)])
def test_wrong_path_or_method_is_told_in_the_same_shape(server: Server, path: str, status: int) -> None:
    got, answer = post(server, path, b"{}")
    assert got == status
    assert answer["error"]["message"]

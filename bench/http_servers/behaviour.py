"""How a candidate treats clients that leave, send too much or never read, and how it stops.

Plain blocking sockets: each probe is one client that misbehaves in one way, then asks `/stats` what the application saw.
"""

from __future__ import annotations

import contextlib
import select
import signal
import socket
import statistics
import subprocess
import time
from typing import Any

from bench.http_servers.load import fetch_stats
from bench.http_servers.workload import SLOW_CHUNKS

UPLOAD_BYTES = 100_000_000
# A write that has made no progress for this long is held to be waiting for the client.
_WRITE_WAITS_NS = 500_000_000
_PIECE = b"b" * 65536


def _connect(port: int, *, receive_buffer_bytes: int | None = None) -> socket.socket:
    client = socket.socket()
    if receive_buffer_bytes is not None:
        client.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, receive_buffer_bytes)
    client.settimeout(5)
    client.connect(("127.0.0.1", port))
    return client


def probe_disconnect(port: int, *, busy: bool, repeats: int = 5) -> dict[str, float | None]:
    """Close a held stream from the client's side; how long until the application knows, in ms (`None`: not within 5 s)."""
    latencies_ms = []
    for _ in range(repeats):
        num_seen = len(fetch_stats(port)["disconnects_ns"])
        client = _connect(port)
        client.sendall(b"GET /hold%b HTTP/1.1\r\nhost: b\r\n\r\n" % (b"?busy" if busy else b""))
        received = b""
        while b"}}]}\n\n" not in received:
            received += client.recv(65536)
        time.sleep(0.1)
        closed_ns = time.monotonic_ns()
        client.close()
        deadline = time.monotonic() + 5
        while len(seen := fetch_stats(port)["disconnects_ns"]) == num_seen and time.monotonic() < deadline:
            time.sleep(0.02)
        if len(seen) == num_seen:
            return {"median_ms": None, "max_ms": None}
        latencies_ms.append((seen[-1] - closed_ns) / 1e6)
    return {"median_ms": statistics.median(latencies_ms), "max_ms": max(latencies_ms)}


def probe_upload(port: int, *, declared: bool) -> dict[str, Any]:
    """Send 100 MB to a handler with a limit of 1 MiB: which answer comes, after how many bytes, and what the server swallows."""
    before = fetch_stats(port)
    client = _connect(port)
    framing = b"content-length: %d" % UPLOAD_BYTES if declared else b"transfer-encoding: chunked"
    client.sendall(b"POST /limited HTTP/1.1\r\nhost: b\r\n" + framing + b"\r\n\r\n")
    piece = _PIECE if declared else b"%x\r\n%b\r\n" % (len(_PIECE), _PIECE)
    num_sent, answered_after, answer = 0, None, b""
    ended_by = "whole body taken"
    try:
        while num_sent < UPLOAD_BYTES:
            if answered_after is None and select.select([client], [], [], 0)[0]:
                answered_after = num_sent
                answer = client.recv(4096)
            client.sendall(piece)
            num_sent += len(_PIECE)
    except TimeoutError:
        ended_by = "server stopped reading"
    except OSError as error:
        ended_by = type(error).__name__
    if not answer:
        with contextlib.suppress(OSError):
            answer = client.recv(4096)
    client.close()
    after = fetch_stats(port)
    return {
        "status": answer[9:12].decode() or None,
        "answered_after_bytes": answered_after,
        "sent_bytes": num_sent,
        "ended_by": ended_by,
        "rss_growth_mb": round((after["rss_bytes"] - before["rss_bytes"]) / 1e6, 1),
    }


def probe_never_reads(port: int) -> dict[str, Any]:
    """Ask for a 64 MiB flood and read nothing: how much the application could hand over before its write waited."""
    before = fetch_stats(port)
    client = _connect(port, receive_buffer_bytes=4096)
    client.sendall(b"GET /flood HTTP/1.1\r\nhost: b\r\n\r\n")
    time.sleep(2)
    during = fetch_stats(port)
    client.close()
    time.sleep(0.5)
    after = fetch_stats(port)
    return {
        "taken_kb": during["flood_bytes"] // 1000,
        "write_waits": during["now_ns"] - during["flood_progress_ns"] > _WRITE_WAITS_NS and not during["flood_ended_by"],
        "rss_growth_mb": round((during["rss_bytes"] - before["rss_bytes"]) / 1e6, 1),
        "ended_by": after["flood_ended_by"] or "still waiting 0.5 s after the client closed",
    }


def probe_drain(port: int, process: subprocess.Popen[bytes]) -> dict[str, Any]:
    """Ask the server to stop in the middle of a 1.5 s stream: does it end well, are newcomers refused, is the exit clean?"""
    client = _connect(port)
    client.sendall(b"GET /slow HTTP/1.1\r\nhost: b\r\n\r\n")
    received = client.recv(65536)
    time.sleep(0.3)
    process.send_signal(signal.SIGTERM)
    time.sleep(0.4)
    try:
        with _connect(port):
            newcomer = "accepted"
    except OSError:
        newcomer = "refused"
    try:
        while piece := client.recv(65536):
            received += piece
            if received.endswith(b"0\r\n\r\n"):
                break
    except OSError as error:
        received += f"|{type(error).__name__}".encode()
    ended = time.monotonic()
    try:
        exit_status: int | None = process.wait(timeout=15)
    except subprocess.TimeoutExpired:
        process.kill()
        exit_status = None
    return {
        "stream_completed": received.endswith(b"0\r\n\r\n") and received.count(b"}}]}\n\n") == SLOW_CHUNKS,
        "newcomer": newcomer,
        "exit_status": exit_status,
        "exit_after_stream_s": round(time.monotonic() - ended, 2),
    }

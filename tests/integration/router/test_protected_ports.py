"""Keys and TLS on the public ports."""

from __future__ import annotations

from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path

import aiohttp
import grpc
import pytest
import trustme
from google.rpc import error_details_pb2, status_pb2
from grpc_health.v1 import health_pb2, health_pb2_grpc

from headrace.errors import OverloadedError
from headrace.v1 import inference_pb2, inference_pb2_grpc
from services.router.api_keys import ApiKeys
from services.router.config import Settings
from services.router.grpc.server import GrpcServer, Security, register_inference
from services.router.http.app import HttpApp
from services.router.http.exchange import HttpLimits
from services.router.http.server import HttpServer
from services.router.security import load_security
from tests.patience import WAIT_S
from tests.unit.router.fake_engine import FakeEngine

KEY = "sk-0123456789abcdef"
LIMITS = HttpLimits(max_body_bytes=10_000, body_timeout_s=WAIT_S, max_timeout_s=WAIT_S, send_timeout_s=WAIT_S)


@asynccontextmanager
async def grpc_server(engine: FakeEngine, security: Security) -> AsyncIterator[GrpcServer]:
    server = GrpcServer(
        engine, register_inference, host="127.0.0.1", port=0, setting="x", max_message_bytes=10_000, security=security
    )
    await server.start()
    try:
        yield server
    finally:
        await server.stop()


@asynccontextmanager
async def grpc_channel(engine: FakeEngine, security: Security) -> AsyncIterator[grpc.aio.Channel]:
    async with (
        grpc_server(engine, security) as server,
        grpc.aio.insecure_channel(f"127.0.0.1:{server.port}") as channel,
    ):
        yield channel


def details_of(error: grpc.aio.AioRpcError) -> dict[str, object]:
    metadata = dict(error.trailing_metadata() or ())
    status = status_pb2.Status.FromString(metadata["grpc-status-details-bin"])
    assert (status.code, status.message) == (error.code().value[0], error.details())
    found: dict[str, object] = {}
    for detail in status.details:
        for kind in (error_details_pb2.ErrorInfo, error_details_pb2.BadRequest, error_details_pb2.RetryInfo):
            if detail.Is(kind.DESCRIPTOR):
                message = kind()
                detail.Unpack(message)
                found[kind.__name__] = message
    return found


async def test_grpc_asks_for_a_key_but_not_for_health() -> None:
    engine = FakeEngine()
    async with grpc_channel(engine, Security(ApiKeys([KEY]))) as channel:
        stub = inference_pb2_grpc.InferenceStub(channel)
        request = inference_pb2.GenerateRequest(text="x")
        for metadata in ((), (("authorization", "Bearer wrong-wrong-wrong"),)):
            with pytest.raises(grpc.aio.AioRpcError) as caught:
                _ = [piece async for piece in stub.Generate(request, metadata=metadata)]
            assert caught.value.code() == grpc.StatusCode.UNAUTHENTICATED
            info = details_of(caught.value)["ErrorInfo"]
            assert isinstance(info, error_details_pb2.ErrorInfo)
            assert (info.reason, info.domain) == ("UNAUTHENTICATED", "headrace")
        assert not engine.requests
        metadata = (("authorization", f"Bearer {KEY}"),)
        assert [piece.text async for piece in stub.Generate(request, metadata=metadata)] == ["Hel", "lo", "!"]
        assert await health_pb2_grpc.HealthStub(channel).Check(health_pb2.HealthCheckRequest())


async def test_grpc_errors_tell_the_field_and_when_to_come_back() -> None:
    engine = FakeEngine()
    async with grpc_server(engine, Security()) as server, grpc.aio.insecure_channel(f"127.0.0.1:{server.port}") as channel:
        stub = inference_pb2_grpc.InferenceStub(channel)
        wrong = inference_pb2.GenerateRequest(text="x")
        wrong.sampling.top_p = 7
        with pytest.raises(grpc.aio.AioRpcError) as caught:
            _ = [piece async for piece in stub.Generate(wrong)]
        refused = details_of(caught.value)["BadRequest"]
        assert isinstance(refused, error_details_pb2.BadRequest)
        assert [violation.field for violation in refused.field_violations] == ["top_p"]
        engine.refusal = OverloadedError("full", retry_after_s=1.5)
        with pytest.raises(grpc.aio.AioRpcError) as caught:
            _ = [piece async for piece in stub.Generate(inference_pb2.GenerateRequest(text="x"))]
        retry = details_of(caught.value)["RetryInfo"]
        assert isinstance(retry, error_details_pb2.RetryInfo)
        assert retry.retry_delay.ToMilliseconds() == 1500


def write_certificate(folder: Path, name: str) -> tuple[Path, Path, Path]:
    """Certificate, private key and authority."""
    authority = trustme.CA()
    issued = authority.issue_cert("localhost")
    paths = folder / f"{name}.pem", folder / f"{name}.key", folder / f"{name}.ca"
    issued.cert_chain_pems[0].write_to_path(paths[0])
    issued.private_key_pem.write_to_path(paths[1])
    authority.cert_pem.write_to_path(paths[2])
    return paths


async def test_grpc_over_tls_with_client_certificates(tmp_path: Path) -> None:
    cert, key, authority = write_certificate(tmp_path, "server")
    client_cert, client_key, client_authority = write_certificate(tmp_path, "client")
    settings = Settings(grpc_tls_cert=str(cert), grpc_tls_key=str(key), grpc_tls_client_ca=str(client_authority))
    async with grpc_server(FakeEngine(), load_security(settings)) as server:
        known = grpc.ssl_channel_credentials(authority.read_bytes(), client_key.read_bytes(), client_cert.read_bytes())
        async with grpc.aio.secure_channel(f"localhost:{server.port}", known) as channel:
            stub = inference_pb2_grpc.InferenceStub(channel)
            pieces = [piece.text async for piece in stub.Generate(inference_pb2.GenerateRequest(text="x"), timeout=WAIT_S)]
            assert pieces == ["Hel", "lo", "!"]
        for credentials in (grpc.ssl_channel_credentials(authority.read_bytes()), None):
            target = f"localhost:{server.port}"
            opened = grpc.aio.insecure_channel(target) if credentials is None else grpc.aio.secure_channel(target, credentials)
            async with opened as channel:
                with pytest.raises(grpc.aio.AioRpcError) as caught:
                    stub = inference_pb2_grpc.InferenceStub(channel)
                    _ = [piece async for piece in stub.Generate(inference_pb2.GenerateRequest(text="x"), timeout=WAIT_S)]
                assert caught.value.code() == grpc.StatusCode.UNAVAILABLE


async def test_http_asks_for_a_key_but_not_for_health() -> None:
    engine = FakeEngine()
    server = HttpServer(
        HttpApp(engine, LIMITS, keys=ApiKeys([KEY])), host="127.0.0.1", port=0, keep_alive_s=5, head_timeout_s=WAIT_S
    )
    await server.start()
    try:
        async with aiohttp.ClientSession(f"http://127.0.0.1:{server.port}") as session:
            for path in ("/health", "/ready", "/metrics"):
                async with session.get(path) as answer:
                    assert answer.status == 200
            body = {"model": "m", "prompt": "x"}
            for headers in ({}, {"authorization": "Bearer wrong-wrong-wrong"}, {"x-api-key": "wrong"}):
                async with session.post("/v1/completions", json=body, headers=headers) as answer:
                    assert answer.status == 401
                    assert answer.headers["www-authenticate"] == "Bearer"
                    error = (await answer.json())["error"]
                    assert (error["code"], error["type"]) == ("unauthenticated", "authentication_error")
                async with session.get("/v1/models", headers=headers) as answer:
                    assert answer.status == 401
            assert not engine.requests
            for headers in ({"authorization": f"Bearer {KEY}"}, {"x-api-key": KEY}):
                async with session.post("/v1/completions", json=body, headers=headers) as answer:
                    assert answer.status == 200
    finally:
        await server.stop()

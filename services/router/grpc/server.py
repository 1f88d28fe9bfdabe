"""A gRPC port: services over the engine, health, reflection. Part of the shell."""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable
from dataclasses import dataclass, field
from typing import Any

import grpc
from grpc_health.v1 import health, health_pb2, health_pb2_grpc
from grpc_reflection.v1alpha import reflection

from headrace.errors import ConfigError, HeadraceError, UnauthenticatedError
from headrace.v1 import inference_pb2, inference_pb2_grpc
from services.router.api_keys import ApiKeys
from services.router.generation import Engine
from services.router.grpc import conversions
from services.router.grpc.servicer import SERVICE_NAME, InferenceServicer
from services.router.http.server import listen

GRACE_S = 2.0
_OPEN_SERVICES = ("/grpc.health.v1.", "/grpc.reflection.")

Register = Callable[[Engine, grpc.aio.Server], str]
"""Adds a service to a server; gives its full name."""


def register_inference(engine: Engine, server: grpc.aio.Server) -> str:
    """Our own service."""
    inference_pb2_grpc.add_InferenceServicer_to_server(InferenceServicer(engine), server)  # type: ignore[no-untyped-call]
    assert inference_pb2.DESCRIPTOR.services_by_name["Inference"].full_name == SERVICE_NAME
    return SERVICE_NAME


def register_sglang(engine: Engine, server: grpc.aio.Server) -> str:
    """The service by which gateways drive an SGLang engine."""
    from smg_grpc_proto.generated import sglang_scheduler_pb2_grpc

    from services.router.grpc.engines import sglang

    sglang_scheduler_pb2_grpc.add_SglangSchedulerServicer_to_server(sglang.SglangServicer(engine), server)
    return sglang.SERVICE_NAME


def register_vllm(engine: Engine, server: grpc.aio.Server) -> str:
    """The service by which gateways drive a vLLM engine."""
    from smg_grpc_proto.generated import vllm_engine_pb2_grpc

    from services.router.grpc.engines import vllm

    vllm_engine_pb2_grpc.add_VllmEngineServicer_to_server(vllm.VllmServicer(engine), server)
    return vllm.SERVICE_NAME


@dataclass(frozen=True, slots=True)
class Security:
    """What protects a port.

    Attributes:
        keys: The clients' keys. Health and reflection are answered without one.
        credentials: Certificate and private key of the server; None serves in the clear.
    """

    keys: ApiKeys = field(default_factory=ApiKeys)
    credentials: grpc.ServerCredentials | None = None


class _KeyCheck(grpc.aio.ServerInterceptor):  # type: ignore[type-arg] # generic in its stubs alone
    """Ends calls without a key that is taken before they reach their service."""

    def __init__(self, keys: ApiKeys) -> None:
        self._keys = keys

    async def intercept_service(
        self,
        continuation: Callable[[grpc.HandlerCallDetails], Awaitable[grpc.RpcMethodHandler[Any, Any]]],
        details: grpc.HandlerCallDetails,
    ) -> grpc.RpcMethodHandler[Any, Any]:
        """The method's own handler, or one that refuses."""
        if details.method.startswith(_OPEN_SERVICES):
            return await continuation(details)
        metadata = dict(details.invocation_metadata or ())
        try:
            self._keys.check(str(metadata.get("authorization", "")))
        except UnauthenticatedError as error:
            return _refusing(error)
        return await continuation(details)


def _refusing(error: HeadraceError) -> grpc.RpcMethodHandler[Any, Any]:
    async def refuse(request: Any, context: grpc.aio.ServicerContext[Any, Any]) -> None:
        await context.abort(conversions.status_of(error), error.message, conversions.metadata_of(error))

    return grpc.unary_unary_rpc_method_handler(refuse)


def credentials_of(cert: bytes, key: bytes, client_ca: bytes | None) -> grpc.ServerCredentials:
    """TLS, with client certificates required where their authorities are given. All are PEM."""
    return grpc.ssl_server_credentials([(key, cert)], client_ca, client_ca is not None)


class GrpcServer:
    """A grpc.aio server on one port.

    Args:
        engine: Does the work.
        register: The service on it. Gateways tell engines apart by which service answers, so there is one a port.
        setting: The setting that names the port, for errors.
        security: Keys and certificate; None lets everybody ask in the clear.
    """

    def __init__(
        self,
        engine: Engine,
        register: Register,
        *,
        host: str,
        port: int,
        setting: str,
        max_message_bytes: int,
        security: Security | None = None,
    ) -> None:
        self.port = port
        self._host = host
        self._setting = setting
        self._credentials = None if security is None else security.credentials
        self._health = health.aio.HealthServicer()  # type: ignore[attr-defined]
        self._is_serving: bool | None = None
        self._server = grpc.aio.server(
            interceptors=() if security is None else (_KeyCheck(security.keys),),
            options=[
                # With SO_REUSEPORT a second router would share the port silently instead of being told that it is busy.
                ("grpc.so_reuseport", 0),
                ("grpc.max_receive_message_length", max_message_bytes),
                ("grpc.max_metadata_size", 64 * 1024),
                # Clients behind idle connections may ping; a dead one is noticed.
                ("grpc.keepalive_time_ms", 60_000),
                ("grpc.keepalive_timeout_ms", 20_000),
                ("grpc.http2.min_ping_interval_without_data_ms", 10_000),
            ],
        )
        self._service = register(engine, self._server)
        health_pb2_grpc.add_HealthServicer_to_server(self._health, self._server)
        reflection.enable_server_reflection((self._service, health.SERVICE_NAME, reflection.SERVICE_NAME), self._server)

    async def start(self) -> None:
        """Bind and serve.

        Raises:
            ConfigError: The port cannot be bound; it names the setting.
        """
        host = f"[{self._host}]" if ":" in self._host else self._host
        # gRPC's own refusal is a page of its log; a plain socket says the same in a word.
        listen(self._host, self.port, setting=self._setting).close()
        try:
            if self._credentials is None:
                self.port = self._server.add_insecure_port(f"{host}:{self.port}")
            else:
                self.port = self._server.add_secure_port(f"{host}:{self.port}", self._credentials)
        except RuntimeError as error:
            raise ConfigError(f"port {self.port} on {self._host} cannot be bound ({error}): see {self._setting}") from error
        await self.set_serving(False)
        await self._server.start()

    async def set_serving(self, is_serving: bool) -> None:
        """What the health service answers."""
        if is_serving is self._is_serving:
            return
        self._is_serving = is_serving
        status = health_pb2.HealthCheckResponse.SERVING if is_serving else health_pb2.HealthCheckResponse.NOT_SERVING
        for name in ("", self._service):
            await self._health.set(name, status)

    async def stop(self) -> None:
        """Close the port; calls under way get a moment to end, then are cancelled."""
        await asyncio.wait_for(self._server.stop(GRACE_S), GRACE_S * 3)

"""The router's process: one back-plane behind it, HTTP and gRPC in front.

It binds the back-plane on which tokenizers, schedulers and detokenizers register, serves clients, and runs the timers of open
requests. Everything that decides stands in the core files beside it.
"""

from __future__ import annotations

import asyncio
import time
from contextlib import suppress
from typing import TYPE_CHECKING, Any

from headrace.errors import ConfigError, UnavailableError
from headrace.home import expand_home
from headrace.open_files import open_files_limit
from headrace.telemetry import logs
from headrace.telemetry.metrics import RouterMetrics
from headrace.v1.common_pb2 import ModelInfo
from headrace.v1.control_pb2 import Load, Progress
from headrace.wire import topology
from services.router import messages
from services.router.backplane import Backplane
from services.router.config import Settings
from services.router.courier import Clock
from services.router.directory import Directory
from services.router.gateway import Gateway
from services.router.grpc.server import GrpcServer, Register, register_inference, register_sglang, register_vllm
from services.router.http.app import HttpApp
from services.router.http.batches.runner import BatchSettings
from services.router.http.batches.storage import FileLimits
from services.router.http.exchange import HttpLimits
from services.router.http.protocols import HISTORY_FILE, Protocols, StorageSettings
from services.router.http.responses.entries import HistoryLimits
from services.router.http.server import HttpServer
from services.router.policies.choice import POLICIES
from services.router.security import load_security

if TYPE_CHECKING:
    from headrace.service import ServiceContext

log = logs.get_logger()

TICK_S = 0.05
IDLE_TICK_S = 0.25
RESERVED_FILES = 256
"""Open files that no client's connection is: links, listeners, storage, and connections that are refused."""


class RouterService:
    """Owns open client requests; dies with their connections."""

    def __init__(self, context: ServiceContext, settings: Settings) -> None:
        self._context = context
        self._settings = settings
        metrics = RouterMetrics(context.registry)
        directory = Directory(
            POLICIES[settings.policy],
            stuck_after_ns=int(settings.stuck_after_s * 1e9),
            is_cache_aware=settings.cache_aware,
            models_complete_ns=time.monotonic_ns() + int(settings.unknown_model_wait_s * 1e9),
        )
        self._metrics = metrics
        self._backplane = Backplane(directory, metrics, Clock(time.monotonic_ns, time.time_ns))
        self.gateway = Gateway(self._backplane, settings, tracer=context.tracer, metrics=metrics, registry=context.registry)
        limits = HttpLimits(
            max_body_bytes=settings.max_body_bytes,
            body_timeout_s=settings.body_timeout_s,
            max_timeout_s=settings.max_timeout_s,
            send_timeout_s=settings.slow_client_timeout_s,
        )
        self._protocols = Protocols(self.gateway, _storage(settings))
        self._security = load_security(settings)
        app = HttpApp(self.gateway, limits, self._protocols.routes(), self._security.keys)
        self._app = app
        self.http = HttpServer(
            app,
            host=settings.http_host,
            port=settings.http_port,
            keep_alive_s=settings.keep_alive_s,
            head_timeout_s=settings.body_timeout_s,
        )
        self.grpc = self._make_grpc(register_inference, settings.grpc_port, "router.grpc_port")
        gateway_ports = (
            self._make_grpc(register_sglang, settings.sglang_grpc_port, "router.sglang_grpc_port"),
            self._make_grpc(register_vllm, settings.vllm_grpc_port, "router.vllm_grpc_port"),
        )
        self._grpc_servers = [server for server in (self.grpc, *gateway_ports) if server is not None]
        self._timers: asyncio.Task[None] | None = None
        self._num_ticks = 0

    def _make_grpc(self, register: Register, port: int | None, setting: str) -> GrpcServer | None:
        if port is None:
            return None
        return GrpcServer(
            self.gateway,
            register,
            host=self._settings.grpc_host,
            port=port,
            setting=setting,
            max_message_bytes=self._settings.max_body_bytes,
            security=self._security,
        )

    async def start(self) -> None:
        """Bind both public ports and the back-plane."""
        self._check_settings()
        self._check_open_files()
        await self._protocols.start(self._app)
        # The public ports first: a second router started by mistake fails here, before it takes the first one's ipc socket.
        await self.http.start()
        for server in self._grpc_servers:
            await server.start()
        address = self._context.bind_address(topology.ROUTER_BACKPLANE)
        front = self._context.wire.bind(topology.ROUTER_BACKPLANE, address, self._backplane)
        self._timers = asyncio.create_task(self._run_timers(), name="router-timers")
        log.info(
            "router.listening",
            backplane=front.address,
            http_port=self.http.port,
            grpc_ports=[server.port for server in self._grpc_servers],
        )

    def _check_settings(self) -> None:
        if self._settings.default_timeout_s > self._settings.max_timeout_s:
            raise ConfigError(
                f"router.default_timeout_s must be at most router.max_timeout_s, {self._settings.max_timeout_s:g}; "
                f"got {self._settings.default_timeout_s:g}"
            )

    def _check_open_files(self) -> None:
        """Clients over HTTP/1.1 have a connection for each request: over the process's limit they would not even be refused."""
        limit, wanted = open_files_limit(), self._settings.max_open_requests + RESERVED_FILES
        if limit < wanted:
            log.warning(
                "open_files.limited",
                limit=limit,
                wanted=wanted,
                reason="router.max_open_requests cannot be reached: raise `ulimit -n`, or lower the setting",
            )

    async def _run_timers(self) -> None:
        is_idle = False
        try:
            while True:
                await self._pause(is_idle)
                self._num_ticks += 1
                is_idle = not self._backplane.tick()
                self._metrics.open_requests.set(self.gateway.turnstile.num_open)
                self.gateway.cut_off_slow_clients()
                is_ready = self.gateway.not_ready_reason() is None
                for server in self._grpc_servers:
                    await server.set_serving(is_ready)
        except Exception as error:
            # Without timers no deadline would be kept: better to be restarted.
            log.exception("timers.failed")
            self._context.fail(error)

    async def _pause(self, is_idle: bool) -> None:
        """Until the next look; while nothing is open it comes later, and soon when a request comes."""
        if is_idle and not self.gateway.turnstile.num_open:
            with suppress(TimeoutError):
                async with asyncio.timeout(IDLE_TICK_S - TICK_S):
                    await self.gateway.turnstile.wait_busy()
        await asyncio.sleep(TICK_S)

    def not_ready_reason(self) -> str | None:
        """Why a request could not be served now."""
        return self.gateway.not_ready_reason()

    def progress(self) -> Progress:
        """Timers turn whatever the load; when they do not, the event loop is stuck."""
        return Progress(num_steps=self._num_ticks, last_step_unix_ns=time.time_ns())

    def load(self) -> Load:
        """Open requests."""
        return Load(num_running=self.gateway.turnstile.num_open)

    def models(self) -> tuple[ModelInfo, ...]:
        """Models that can be asked for now."""
        return tuple(messages.model_info(offer) for offer in self.gateway.list_models())

    def health(self) -> dict[str, Any]:
        """What is known of every stage, and where clients reach this router."""
        addresses = [f"http://{self._settings.http_host}:{self.http.port}"]
        if self.grpc is not None:
            addresses.append(f"grpc://{self._settings.grpc_host}:{self.grpc.port}")
        return {"addresses": addresses, **self.gateway.health()}

    async def drain(self) -> None:
        """Refuse new requests, finish open ones; the runner bounds the time."""
        self.gateway.is_draining = True
        for server in self._grpc_servers:
            await server.set_serving(False)
        await self.gateway.turnstile.wait_idle()

    async def stop(self) -> None:
        """Close the ports; what is still open is cut off."""
        self.gateway.is_draining = True
        self._backplane.end_all(
            UnavailableError("router: it is stopping; send the request again, to another router", retry_after_s=5.0)
        )
        for server in self._grpc_servers:
            await server.stop()
        await self.http.stop()
        await self._protocols.stop()
        if self._timers is not None:
            self._timers.cancel()


def _storage(settings: Settings) -> StorageSettings:
    directory = expand_home(settings.data_directory, "router.data_directory")
    return StorageSettings(
        history_path=str(directory / HISTORY_FILE) if settings.history == "sqlite" else ":memory:",
        history=HistoryLimits(
            max_entries=settings.history_max_entries, max_bytes=settings.history_max_bytes, ttl_s=settings.history_ttl_s
        ),
        directory=directory,
        files=FileLimits(max_files=settings.max_files, max_total_bytes=settings.files_max_bytes, max_batches=settings.max_batches),
        max_file_bytes=settings.max_file_bytes,
        batches=BatchSettings(concurrency=settings.batch_concurrency, max_requests=settings.batch_max_requests),
    )

"""Runs one service: the same life for all five.

    attach to the supervisor -> settings -> telemetry -> links -> start -> (started <-> ready) -> drain -> stop

A service is a small shell round its core; everything that all shells do alike stands here. Exit status: 0 after a stop that was
asked for, 2 when a setting or model stops the start (one line on stderr says what to do), 1 for any other failure.
"""

from __future__ import annotations

import asyncio
import importlib
import os
import signal
import socket
import sys
import time
from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass, field
from importlib.metadata import version
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol

import structlog
import uvloop
from prometheus_client import CollectorRegistry

from headrace.config.load import FILE_ENV, Settings, load_settings
from headrace.errors import ConfigError, HeadraceError, ModelError
from headrace.heap import trim_heap
from headrace.home import expand_home
from headrace.lifecycle import State
from headrace.open_files import raise_open_files_limit
from headrace.startup import StartPhases, spawned_ns
from headrace.supervision.child import Notifier, attach
from headrace.telemetry import logs, traces
from headrace.telemetry.exposition import Exposition
from headrace.telemetry.metrics import ServiceMetrics
from headrace.v1.common_pb2 import ModelInfo
from headrace.v1.control_pb2 import Load, Progress
from headrace.wire.keys import load_keys
from headrace.wire.link import Wire
from headrace.wire.resolve import is_wildcard, split_tcp
from headrace.wire.session import Leases
from headrace.wire.topology import Backplane

if TYPE_CHECKING:
    from headrace.wire.fake import FakeWire

log = structlog.get_logger()

STATE_POLL_S = 0.1
"""Between two looks at what keeps a service from being ready."""
READY_POLL_S = 0.5
"""Between two looks whether a ready one still is; /ready and the service itself look for themselves, at each request."""
PROGRESS_INTERVAL_S = 1.0


class Service(Protocol):
    """What a service is to its runner."""

    async def start(self) -> None:
        """Load, bind, dial. Returns when initialised; a ConfigError or ModelError ends the process with status 2."""

    def not_ready_reason(self) -> str | None:
        """Why no request could be served now; None when one could."""

    def load(self) -> Load:
        """How busy it is; cheap, asked before each heartbeat and for each page of metrics, whose gauges it sets."""

    def progress(self) -> Progress:
        """Whether work moves; cheap."""

    def models(self) -> tuple[ModelInfo, ...]:
        """Models it can serve now, for its heartbeats."""

    def health(self) -> dict[str, Any]:
        """Details for /health. `addresses`, if any, are what clients may use; the supervisor prints them when ready."""

    async def drain(self) -> None:
        """Refuse new work and return when the open work is done. The runner bounds it."""

    async def stop(self) -> None:
        """Give up what is open and free everything. The runner closes the links afterwards."""


@dataclass
class ServiceContext:
    """What a service gets from its runner."""

    name: str
    instance: str
    settings: Settings
    wire: Wire | FakeWire
    tracer: traces.Tracer
    registry: CollectorRegistry
    run_directory: Path
    fail: Callable[[BaseException], None] = field(default=lambda error: None)
    """Ends the process, with status 1, because of an error it cannot go on after."""
    notifier: Notifier | None = None
    phases: StartPhases = field(default_factory=lambda: StartPhases(time.monotonic_ns()))
    """What the start spends its time on; logged when the service is ready first."""

    def end_phase(self, name: str) -> None:
        """End a phase of the start now; see `StartPhases.end`."""
        self.phases.end(name, time.monotonic_ns())

    @property
    def model_directory(self) -> Path:
        """The directory of the served model.

        Raises:
            ModelError: It has not been pulled.
        """
        from headrace.models.store import resolve

        return resolve(self.settings.model.name, expand_home(self.settings.model.store, "model.store"))

    def bind_address(self, backplane: Backplane) -> str:
        """Where this process binds a back-plane: the setting, else an ipc socket in the run directory, which is made if missing.

        Raises:
            ConfigError: The run directory cannot be made.
        """
        setting = f"{backplane.front}_bind"
        address: str = getattr(self.settings.wire, setting)
        if address:
            return address
        try:
            self.run_directory.mkdir(mode=0o700, parents=True, exist_ok=True)
        except OSError as error:
            raise ConfigError(
                f"run directory {self.run_directory} cannot be made ({error.strerror}): set run_directory, or wire.{setting}",
                param="run_directory",
            ) from error
        # Detokenizers are reached by the address they advertise; the others by a name everyone can guess.
        stem = self.instance if backplane.default_port == 0 else backplane.front
        return f"ipc://{self.run_directory}/{stem}.sock"

    def dial_targets(self, backplane: Backplane) -> list[str]:
        """Where this process dials a back-plane."""
        targets: list[str] = getattr(self.settings.wire, f"{backplane.front}_targets")
        return targets or [f"ipc://{self.run_directory}/{backplane.front}.sock"]

    def advertised_address(self, bound: str) -> str:
        """What to tell others of a bound address: a wildcard host becomes the advertised one.

        Raises:
            ConfigError: None is set, and this machine's own name has no address.
        """
        if not is_wildcard(bound):
            return bound
        try:
            host = self.settings.wire.advertise_host or socket.gethostbyname(socket.gethostname())
        except OSError as error:
            raise ConfigError(
                f"this machine's name {socket.gethostname()!r} has no address ({error.strerror}): set wire.advertise_host",
                param="wire.advertise_host",
            ) from error
        return f"tcp://{host}:{split_tcp(bound)[1]}"

    @classmethod
    def for_test(cls, name: str, wire: Wire | FakeWire, *, run_directory: Path, **changes: Any) -> ServiceContext:
        """A context with default settings; `changes` are settings by dotted key with `__` for the dot."""
        settings = load_settings(flags={key.replace("__", "."): value for key, value in changes.items()})
        return cls(
            name=name,
            instance=wire.identity.instance,
            settings=settings,
            wire=wire,
            tracer=traces.Tracer(),
            registry=CollectorRegistry(),
            run_directory=run_directory,
        )


def default_run_directory(settings: Settings) -> Path:
    """Where ipc sockets go when nothing is set: a directory of the user's own."""
    if settings.run_directory:
        return expand_home(settings.run_directory, "run_directory").absolute()
    base = os.environ.get("XDG_RUNTIME_DIR") or "/tmp"
    return Path(base) / f"headrace-{os.getuid()}"


def settings_from_process() -> Settings:
    """Settings from this process's file and environment."""
    file = os.environ.get(FILE_ENV)
    return load_settings(file=Path(file) if file else None, environment=os.environ)


def run_service(name: str, *, prepare: Callable[[Settings], None] | None = None) -> int:
    """Run a service of this name until it is told to stop.

    Args:
        name: Of the service.
        prepare: What a standby does before its turn: slow imports, nothing that the life before it holds.

    Returns:
        The exit status.
    """
    attachment = attach()
    raise_open_files_limit()
    phases = StartPhases(_spawned_ns())
    try:
        settings = settings_from_process()
        instance = settings.instance or f"{name}-{socket.gethostname()}"
        logs.configure(service=name, instance=instance, level=settings.telemetry.log_level, output=settings.telemetry.log_output)
        if attachment.standby_fd is not None and prepare is not None:
            prepare(settings)
            trim_heap()
            log.info("service.standing_by", process_pid=os.getpid())
        if attachment.standby_fd is not None:
            attachment.wait_turn()
            # Its life begins with its turn.
            phases = StartPhases(time.monotonic_ns())
        uvloop.run(_live(name, instance, settings, attachment.notifier, phases))
    except (ConfigError, ModelError) as error:
        attachment.notifier.state(State.FAILED, error.message)
        print(f"headrace {name}: {error.message}", file=sys.stderr)
        return 2
    except HeadraceError as error:
        attachment.notifier.state(State.FAILED, error.message)
        print(f"headrace {name}: {error.code}: {error.message}", file=sys.stderr)
        return 1
    except OSError as error:
        # Where it names a file, that says all an operator needs; anything else is a fault of ours.
        if error.filename is None:
            raise
        attachment.notifier.state(State.FAILED, str(error))
        log.debug("service.failed", exc_info=error)
        print(f"headrace {name}: {error}", file=sys.stderr)
        return 1
    return 0


def _spawned_ns() -> int:
    boot_now_ns = time.clock_gettime_ns(time.CLOCK_BOOTTIME)
    return spawned_ns(time.monotonic_ns(), boot_now_ns=boot_now_ns, ticks_per_s=os.sysconf("SC_CLK_TCK"))


async def _live(name: str, instance: str, settings: Settings, notifier: Notifier, phases: StartPhases) -> None:
    """Make everything inside the loop it runs on: a gRPC server, for one, belongs to the loop of its making."""
    await _Runner(name, instance, settings, notifier, phases).run()


class _Runner:
    """One life of one service."""

    def __init__(self, name: str, instance: str, settings: Settings, notifier: Notifier, phases: StartPhases) -> None:
        self._name = name
        self._settings = settings
        self._notifier = notifier
        self._state = State.STARTING
        self._stop = asyncio.Event()
        self._error: BaseException | None = None
        run_directory = default_run_directory(settings)
        registry = CollectorRegistry()
        telemetry = settings.telemetry
        self._metrics = ServiceMetrics(registry)
        self._metrics.info.labels(name, instance, version("headrace")).set(1)
        wire = settings.wire
        keys = load_keys(Path(wire.keys_directory), name) if wire.keys_directory else None
        self._context = ServiceContext(
            name=name,
            instance=instance,
            settings=settings,
            wire=Wire(
                role=name,
                instance=instance,
                registry=registry,
                keys=keys,
                is_insecure_allowed=wire.insecure,
                leases=Leases(heartbeat_ns=int(wire.heartbeat_interval_s * 1e9), lease_ns=int(wire.lease_s * 1e9)),
            ),
            tracer=traces.configure(
                service=name,
                instance=instance,
                otlp_endpoint=telemetry.otlp_endpoint,
                file=telemetry.trace_file,
                sample_all=telemetry.trace_all,
            ),
            registry=registry,
            run_directory=run_directory,
            fail=self._fail,
            notifier=notifier,
            phases=phases,
        )
        self._is_start_told = False
        module = importlib.import_module(f"services.{name}.service")
        self._service: Service = getattr(module, f"{name.capitalize()}Service")(self._context, settings.sections[name])
        self._context.end_phase("imports")
        self._exposition = Exposition(
            registry, health=self._health, not_ready_reason=self._service.not_ready_reason, refresh=self._service.load
        )

    async def run(self) -> None:
        """From start to stop; raises what ended the life, if anything did."""
        loop = asyncio.get_running_loop()
        loop.set_exception_handler(self._on_loop_error)
        for signum in (signal.SIGTERM, signal.SIGINT):
            loop.add_signal_handler(signum, self._stop.set)
        self._set_state(State.STARTING)
        try:
            port = self._settings.telemetry.metrics_port(self._name)
            if port is not None:
                await self._exposition.start(self._settings.telemetry.metrics_host, port)
            await self._service.start()
            self._context.end_phase("start")
            self._context.wire.before_beat(self._tell_load)
            self._set_state(State.STARTED)
            await self._watch()
            if self._error is None:
                await self._drain()
        finally:
            await self._service.stop()
            await self._context.wire.close("stopped" if self._error is None else "failed")
            await self._exposition.stop()
            # Exporters may wait a moment for a collector; the event loop has nothing else to do any more.
            self._context.tracer.close()
        if self._error is not None:
            raise self._error
        self._set_state(State.STOPPED)

    async def _watch(self) -> None:
        progress_due = 0.0
        loop = asyncio.get_running_loop()
        while not self._stop.is_set():
            reason = self._service.not_ready_reason()
            if reason is not None:
                self._set_state(State.STARTED, reason)
            elif self._state is not State.READY:
                self._set_state(State.READY, " ".join(self._service.health().get("addresses", ())))
            if loop.time() >= progress_due:
                progress_due = loop.time() + PROGRESS_INTERVAL_S
                load, progress = self._service.load(), self._service.progress()
                self._notifier.progress({"num_steps": progress.num_steps}, is_busy=bool(load.num_running or load.num_waiting))
            with suppress(TimeoutError):
                async with asyncio.timeout(STATE_POLL_S if reason is not None else READY_POLL_S):
                    await self._stop.wait()

    async def _drain(self) -> None:
        self._set_state(State.DRAINING)
        deadline_s = self._settings.supervision.drain_deadline_s * 0.9
        try:
            await asyncio.wait_for(self._service.drain(), deadline_s)
        except TimeoutError:
            log.warning("service.drain_cut", deadline_s=deadline_s)

    def _tell_load(self) -> None:
        load = self._service.load()
        self._context.wire.set_load(load, self._service.progress(), self._service.models(), num_lanes=load.num_lanes)

    def _health(self) -> dict[str, Any]:
        progress = self._service.progress()
        return {
            "service": self._name,
            "instance": self._context.instance,
            "state": str(self._state),
            "num_steps": progress.num_steps,
            "last_step_unix_ns": progress.last_step_unix_ns,
            "oldest_waiting_age_ns": progress.oldest_waiting_age_ns,
            **self._service.health(),
        }

    def _set_state(self, state: State, detail: str = "") -> None:
        if state is self._state and state is not State.STARTING:
            return
        self._metrics.state.labels(self._state).set(0)
        self._metrics.state.labels(state).set(1)
        self._state = state
        self._notifier.state(state, detail)
        log.info(f"service.{state}", **({"detail": detail} if detail else {}))
        if state is State.READY and not self._is_start_told:
            self._is_start_told = True
            self._context.end_phase("peers")
            trim_heap()
            log.info("start.measured", **{f"{name}_s": seconds for name, seconds in self._context.phases.seconds().items()})

    def _fail(self, error: BaseException) -> None:
        if self._error is None:
            self._error = error
            log.error("service.failed", error=repr(error))
            self._stop.set()

    def _on_loop_error(self, loop: asyncio.AbstractEventLoop, details: dict[str, Any]) -> None:
        """A callback that raised has left its state half-changed: better a short restart than a service that limps on."""
        error = details.get("exception")
        log.error("callback.failed", message=details.get("message"), exc_info=error)
        if isinstance(error, Exception) and "handle" in details and not isinstance(error, OSError):
            self._fail(error)

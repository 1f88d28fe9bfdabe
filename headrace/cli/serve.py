"""What `headrace serve` and `headrace run` start: the list of processes, their order, and the line that says "ready"."""

from __future__ import annotations

import asyncio
import os
import sys
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Final, TextIO

import uvloop

from headrace.cli.gpus import own_gpu
from headrace.config.load import Settings, env_name
from headrace.config.settings import SupervisionSettings
from headrace.errors import ModelError
from headrace.home import expand_home
from headrace.lifecycle import LOADING, State
from headrace.service import default_run_directory
from headrace.supervision.limits import ProcessSpec, SupervisionLimits
from headrace.supervision.stderr_relay import StderrRelay
from headrace.supervision.supervisor import StateCallback, Supervisor
from headrace.telemetry import logs

_BAR_WIDTH: Final = 30


def serve_all(settings: Settings, environment: Mapping[str, str]) -> int:
    """Run all five services; returns the exit status.

    Raises:
        ModelError: A model has not been pulled, or is of the other kind than its place is for; nothing was started.
    """
    _check_models(settings)
    specs = local_specs(settings, environment)
    return _supervise("serve", settings, specs, on_state=StateLines(), run_directory=default_run_directory(settings))


def _check_models(settings: Settings) -> None:
    from headrace.models.embedding_config import load_embedding_config
    from headrace.models.model_config import load_model_config
    from headrace.models.store import resolve

    store = expand_home(settings.model.store, "model.store")
    for key, name in (("model.name", settings.model.name), ("embedding_model.name", settings.embedding_model.name)):
        if not name and key != "model.name":
            continue
        directory = resolve(name, store)
        makes_vectors = load_embedding_config(directory, load_model_config(directory)) is not None
        if makes_vectors and key == "model.name":
            raise ModelError(f"model.name {name!r} makes vectors and generates no text: set embedding_model.name to it", param=key)
        if not makes_vectors and key != "model.name":
            raise ModelError(f"embedding_model.name {name!r} generates text and makes no vectors: set model.name to it", param=key)


def serve_one(service: str, settings: Settings, environment: Mapping[str, str]) -> int:
    """Run one service; returns the exit status. Its supervisor leaves the run directory alone: others may use it."""
    spec = _spec(service, settings.instance, settings, environment)
    return _supervise(service, settings, [spec], on_state=StateLines(), run_directory=None)


def local_specs(settings: Settings, environment: Mapping[str, str]) -> list[ProcessSpec]:
    """The processes of `headrace serve`.

    The worker takes longest and starts at once; the light services start one after another beside it. The router stops first, so
    that the others can finish what it has open.

    Args:
        settings: What to start.
        environment: Variables that every process gets besides this one's own.
    """
    serve = settings.serve
    chain = (
        ("worker", serve.worker_replicas),
        ("scheduler", 1),
        ("detokenizer", serve.detokenizer_replicas),
        ("tokenizer", serve.tokenizer_replicas),
    )
    specs: list[ProcessSpec] = []
    before: tuple[str, ...] = ()
    for service, count in chain:
        names = tuple(f"{service}-{index}" for index in range(count))
        for index, name in enumerate(names):
            own = dict(environment)
            if index:
                # One port cannot be bound twice; the further replicas take free ones and log them.
                own[env_name(f"telemetry.{service}_metrics_port")] = "0"
            if service == "worker" and count > 1:
                own |= own_gpu(index, {**os.environ, **environment})
            specs.append(_spec(service, name, settings, own, start_after=before))
        before = names if service != "worker" else ()
    if settings.embedding_model.name:
        specs += _embedding_specs(settings, environment, start_after=before)
    router = _spec("router", "router-0", settings, environment, start_after=before, stop_before=tuple(spec.name for spec in specs))
    return [*specs, router]


def _embedding_specs(settings: Settings, environment: Mapping[str, str], *, start_after: tuple[str, ...]) -> list[ProcessSpec]:
    """A worker and a tokenizer for the model that makes vectors. They know it as their only model, and join the same links."""
    model = settings.embedding_model
    own = {
        **environment,
        env_name("model.name"): model.name,
        env_name("model.served_name"): model.name_for_clients,
        # Said of the other model.
        env_name("model.max_model_len"): "null",
    }
    specs = []
    for service in ("worker", "tokenizer"):
        # The chat model's has the port of the settings.
        own[env_name(f"telemetry.{service}_metrics_port")] = "0"
        spec = _spec(service, f"embedding-{service}-0", settings, own, start_after=start_after)
        # Its model is small: loaded again in the time that a second process would save.
        specs.append(replace(spec, has_standby=False))
    return specs


def _spec(
    service: str,
    instance: str,
    settings: Settings,
    environment: Mapping[str, str],
    *,
    start_after: tuple[str, ...] = (),
    stop_before: tuple[str, ...] = (),
) -> ProcessSpec:
    own = dict(environment)
    if instance:
        own["HEADRACE_INSTANCE"] = instance
    own["HEADRACE_RUN_DIRECTORY"] = str(default_run_directory(settings))
    return ProcessSpec(
        name=instance or service,
        argv=(sys.executable, "-m", f"services.{service}"),
        env=own,
        start_after=start_after,
        stop_before=stop_before,
        stall_timeout_s=settings.supervision.stall_timeout_s,
        has_standby=getattr(settings.sections[service], "standby", False),
    )


def _supervise(
    name: str, settings: Settings, specs: list[ProcessSpec], *, on_state: StateCallback, run_directory: Path | None
) -> int:
    telemetry = settings.telemetry
    relay = StderrRelay()
    logs.configure(
        service="supervisor", instance=name, level=telemetry.log_level, output=telemetry.log_output, take_stderr=relay.write
    )
    supervisor = Supervisor(
        specs, settings=supervision_limits(settings.supervision), on_state=on_state, run_directory=run_directory, relay=relay
    )
    with asyncio.Runner(loop_factory=uvloop.new_event_loop) as runner:
        return runner.run(supervisor.run())


def supervision_limits(settings: SupervisionSettings) -> SupervisionLimits:
    """The supervisor's own numbers out of the settings, which have the same names."""
    return SupervisionLimits(**settings.model_dump())


class StateLines:
    """What a person sees of the states: how far loading is, on a terminal, and once, where to ask.

    Args:
        terminal: Where progress goes; None for standard error, and nowhere where that is no terminal (the log tells it then).
    """

    def __init__(self, terminal: TextIO | None = None) -> None:
        self._terminal = terminal
        self._is_ready_printed = False

    def __call__(self, name: str, state: State, detail: str) -> None:
        """Told each state of each process; see `StateCallback`."""
        if state is State.STARTING and detail.startswith(LOADING):
            self._draw(name, detail)
        if state is State.READY and detail and not self._is_ready_printed:
            self._is_ready_printed = True
            print(f"headrace ready: {detail}", flush=True)

    def _draw(self, name: str, detail: str) -> None:
        terminal = self._terminal or sys.stderr
        share = detail.removeprefix(LOADING).removesuffix(" %")
        if not terminal.isatty() or not share.isdigit():
            return
        # Whole lines: other processes' lines come between them.
        filled = min(int(share), 100) * _BAR_WIDTH // 100
        print(f"{name} [{'#' * filled}{'.' * (_BAR_WIDTH - filled)}] {detail}", file=terminal, flush=True)

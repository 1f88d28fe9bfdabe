"""Settings that more than one service reads. Each service adds a section of its own (services/<name>/config.py)."""

from __future__ import annotations

from pathlib import Path
from typing import Literal

from pydantic import BaseModel, ConfigDict, Field


class Section(BaseModel):
    """A section of the settings: frozen, and strict about unknown keys."""

    model_config = ConfigDict(frozen=True, extra="forbid")


class ModelSettings(Section):
    """The model that is served."""

    name: str = Field(
        "smollm2-135m-instruct", description="Name of a pulled model (`headrace models list`), or the path of a model directory."
    )
    served_name: str | None = Field(None, description="Name that clients use; null means the model's own name.")
    store: str = Field("~/.cache/headrace/models", description="Directory in which pulled models live.")
    max_model_len: int | None = Field(
        None, ge=2, description="Most tokens of prompt and output together; null means the model's own context length."
    )
    external_package: str = Field(
        "", description="Python package whose model families are added to ours (docs/external-models.md); empty for none."
    )

    @property
    def name_for_clients(self) -> str:
        """What `model` must be in a request."""
        return self.served_name or Path(self.name).name


class EmbeddingModelSettings(Section):
    """A model that makes vectors, served by a worker and a tokenizer of its own beside the model that generates."""

    name: str = Field(
        "", description="Name of a pulled model, or the path of a model directory, for /v1/embeddings; empty serves none."
    )
    served_name: str | None = Field(None, description="Name that clients use; null means the model's own name.")

    @property
    def name_for_clients(self) -> str:
        """What `model` must be in a request."""
        return self.served_name or Path(self.name).name


class WireSettings(Section):
    """Addresses, keys and leases of the links. Empty addresses mean ipc sockets in the run directory."""

    router_bind: str = Field("", description="Where the router's back-plane listens, for example tcp://*:7000.")
    router_targets: list[str] = Field(
        [], description="Routers to dial, for example tcp://router:7000; each name stands for all its addresses."
    )
    scheduler_bind: str = Field("", description="Where the scheduler's back-plane listens, for example tcp://*:7100.")
    scheduler_targets: list[str] = Field([], description="Schedulers that workers may join.")
    detokenizer_bind: str = Field("", description="Where schedulers reach a detokenizer, for example tcp://*:0 for a free port.")
    advertise_host: str = Field("", description="Host name or address others reach this machine by; empty means its first address.")
    keys_directory: str = Field("", description="Directory of CURVE keys (`headrace keys create`); empty means no CURVE.")
    insecure: bool = Field(False, description="Allow wildcard addresses without CURVE.")
    heartbeat_interval_s: float = Field(0.5, gt=0, le=60, description="Time between heartbeats.")
    lease_s: float = Field(5.0, gt=0, le=600, description="Silence after which a peer counts as lost.")


class TelemetrySettings(Section):
    """Logs, traces, metrics."""

    log_level: Literal["debug", "info", "warning", "error"] = Field("info", description="Least level that is logged.")
    log_output: Literal["auto", "json", "console"] = Field("auto", description="Form of log lines; auto is console on a terminal.")
    otlp_endpoint: str = Field(
        "", description="OTLP/gRPC collector for traces, for example http://127.0.0.1:4317; empty means none."
    )
    trace_file: str = Field("", description="File to append spans to, one JSON line each; empty means none.")
    trace_all: bool = Field(True, description="Trace requests that bring no trace context; false traces only those that do.")
    metrics_host: str = Field("127.0.0.1", description="Address the metrics ports listen on.")
    router_metrics_port: int | None = Field(
        9100, ge=0, le=65535, description="The router's metrics port; 0 is a free one, null none."
    )
    tokenizer_metrics_port: int | None = Field(9101, ge=0, le=65535, description="The tokenizer's metrics port.")
    scheduler_metrics_port: int | None = Field(9102, ge=0, le=65535, description="The scheduler's metrics port.")
    worker_metrics_port: int | None = Field(9103, ge=0, le=65535, description="The worker's metrics port.")
    detokenizer_metrics_port: int | None = Field(9104, ge=0, le=65535, description="The detokenizer's metrics port.")

    def metrics_port(self, service: str) -> int | None:
        """The metrics port of a service by its name."""
        port: int | None = getattr(self, f"{service}_metrics_port")
        return port


class SupervisionSettings(Section):
    """How processes are started, watched, restarted and stopped."""

    start_timeout_s: float = Field(120.0, gt=0, description="Longest time from spawn to the message that a process has started.")
    stall_timeout_s: float = Field(
        60.0, gt=0, description="A process with work whose progress stands still for so long is restarted."
    )
    drain_deadline_s: float = Field(10.0, gt=0, description="Time for open work at a stop, before the process group is terminated.")
    term_deadline_s: float = Field(3.0, gt=0, description="Time between SIGTERM and SIGKILL to a process group.")
    backoff_initial_s: float = Field(0.1, gt=0, description="First pause before a restart; doubles with each.")
    backoff_max_s: float = Field(30.0, gt=0, description="Longest pause before a restart.")
    crash_loop_restarts: int = Field(8, ge=1, description="Restarts within the window after which everything is stopped.")
    crash_loop_window_s: float = Field(120.0, gt=0, description="Window of the crash-loop limit.")
    healthy_after_s: float = Field(30.0, gt=0, description="Time in service after which the pause starts small again.")
    stderr_tail_lines: int = Field(40, ge=1, description="Lines of a process's stderr shown with its exit reason.")


class ServeSettings(Section):
    """What `headrace serve` starts."""

    tokenizer_replicas: int = Field(1, ge=1, le=64, description="Tokenizer processes.")
    detokenizer_replicas: int = Field(1, ge=1, le=64, description="Detokenizer processes.")
    worker_replicas: int = Field(1, ge=1, le=64, description="Worker groups; each becomes a lane of the scheduler.")


COMMON_SECTIONS: dict[str, type[Section]] = {
    "model": ModelSettings,
    "embedding_model": EmbeddingModelSettings,
    "wire": WireSettings,
    "telemetry": TelemetrySettings,
    "supervision": SupervisionSettings,
    "serve": ServeSettings,
}

"""Settings of the router. Units are in the names; every field has a default that suits one machine."""

from __future__ import annotations

from typing import Literal

from pydantic import BaseModel, ConfigDict, Field


class Settings(BaseModel):
    """What an operator may set, as `router.<field>` in headrace.yaml or `HEADRACE_ROUTER_<FIELD>` in the environment."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    http_host: str = Field("127.0.0.1", description="Address the HTTP port listens on.")
    http_port: int = Field(8000, ge=0, le=65535, description="HTTP port; 0 takes a free one.")
    grpc_host: str = Field("127.0.0.1", description="Address the gRPC port listens on.")
    grpc_port: int | None = Field(9000, ge=0, le=65535, description="gRPC port; 0 takes a free one, null serves no gRPC.")
    sglang_grpc_port: int | None = Field(
        None, ge=0, le=65535, description="Port on which gateways drive this system as an SGLang engine; null serves none."
    )
    vllm_grpc_port: int | None = Field(
        None, ge=0, le=65535, description="Port on which gateways drive this system as a vLLM engine; null serves none."
    )
    api_keys_file: str = Field(
        "", description="File of keys, one a line: clients must send one over HTTP or gRPC; empty lets everybody ask."
    )
    grpc_tls_cert: str = Field("", description="PEM file of the gRPC ports' certificate; empty serves gRPC in the clear.")
    grpc_tls_key: str = Field("", description="PEM file of that certificate's private key.")
    grpc_tls_client_ca: str = Field(
        "", description="PEM file of the authorities whose client certificates are required; empty asks clients for none."
    )
    policy: str = Field("least_loaded", pattern="^(least_loaded|round_robin)$", description="How an instance of a stage is chosen.")
    isolate_tenants: bool = Field(
        False, description="Share cached prefixes only inside a tenant: a request's `user`, else its API key."
    )
    cache_aware: bool = Field(
        True, description="With several schedulers, prefer the one that has most of a prompt cached, unless it is much busier."
    )
    max_open_requests: int = Field(4096, ge=1, description="Most requests open at once; more are answered 429.")
    max_body_bytes: int = Field(16 * 1024 * 1024, ge=1024, description="Largest HTTP body or gRPC message; larger: 413.")
    body_timeout_s: float = Field(
        60.0, gt=0, description="Longest time a client may take to send a request's head, its body, or 1 MiB of a file."
    )
    default_timeout_s: float = Field(600.0, gt=0, description="Deadline of requests that name none.")
    max_timeout_s: float = Field(3600.0, gt=0, description="Longest deadline a request may name.")
    unavailable_wait_s: float = Field(10.0, ge=0, description="Longest wait for a missing stage before 503.")
    recovery_wait_s: float = Field(120.0, ge=0, description="The same for requests under way, whose stage was lost.")
    unknown_model_wait_s: float = Field(
        10.0, ge=0, description="Time after the start in which a model that nobody has offered is answered 503, not 404."
    )
    stall_nudge_s: float = Field(15.0, gt=0, description="Silence of a request after which its stages are asked again.")
    move_delay_s: float = Field(0.2, ge=0, description="Pause before a request goes back to an instance that refused it.")
    max_moves: int = Field(16, ge=1, description="Times a request may be moved between instances before it fails.")
    slow_client_timeout_s: float = Field(30.0, gt=0, description="Longest time a client may leave its output unread.")
    client_buffer_bytes: int = Field(1024 * 1024, ge=4096, description="Most unread output kept for a client.")
    stuck_after_s: float = Field(60.0, gt=0, description="An instance with work and no step for so long is stuck.")
    keep_alive_s: float = Field(75.0, gt=0, description="Idle time after which an HTTP connection is closed.")
    data_directory: str = Field(
        "~/.local/share/headrace", description="Directory of what clients leave here: uploaded files, batches, history in SQLite."
    )
    history: Literal["memory", "sqlite"] = Field(
        "memory", description="Where responses and conversations are kept: in this process, or in a file of the data directory."
    )
    history_max_entries: int = Field(10_000, ge=1, description="Most responses and conversations kept; the oldest go first.")
    history_max_bytes: int = Field(128 * 1024 * 1024, ge=4096, description="Most bytes of responses and conversations kept.")
    history_ttl_s: float = Field(30 * 86400.0, gt=0, description="Time for which a response or a conversation is kept.")
    max_file_bytes: int = Field(200 * 1024 * 1024, ge=1024, description="Largest uploaded file; larger: 413.")
    max_files: int = Field(10_000, ge=1, description="Most files kept; more are answered 429.")
    files_max_bytes: int = Field(10 * 1024**3, ge=1024, description="Most bytes of all files; more are answered 429.")
    max_batches: int = Field(256, ge=1, description="Most batches that are not finished; more are answered 429.")
    batch_max_requests: int = Field(50_000, ge=1, description="Most requests in a batch; one with more fails.")
    batch_concurrency: int = Field(
        8, ge=1, le=1024, description="Most requests of batches open at once; one fewer for each other open request, down to one."
    )

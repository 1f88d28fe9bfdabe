"""Every edge of the system: who binds, who dials, what may be said, how much may queue, and what happens when a queue is full.

The back service dials and the front service binds, DEALER to ROUTER, one connection a pair, both directions on it. A scheduler
stands in front of workers and behind routers; a detokenizer stands behind routers and in front of schedulers.

When full: every send is non-blocking. A full queue towards one peer raises `OverloadedError` to the sender, who decides (refuse
the client, keep the tokens and send them later); other peers are not touched. Nothing is dropped silently.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from headrace.v1.control_pb2 import Role
from headrace.v1.detokenizer_pb2 import DetokenizerInbox
from headrace.v1.router_pb2 import RouterInbox
from headrace.v1.scheduler_pb2 import SchedulerInbox
from headrace.v1.tokenizer_pb2 import TokenizerInbox
from headrace.v1.worker_pb2 import WorkerInbox

PROTOCOL_VERSION = 1

ROLES: dict[str, Role] = {
    "router": Role.ROLE_ROUTER,
    "tokenizer": Role.ROLE_TOKENIZER,
    "scheduler": Role.ROLE_SCHEDULER,
    "worker": Role.ROLE_WORKER,
    "detokenizer": Role.ROLE_DETOKENIZER,
}
ROLE_NAMES: dict[int, str] = {number: name for name, number in ROLES.items()}

INBOXES: dict[str, type[Any]] = {
    "router": RouterInbox,
    "tokenizer": TokenizerInbox,
    "scheduler": SchedulerInbox,
    "worker": WorkerInbox,
    "detokenizer": DetokenizerInbox,
}

CONTROL_ARMS = frozenset({"register", "registered", "heartbeat", "drain", "goodbye", "unsupported"})


@dataclass(frozen=True, slots=True)
class Edge:
    """One pair of roles and what they say to each other."""

    name: str
    front: str
    back: str
    to_front: frozenset[str]
    to_back: frozenset[str]
    queue_messages: int
    """Most messages queued towards one peer before a send is refused."""


@dataclass(frozen=True, slots=True)
class Backplane:
    """One bound address of a front service, and the edges that arrive there."""

    name: str
    front: str
    default_port: int
    """TCP port when the address names none; 0 is ephemeral, advertised in Register."""
    edges: tuple[Edge, ...]

    def edge_from(self, back: str) -> Edge | None:
        """The edge of a dialling role, or None when that role has no business here."""
        return next((edge for edge in self.edges if edge.back == back), None)


ROUTER_TOKENIZER = Edge(
    name="router-tokenizer",
    front="router",
    back="tokenizer",
    to_front=frozenset({"tokenize_reply", "detokenize_reply", "describe_reply"}),
    to_back=frozenset({"tokenize", "detokenize", "describe"}),
    queue_messages=1024,
)
ROUTER_SCHEDULER = Edge(
    name="router-scheduler",
    front="router",
    back="scheduler",
    to_front=frozenset({"accepted", "rejected", "cache_flushed", "cache_events", "embeddings"}),
    to_back=frozenset({"submit", "abort", "redirect", "flush_cache", "subscribe_cache"}),
    queue_messages=4096,
)
ROUTER_DETOKENIZER = Edge(
    name="router-detokenizer",
    front="router",
    back="detokenizer",
    to_front=frozenset({"output_deltas", "stream_gap"}),
    to_back=frozenset({"open_stream", "close_stream"}),
    queue_messages=4096,
)
SCHEDULER_WORKER = Edge(
    name="scheduler-worker",
    front="scheduler",
    back="worker",
    to_front=frozenset({"step_result"}),
    to_back=frozenset({"step_plan"}),
    queue_messages=64,
)
DETOKENIZER_SCHEDULER = Edge(
    name="detokenizer-scheduler",
    front="detokenizer",
    back="scheduler",
    to_front=frozenset({"token_batch"}),
    to_back=frozenset({"stop"}),
    queue_messages=1024,
)

ROUTER_BACKPLANE = Backplane("router", "router", 7000, (ROUTER_TOKENIZER, ROUTER_SCHEDULER, ROUTER_DETOKENIZER))
SCHEDULER_BACKPLANE = Backplane("scheduler", "scheduler", 7100, (SCHEDULER_WORKER,))
DETOKENIZER_BACKPLANE = Backplane("detokenizer", "detokenizer", 0, (DETOKENIZER_SCHEDULER,))

BACKPLANES = (ROUTER_BACKPLANE, SCHEDULER_BACKPLANE, DETOKENIZER_BACKPLANE)
EDGES = tuple(edge for backplane in BACKPLANES for edge in backplane.edges)

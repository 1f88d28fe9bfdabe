"""Goal: whatever is lost, repeated or reordered, every request ends exactly once, with its whole output.

Method: the real request table, directory and policies against a small world of tokenizers, schedulers and detokenizers whose
messages hypothesis delivers, drops, doubles and shuffles, and whose processes it kills and restarts. Then the world heals, time
passes, and everything must have ended.
"""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from headrace.errors import HeadraceError, NotFoundError, ReplicaDeadError
from headrace.v1.common_pb2 import FINISH_REASON_LENGTH
from services.router.actions import (
    Action,
    Deliver,
    End,
    SendAbort,
    SendCloseStream,
    SendOpenStream,
    SendRedirect,
    SendSubmit,
    SendTokenize,
    ShareTokens,
)
from services.router.directory import Directory, Instance
from services.router.generation import EncodedPrompt, GenerationRequest, ModelOffer, TextPrompt
from services.router.open_request import Kind, OpenRequest, Output, Patience, begin_beside
from services.router.places import DETOKENIZER, SCHEDULER, TOKENIZER
from services.router.policies.choice import least_loaded
from services.router.streams import Streams

SECOND = 1_000_000_000
OFFER = ModelOffer("m", 128, 1)
NUM_OUTPUT = 7
CHOICE = 100
"""Added to the number of a stream for that of its second choice."""


def token_at(stream_id: int, position: int) -> int:
    return 100 * stream_id + position


def text_of(token: int) -> str:
    return f"<{token}>"


class Process:
    """One life of one service of the world."""

    def __init__(self, world: World, role: int, incarnation: int) -> None:
        self.world = world
        self.role = role
        self.incarnation = incarnation
        self.is_alive = True
        # Scheduler: request id -> [stream id, number of outputs, detokenizer]. Detokenizer: stream id -> expected position.
        self.sequences: dict[str, list[int]] = {}
        self.positions: dict[int, int] = {}

    def submit(self, request_id: str, stream_id: int, num_outputs: int, detokenizer: int) -> None:
        self.sequences[request_id] = [stream_id, num_outputs, detokenizer]

    def redirect(self, request_id: str, detokenizer: int, from_position: int) -> None:
        sequence = self.sequences.get(request_id)
        if sequence is None:
            error = ReplicaDeadError("not held here any more")
            self.world.to_router(
                self,
                lambda: self.world.streams.on_refused(request_id, SCHEDULER, self.incarnation, error=error, now_ns=self.world.now),
            )
            return
        sequence[2] = detokenizer
        for position in range(from_position, sequence[1]):
            self.send_token(sequence[0], position, detokenizer)

    def step(self) -> None:
        """Make one token for every sequence; a full one is forgotten."""
        for request_id, (stream_id, num_outputs, detokenizer) in list(self.sequences.items()):
            self.send_token(stream_id, num_outputs, detokenizer)
            self.sequences[request_id][1] += 1
            if num_outputs + 1 >= NUM_OUTPUT:
                del self.sequences[request_id]

    def send_token(self, stream_id: int, position: int, detokenizer: int) -> None:
        target = self.world.processes.get(detokenizer)
        if target is not None:
            self.world.post(target, lambda: target.token(stream_id, position))

    def token(self, stream_id: int, position: int) -> None:
        expected = self.positions.get(stream_id)
        if expected is None or position < expected:
            return
        if position > expected:
            self.world.to_router(self, lambda: self.world.streams.on_gap(stream_id, self.incarnation, expected))
            return
        token = token_at(stream_id, position)
        reason = FINISH_REASON_LENGTH if position + 1 == NUM_OUTPUT else 0
        self.positions[stream_id] = position + 1
        output = Output(position, (token,), text_of(token), reason)
        self.world.to_router(self, lambda: self.world.streams.on_output(stream_id, self.incarnation, output, self.world.now))


class World:
    """Processes, messages on their way, a clock, and the router's core."""

    def __init__(self) -> None:
        self.now = SECOND
        self.directory = Directory(least_loaded, stuck_after_ns=10 * SECOND)
        self.streams = Streams()
        self.processes: dict[int, Process] = {}
        self.mail: list[tuple[Process | None, Callable[[], object]]] = []
        self.next_incarnation = 1
        self.texts: dict[str, str] = {}
        self.ends: dict[str, list[HeadraceError | None]] = {}
        for role in (TOKENIZER, SCHEDULER, DETOKENIZER):
            for _ in range(2):
                self.start(role)

    def open(self, stream_id: int, first: OpenRequest | None = None) -> None:
        """Begin a request of two choices, or the second choice of one."""
        request = OpenRequest(
            f"r{stream_id}",
            kind=Kind.GENERATE,
            generation=GenerationRequest("m", TextPrompt("hello")),
            stream_id=stream_id,
            deadline_ns=10**6 * SECOND,
            placement=self.directory,
            patience=Patience(10**6 * SECOND, 10**6 * SECOND, 5 * SECOND, SECOND // 5, 10**6),
            fork_group=f"r{stream_id % CHOICE}",
        )
        if first is not None:
            begin_beside(request, first)
        self.texts[request.request_id] = ""
        self.ends[request.request_id] = []
        self.perform(self.streams.open(request, self.now))

    @property
    def firsts(self) -> list[str]:
        """Requests without their second choices."""
        return [request_id for request_id in self.ends if int(request_id[1:]) < CHOICE]

    def start(self, role: int) -> None:
        process = Process(self, role, self.next_incarnation)
        self.processes[process.incarnation] = process
        self.next_incarnation += 1
        self.directory.add(Instance(role, process.incarnation, f"i{process.incarnation}", "", {"m": OFFER}), self.now)
        self.perform(self.streams.on_capacity(self.now))

    def kill(self, process: Process) -> None:
        process.is_alive = False
        del self.processes[process.incarnation]
        self.directory.remove(process.incarnation)
        self.perform(self.streams.on_peer_lost(process.incarnation, self.now))

    def post(self, target: Process | None, deliver: Callable[[], object]) -> None:
        self.mail.append((target, deliver))

    def to_router(self, sender: Process, event: Callable[[], list[Action] | None]) -> None:
        # What a lost peer sent before is dropped by the link.
        self.post(None, lambda: self.perform((event() or []) if sender.is_alive else []))

    def deliver(self, index: int) -> None:
        target, deliver = self.mail.pop(index)
        if target is None or target.is_alive:
            deliver()

    def perform(self, actions: list[Action]) -> None:
        for action in actions:
            if isinstance(action, Deliver):
                request_id = action.request.request_id
                assert not self.ends[request_id], "output after the end"
                self.texts[request_id] += action.piece.text
            elif isinstance(action, End):
                self.ends[action.request.request_id].append(action.error)
            elif isinstance(action, ShareTokens):
                self.open(action.request.stream_id + CHOICE, first=action.request)
            else:
                target = self.processes.get(action.to)
                if target is not None:
                    self.post(target, self.message(target, action))

    def message(self, target: Process, action: Action) -> Callable[[], object]:
        match action:
            case SendTokenize(request):
                prompt = EncodedPrompt(np.arange(3, dtype=np.int32))
                return lambda: self.to_router(
                    target, lambda: self.streams.on_tokenized(request.request_id, target.incarnation, prompt, self.now)
                )
            case SendSubmit(request):
                num, detokenizer = len(request.output_tokens), request.places.held[DETOKENIZER]
                return lambda: target.submit(request.request_id, request.stream_id, num, detokenizer)
            case SendRedirect(request, _, position):
                detokenizer = request.places.held[DETOKENIZER]
                return lambda: target.redirect(request.request_id, detokenizer, position)
            case SendOpenStream(request):
                num = len(request.output_tokens)
                return lambda: target.positions.__setitem__(request.stream_id, num)
            case SendAbort(request_id):
                return lambda: target.sequences.pop(request_id, None)
            case SendCloseStream(stream_id):
                return lambda: target.positions.pop(stream_id, None)
        raise AssertionError(action)

    def step(self) -> None:
        for process in list(self.processes.values()):
            process.step()

    def pass_time(self, nanoseconds: int) -> None:
        self.now += nanoseconds
        self.perform(self.streams.on_time(self.now))

    def heal(self) -> None:
        for role in (TOKENIZER, SCHEDULER, DETOKENIZER):
            if not any(process.role == role for process in self.processes.values()):
                self.start(role)
        for _ in range(400):
            while self.mail:
                self.deliver(0)
            if not len(self.streams):
                return
            self.step()
            self.pass_time(SECOND)


OPERATIONS = st.lists(
    st.tuples(
        st.sampled_from(
            ["open", "deliver", "deliver", "deliver", "deliver", "step", "drop", "double", "shuffle", "kill", "start", "time"]
        ),
        st.integers(0, 1000),
    ),
    max_size=120,
)


def run(world: World, operations: list[tuple[str, int]]) -> None:
    for operation, number in operations:
        match operation:
            case "open" if len(world.firsts) < 4:
                world.open(len(world.firsts) + 1)
            case "deliver" if world.mail:
                world.deliver(0)
            case "shuffle" if world.mail:
                world.deliver(number % len(world.mail))
            case "drop" if world.mail:
                world.mail.pop(number % len(world.mail))
            case "double" if world.mail:
                world.mail.append(world.mail[number % len(world.mail)])
            case "step":
                world.step()
            case "kill" if world.processes:
                world.kill(list(world.processes.values())[number % len(world.processes)])
            case "start":
                world.start((TOKENIZER, SCHEDULER, DETOKENIZER)[number % 3])
            case "time":
                world.pass_time(number * SECOND // 100)


@given(OPERATIONS)
@settings(max_examples=400, deadline=None, suppress_health_check=[HealthCheck.too_slow])
def test_every_request_ends_once_with_its_whole_output_whatever_is_lost(operations: list[tuple[str, int]]) -> None:
    world = World()
    world.open(1)
    run(world, operations)
    world.heal()
    assert len(world.ends) == 2 * len(world.firsts)
    for request_id, ends in world.ends.items():
        expected = "".join(text_of(token_at(int(request_id[1:]), position)) for position in range(NUM_OUTPUT))
        assert ends == [None], request_id
        assert world.texts[request_id] == expected
    assert not len(world.streams)
    assert all(instance.num_open == 0 for instance in map(world.directory.get, world.processes) if instance is not None)


@given(OPERATIONS, st.integers(0, 1000))
@settings(max_examples=150, deadline=None, suppress_health_check=[HealthCheck.too_slow])
def test_an_aborted_request_ends_once_and_leaves_nothing_at_any_instance(operations: list[tuple[str, int]], cut: int) -> None:
    world = World()
    world.open(1)
    run(world, operations[: cut % (len(operations) + 1)])
    for request_id in list(world.ends):
        world.perform(world.streams.end(request_id, NotFoundError("gone")))
    run(world, [(name, number) for name, number in operations if name in {"deliver", "step", "time"}])
    world.heal()
    assert all(len(ends) == 1 for ends in world.ends.values())
    assert all(instance.num_open == 0 for instance in map(world.directory.get, world.processes) if instance is not None)

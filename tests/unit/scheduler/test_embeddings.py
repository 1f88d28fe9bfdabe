"""Texts that are embedded: whole rows, oldest first, and what becomes of them when a lane, a router or a row is lost."""

from __future__ import annotations

import random
from array import array
from dataclasses import dataclass, field

import pytest

from headrace.errors import (
    DeadlineExceededError,
    HeadraceError,
    InvalidRequestError,
    NotFoundError,
    OverloadedError,
    RequestFailedError,
    UnavailableError,
)
from services.scheduler.admission import LANES_LOST_MAX
from services.scheduler.embeddings import EmbedCapacity, Embeddings, EmbedLane, EmbedRequest


@dataclass
class Desk:
    """A core, with what failed in it."""

    failed: dict[str, HeadraceError] = field(default_factory=dict)
    max_waiting_requests: int = 100
    max_waiting_tokens: int = 10_000

    def __post_init__(self) -> None:
        self.core = Embeddings(
            max_waiting_requests=self.max_waiting_requests,
            max_waiting_tokens=self.max_waiting_tokens,
            max_in_flight=2,
            on_failed=lambda request, error: self.failed.update({request.request_id: error}),
        )

    def join(self, lane_id: int = 1, **changes: object) -> EmbedLane:
        values = {"max_model_len": 16, "max_num_batched_tokens": 20, "max_num_seqs": 4, "vocab_size": 50, "vector_size": 8}
        return self.core.lane_joined(lane_id, EmbedCapacity(**({"model": "mini"} | values | changes)))  # type: ignore[arg-type]

    def submit(self, request_id: str, num_tokens: int = 5, *, model: str = "mini", owner: int = 7, deadline_ns: int = 0) -> None:
        tokens = array("i", range(num_tokens))
        self.core.submit(EmbedRequest(request_id, owner, model, tokens, deadline_ns=deadline_ns), now_ns=1000)

    def plan(self, lane: EmbedLane) -> list[str]:
        step = self.core.plan(lane)
        return [] if step is None else [request.request_id for request in step[1]]


def test_a_step_takes_whole_texts_oldest_first_as_many_as_fit() -> None:
    desk = Desk()
    lane = desk.join()
    for name, num_tokens in (("a", 8), ("b", 8), ("c", 8), ("d", 1), ("e", 1), ("f", 1)):
        desk.submit(name, num_tokens)
    assert desk.plan(lane) == ["a", "b"], "c would be the 21st to 24th token"
    assert desk.plan(lane) == ["c", "d", "e", "f"], "four texts a step"
    assert desk.plan(lane) == []


def test_only_two_steps_are_at_a_lane_and_a_draining_one_gets_none() -> None:
    desk = Desk()
    lane = desk.join(max_num_seqs=1)
    for name in "abc":
        desk.submit(name)
    assert (desk.plan(lane), desk.plan(lane), desk.plan(lane)) == (["a"], ["b"], [])
    desk.core.finish(lane, 1, [0], {})
    lane.is_draining = True
    assert desk.plan(lane) == []
    lane.is_draining = False
    assert desk.plan(lane) == ["c"]


def test_vectors_go_to_those_that_still_want_them() -> None:
    desk = Desk()
    lane = desk.join()
    for name in "abc":
        desk.submit(name)
    step = desk.core.plan(lane)
    assert step is not None
    desk.core.abort(["b"])
    done = desk.core.finish(lane, step[0], [0, 1, 2], {})
    assert [(request.request_id, place) for request, place in done] == [("a", 0), ("c", 2)]
    assert desk.core.num_requests == 0
    assert not desk.failed


def test_a_failed_row_ends_its_own_request_alone() -> None:
    desk = Desk()
    lane = desk.join()
    for name in "abc":
        desk.submit(name)
    desk.core.plan(lane)
    done = desk.core.finish(lane, 1, [0], {1: "its vector held NaN or infinity"})
    assert [request.request_id for request, _ in done] == ["a"]
    assert "NaN" in desk.failed["b"].message
    assert "no vector" in desk.failed["c"].message
    assert all(isinstance(error, RequestFailedError) for error in desk.failed.values())


def test_texts_of_a_lost_lane_wait_again_in_front_and_in_order() -> None:
    desk = Desk()
    lane, other = desk.join(1), desk.join(2)
    for name in "abcdef":
        desk.submit(name)
    assert desk.plan(lane) == ["a", "b", "c", "d"]
    assert desk.plan(lane) == ["e", "f"]
    desk.submit("g")
    desk.core.lane_lost(1)
    assert desk.plan(other) == ["a", "b", "c", "d"]
    assert desk.plan(other) == ["e", "f", "g"]


def test_a_text_on_every_lane_that_is_lost_ends() -> None:
    desk = Desk()
    desk.join(1)
    desk.submit("poison")
    for life in range(LANES_LOST_MAX):
        assert "poison" not in desk.failed
        lane = desk.join(10 + life)
        assert desk.plan(lane) == ["poison"]
        desk.core.lane_lost(lane.lane_id)
    assert f"{LANES_LOST_MAX} workers" in desk.failed["poison"].message
    assert desk.core.num_requests == 0


def test_a_text_asked_for_again_keeps_its_place() -> None:
    desk = Desk()
    lane = desk.join(max_num_seqs=1)
    desk.submit("a")
    desk.submit("b")
    desk.submit("a")
    assert (desk.plan(lane), desk.plan(lane)) == (["a"], ["b"])
    desk.submit("a", owner=8)
    assert desk.core.finish(lane, 1, [0], {}) == [], "another router's request of that name replaced it"
    assert desk.plan(lane) == ["a"]


def test_models_are_kept_apart() -> None:
    desk = Desk()
    mini, large = desk.join(1), desk.join(2, model="large")
    desk.submit("m", model="mini")
    desk.submit("l", model="large")
    assert (desk.plan(large), desk.plan(mini)) == (["l"], ["m"])


def test_a_text_too_long_for_one_lane_waits_for_another() -> None:
    desk = Desk()
    short, long = desk.join(1, max_model_len=8), desk.join(2)
    desk.submit("long", 12)
    desk.submit("short", 3)
    assert desk.plan(short) == ["short"]
    assert desk.plan(long) == ["long"]


def test_what_can_never_be_served_is_refused_with_field_limit_and_value() -> None:
    desk = Desk()
    with pytest.raises(UnavailableError, match="no worker that embeds"):
        desk.submit("early")
    desk.join()
    with pytest.raises(NotFoundError, match="'other' does not embed here, only mini"):
        desk.submit("a", model="other")
    for num_tokens in (0, 17):
        with pytest.raises(InvalidRequestError, match=f"has {num_tokens} tokens; 1 to 16 are allowed"):
            desk.submit("a", num_tokens)
    with pytest.raises(DeadlineExceededError):
        desk.submit("a", deadline_ns=999)
    desk.core.lane_lost(1)
    desk.submit("waits for the next life of its worker")
    assert desk.core.num_waiting == 1


def test_the_queue_is_bounded_in_texts_and_tokens() -> None:
    desk = Desk(max_waiting_requests=2)
    desk.join()
    desk.submit("a")
    desk.submit("b")
    with pytest.raises(OverloadedError, match="max_waiting_requests is 2"):
        desk.submit("c")
    desk = Desk(max_waiting_tokens=9)
    desk.join()
    desk.submit("alone", 12)
    with pytest.raises(OverloadedError, match="max_waiting_tokens is 9"):
        desk.submit("c", 1)
    desk.core.abort(["alone"])
    desk.submit("c", 1)


def test_deadlines_end_texts_wherever_they_are() -> None:
    desk = Desk()
    lane = desk.join(max_num_seqs=1)
    desk.submit("running", deadline_ns=5000)
    desk.submit("waiting", deadline_ns=6000)
    desk.plan(lane)
    assert desk.core.next_deadline_ns() == 5000
    desk.core.expire(6000)
    assert set(desk.failed) == {"running", "waiting"}
    assert desk.core.finish(lane, 1, [0], {}) == []
    assert desk.core.next_deadline_ns() is None


def test_every_text_ends_once_whatever_happens_and_nothing_stays() -> None:
    """Random lives of lanes, routers and texts; at the end each text had exactly one end and the counts are zero."""
    for seed in range(60):
        rng = random.Random(seed)
        desk, ended, lanes, asked = Desk(), [], {}, 0
        lanes[0] = desk.join(0)
        gone: set[str] = set()
        for event in range(200):
            kind = rng.randrange(6)
            if kind <= 1:
                asked += 1
                desk.submit(f"r{asked}", rng.randint(1, 16), owner=rng.randint(1, 3))
            elif kind == 2:
                desk.core.plan(rng.choice(list(lanes.values())))
            elif kind == 3 and (busy := [lane for lane in lanes.values() if lane.in_flight]):
                lane = rng.choice(busy)
                step = rng.choice(list(lane.in_flight))
                slots = range(len(lane.in_flight[step]))
                ended += [request.request_id for request, _ in desk.core.finish(lane, step, slots, {})]
            elif kind == 4 and rng.random() < 0.3:
                lost = rng.choice(list(lanes))
                del lanes[lost]
                desk.core.lane_lost(lost)
                lanes[event + 1] = desk.join(event + 1)
            elif kind == 5 and rng.random() < 0.2:
                name = f"r{rng.randint(1, asked + 1)}"
                if name in desk.core._requests:
                    gone.add(name)
                desk.core.abort([name])
        while desk.core.num_requests:
            for lane in lanes.values():
                desk.core.plan(lane)
                for step, texts in list(lane.in_flight.items()):
                    ended += [request.request_id for request, _ in desk.core.finish(lane, step, range(len(texts)), {})]
        ends = [*ended, *desk.failed, *gone]
        assert len(ends) == len(set(ends)) == asked
        assert desk.core.num_waiting == desk.core._num_waiting_tokens == 0

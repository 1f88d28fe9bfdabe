"""The shell of what embeds, among the ends of its links in memory: vectors to their routers, failures, failover, traces."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest

from headrace.telemetry import names
from headrace.telemetry.traces import memory_tracer
from headrace.v1 import common_pb2 as common
from headrace.v1 import control_pb2 as control
from headrace.v1 import scheduler_pb2 as scheduler
from headrace.wire import topology
from headrace.wire.envelope import float32_array, int32_array
from tests.unit.scheduler.network import Recorder, World, capacity

SIZE = 3
TRACEPARENT = "00-0af7651916cd43dd8448eb211c80319c-b7ad6b7169203331-01"
MINI = common.ModelInfo(name="mini", max_model_len=8, embedding=common.EmbeddingInfo(size=SIZE))


class Embedder(Recorder):
    """A worker whose vectors are [tokens, first token, last token]; it answers when it is told to."""

    def __init__(self, world: World, instance: str, **changes: Any) -> None:
        super().__init__()
        self.wire = world.network.wire("worker", instance)
        self.failing: set[int] = set()
        fields: dict[str, Any] = {"model": MINI, "work_kinds": [control.WORK_KIND_EMBED]}
        offered = capacity(**(fields | changes))
        del offered.pools[:]
        register = control.Register(role=control.ROLE_WORKER, instance=instance, capacity=offered)
        self.back = self.wire.dial(topology.SCHEDULER_BACKPLANE, ["fake://scheduler"], self, register=lambda: register)

    def answer(self) -> None:
        """Answer what has come."""
        (peer,) = self.peers.values()
        for message, frames in self.messages:
            plan = message.step_plan
            result = scheduler.StepResult(step_id=plan.step_id, vector_size=SIZE)
            tokens, vectors = int32_array(frames[0]), []
            for slot, count in zip(plan.row_slots, plan.row_num_new_tokens, strict=True):
                row, tokens = tokens[:count], tokens[count:]
                if int(row[0]) in self.failing:
                    result.failed_slots.append(slot)
                    result.failed_reasons.append(scheduler.ROW_ERROR_NON_FINITE_VECTOR)
                else:
                    result.slots.append(slot)
                    vectors.append([count, row[0], row[-1]])
            peer.send("step_result", result, [np.array(vectors, dtype="<f4").tobytes()])
        self.messages.clear()


async def make(tmp_path: Path, **settings: Any) -> tuple[World, Embedder]:
    world = await World.make(tmp_path, **settings)
    worker = Embedder(world, "embedding-worker-0")
    await world.settle()
    return world, worker


async def submit(world: World, request_id: str, tokens: list[int], **changes: Any) -> None:
    work = common.WorkHeader(request_id=request_id, traceparent=changes.pop("traceparent", ""), enqueued_unix_ns=1)
    body = scheduler.Submit(work=work, num_tokens=len(tokens), **({"model": "mini", "kind": control.WORK_KIND_EMBED} | changes))
    world.scheduler_peer().send("submit", body, [np.array(tokens, dtype=np.int32)])
    await world.settle()


def vectors(world: World) -> dict[str, list[float]]:
    """What the router got, by request."""
    found: dict[str, list[float]] = {}
    for message, frames in world.router.messages:
        if message.WhichOneof("body") == "embeddings":
            body = message.embeddings
            rows = float32_array(frames[0], count=len(body.request_ids) * body.vector_size).reshape(-1, body.vector_size)
            assert not set(body.request_ids) & found.keys(), "a vector came twice"
            found |= dict(zip(body.request_ids, rows.tolist(), strict=True))
    return found


async def test_vectors_come_back_and_both_kinds_of_lane_are_served_side_by_side(tmp_path: Path) -> None:
    world, worker = await make(tmp_path)
    assert [model.name for model in world.scheduler_peer().models] == ["mini"]
    chat = await world.join()
    assert [model.name for model in world.scheduler_peer().models] == ["tiny", "mini"]
    await submit(world, "a", [4, 5, 6])
    await submit(world, "b", [7])
    await world.submit("chat", [1, 2])
    worker.answer()
    await world.settle()
    assert vectors(world) == {"a": [3, 4, 6], "b": [1, 7, 7]}
    assert world.detokenizer.stream(1)[1] == common.FINISH_REASON_LENGTH
    assert not chat.fake.held
    assert not world.rejections()
    assert world.service.health()["num_requests"] == 0


async def test_a_lost_worker_takes_no_text_with_it(tmp_path: Path) -> None:
    world, worker = await make(tmp_path)
    await submit(world, "a", [4, 5])
    assert worker.bodies("step_plan")
    await worker.wire.close()
    await world.settle()
    assert not world.scheduler_peer().models
    await submit(world, "b", [6])
    successor = Embedder(world, "embedding-worker-0")
    await world.settle()
    successor.answer()
    await world.settle()
    assert vectors(world) == {"a": [2, 4, 5], "b": [1, 6, 6]}


async def test_failed_rows_and_bad_requests_are_told_one_by_one(tmp_path: Path) -> None:
    world, worker = await make(tmp_path, max_waiting_requests=5)
    worker.failing = {9}
    await submit(world, "nan", [9, 1])
    await submit(world, "good", [8, 1])
    await submit(world, "long", list(range(9)))
    await submit(world, "vocabulary", [50])
    await submit(world, "model", [1], model="tiny")
    worker.answer()
    await world.settle()
    errors = {name: (error.code, error.message) for name, error in world.rejections().items()}
    assert errors.keys() == {"nan", "long", "vocabulary", "model"}
    assert errors["nan"][0] == "request_failed"
    assert "NaN" in errors["nan"][1]
    assert "has 9 tokens; 1 to 8 are allowed" in errors["long"][1]
    assert "token id 50 is outside the vocabulary of 50 tokens" in errors["vocabulary"][1]
    assert errors["model"][0] == "not_found"
    assert vectors(world) == {"good": [2, 8, 1]}


async def test_an_abort_and_a_lost_router_free_texts(tmp_path: Path) -> None:
    world, worker = await make(tmp_path)
    await submit(world, "a", [1])
    world.scheduler_peer().send("abort", scheduler.Abort(request_ids=["a"]))
    await world.settle()
    await submit(world, "b", [2])
    await world.router_wire.close()
    await world.settle()
    assert world.service.embeddings.core.num_requests == 0
    worker.answer()
    await world.settle()
    assert not vectors(world)


@pytest.mark.parametrize(
    "changes",
    [
        {"model": common.ModelInfo(name="mini", max_model_len=8)},
        {"work_kinds": [control.WORK_KIND_GENERATE, control.WORK_KIND_EMBED]},
    ],
)
async def test_a_worker_that_offers_nonsense_is_told(tmp_path: Path, changes: dict[str, Any]) -> None:
    world = await World.make(tmp_path)
    worker = Embedder(world, "embedding-worker-0", **changes)
    await world.settle()
    assert worker.back.refused_reason and not worker.peers
    assert not world.service.embeddings.core.lanes


async def test_a_traced_text_leaves_its_wait_and_its_run(tmp_path: Path) -> None:
    tracer, exporter = memory_tracer()
    world, worker = await make(tmp_path, tracer=tracer)
    await submit(world, "a", [1, 2], traceparent=TRACEPARENT)
    (plan,) = worker.bodies("step_plan")
    assert plan.new_sequences[0].work.traceparent[3:35] == TRACEPARENT[3:35]
    worker.answer()
    await world.settle()
    found = {span.name for span in exporter.get_finished_spans()}
    assert {names.SPAN_SCHEDULER_QUEUE, names.SPAN_SCHEDULER_RUN} <= found

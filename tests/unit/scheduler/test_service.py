"""The shell among the ends of its links, in memory: what goes to whom, and what happens when an end fails."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Callable
from pathlib import Path

import pytest

from headrace.telemetry.traces import memory_tracer
from headrace.v1 import common_pb2 as common
from headrace.v1 import control_pb2 as control
from headrace.v1 import scheduler_pb2 as scheduler
from headrace.wire.link import TIMER_EARLY_NS
from services.scheduler.step_pacer import StepPacer
from tests.patience import GROWING_S
from tests.unit.scheduler.network import DetokenizerEnd, World, outputs

TRACEPARENT = "00-0af7651916cd43dd8448eb211c80319c-b7ad6b7169203331-01"


async def until(world: World, condition: Callable[[], bool]) -> None:
    """Let real time pass until something has happened; the test's own timeout bounds it."""
    while not condition():
        await asyncio.sleep(0.005)
        await world.settle()


async def test_a_request_is_accepted_and_its_tokens_reach_its_detokenizer(tmp_path: Path) -> None:
    world = await World.make(tmp_path)
    worker = await world.join()
    await world.submit(tokens=[5, 6, 7, 8])
    assert [accepted.request_id for accepted in world.router.bodies("accepted")] == ["r1"]
    assert world.detokenizer.stream(1) == (outputs([5, 6, 7, 8], 8), common.FINISH_REASON_LENGTH)
    assert not worker.fake.held, "the worker was told to let go"
    assert world.service.core.num_requests == 0


async def test_a_stop_token_is_sent_and_marked(tmp_path: Path) -> None:
    world = await World.make(tmp_path)
    await world.join()
    expected = outputs([5, 6], 8)
    stop = expected[3]
    await world.submit(tokens=[5, 6], eos_token_ids=[stop])
    first = min(position for position, token in expected.items() if token == stop)
    tokens, finish = world.detokenizer.stream(1)
    assert tokens == {position: expected[position] for position in range(first + 1)}
    assert finish == common.FINISH_REASON_STOP
    assert list(world.detokenizer.bodies("token_batch")[-1].num_stop_tokens) == [1]


async def test_ignore_eos_goes_on_past_it_but_not_past_stop_tokens(tmp_path: Path) -> None:
    world = await World.make(tmp_path)
    await world.join()
    expected = outputs([5, 6], 8)
    stopping = common.StoppingParams(max_tokens=8, ignore_eos=True)
    await world.submit(tokens=[5, 6], eos_token_ids=[expected[0]], stopping=stopping)
    assert world.detokenizer.stream(1) == (expected, common.FINISH_REASON_LENGTH)


async def test_models_are_announced_while_there_is_a_lane(tmp_path: Path) -> None:
    world = await World.make(tmp_path)
    assert world.service.not_ready_reason() == "no lanes"
    assert not world.scheduler_peer().models
    worker = await world.join()
    assert [model.name for model in world.scheduler_peer().models] == ["tiny"]
    assert world.service.not_ready_reason() is None
    await worker.wire.close()
    await world.settle()
    assert not world.scheduler_peer().models


async def test_without_any_lane_ever_a_request_is_refused(tmp_path: Path) -> None:
    world = await World.make(tmp_path)
    await world.submit()
    assert world.rejections()["r1"].code == "unavailable"


async def test_bad_requests_are_refused_one_by_one(tmp_path: Path) -> None:
    world = await World.make(tmp_path)
    await world.join()
    await world.submit("short-frame", [1, 2], num_tokens=3)
    await world.submit("bad-counts", [1, 2], num_output_tokens=2)
    await world.submit("nowhere", [1, 2], detokenizer=scheduler.DetokenizerTarget())
    await world.submit("outside", [1, 50])
    await world.submit("negative", [1, -1])
    await world.submit("empty", [])
    await world.submit("other-model", [1], model="other")
    await world.submit("too-long", [1] * 128)
    await world.submit("none-wanted", [1], stopping=common.StoppingParams(max_tokens=0))
    errors = world.rejections()
    assert {request_id: error.code for request_id, error in errors.items()} == {
        "short-frame": "protocol_error",
        "bad-counts": "protocol_error",
        "nowhere": "protocol_error",
        "outside": "invalid_request",
        "negative": "invalid_request",
        "empty": "invalid_request",
        "other-model": "not_found",
        "too-long": "invalid_request",
        "none-wanted": "invalid_request",
    }
    assert "128" in errors["too-long"].message
    assert "127" in errors["too-long"].message
    await world.submit("good", stream_id=2)
    assert world.detokenizer.stream(2)[1] == common.FINISH_REASON_LENGTH


async def test_a_full_queue_says_when_to_come_back(tmp_path: Path) -> None:
    world = await World.make(tmp_path, max_waiting_requests=1)
    worker = await world.join(max_num_seqs=1)
    worker.is_held = True
    for index in range(3):
        await world.submit(f"r{index}", stream_id=index + 1)
    error = world.rejections()["r2"]
    assert error.code == "overloaded"
    assert error.retry_after_s >= 1
    assert "max_waiting_requests is 1" in error.message


async def test_a_dead_workers_requests_go_on_at_another(tmp_path: Path) -> None:
    world = await World.make(tmp_path)
    first = await world.join("worker-0")
    await world.submit("r0", [9, 9], stream_id=7, stopping=common.StoppingParams(max_tokens=3))
    first.is_held = True
    await world.submit(tokens=[1, 2, 3], stopping=common.StoppingParams(max_tokens=40))
    first.wire.kill()
    await world.advance(6)
    assert world.service.not_ready_reason() == "no lanes"
    await world.join("worker-1")
    assert world.detokenizer.stream(1) == (outputs([1, 2, 3], 40), common.FINISH_REASON_LENGTH)


async def test_after_a_pause_in_which_its_worker_lost_it_the_scheduler_begins_a_lane_anew(tmp_path: Path) -> None:
    """Method: a result lies unread at the pause, so the next plan leaves before it is read that the worker has registered again."""
    world = await World.make(tmp_path)
    worker = await world.join()
    worker.is_held = True
    await world.submit(tokens=[1, 2, 3])
    world.scheduler_wire.pause()
    worker.go_on()
    await world.advance(6)
    assert not worker.peers, "the worker has lost the scheduler"
    world.scheduler_wire.go_on()
    await world.advance(1)
    assert world.service.load().num_lanes == 1
    # The router had lost the scheduler, too, and submits again.
    await world.submit(tokens=[1, 2, 3], stream_id=2)
    assert world.detokenizer.stream(2) == (outputs([1, 2, 3], 8), common.FINISH_REASON_LENGTH)
    assert not any(lane.in_flight for lane in world.service.core.lanes)


async def test_a_worker_that_forgot_a_sequence_gets_it_again(tmp_path: Path) -> None:
    world = await World.make(tmp_path)
    worker = await world.join()
    worker.fail_next = scheduler.ROW_ERROR_UNKNOWN_SLOT
    await world.submit(tokens=[1, 2, 3])
    assert len([new for plan in worker.bodies("step_plan") for new in plan.new_sequences]) == 2
    assert world.detokenizer.stream(1) == (outputs([1, 2, 3], 8), common.FINISH_REASON_LENGTH)


async def test_a_constraint_reaches_every_worker_that_gets_the_sequence(tmp_path: Path) -> None:
    world = await World.make(tmp_path)
    first = await world.join("worker-0")
    first.is_held = True
    regex = common.Constraint(kind=common.CONSTRAINT_KIND_REGEX, source="[0-9]+")
    tokens = [1, 2, 3, *outputs([1, 2, 3], 2).values()]
    await world.submit(tokens=tokens, num_output_tokens=2, constraint=regex, stopping=common.StoppingParams(max_tokens=9))
    first.fail_next = scheduler.ROW_ERROR_UNKNOWN_SLOT
    first.go_on()
    await world.settle()
    entered = [new for plan in first.bodies("step_plan") for new in plan.new_sequences]
    assert [new.constrained.constraint for new in entered] == [regex, regex]
    assert [new.constrained.num_output_tokens for new in entered] == [2, 2]
    assert world.detokenizer.stream(1)[1] == common.FINISH_REASON_LENGTH


async def test_a_failed_row_ends_its_request_alone(tmp_path: Path) -> None:
    world = await World.make(tmp_path)
    worker = await world.join()
    worker.is_held = True
    await world.submit("r1", stream_id=1)
    await world.submit("r2", [7, 7], stream_id=2)
    worker.fail_next = scheduler.ROW_ERROR_NON_FINITE_LOGITS
    worker.go_on()
    await world.settle()
    assert world.rejections().keys() == {"r1"}
    assert world.rejections()["r1"].code == "request_failed"
    assert "NaN" in world.rejections()["r1"].message
    assert world.detokenizer.stream(1) == ({}, 0)
    assert world.detokenizer.stream(2) == (outputs([7, 7], 8), common.FINISH_REASON_LENGTH)
    assert not worker.fake.held


async def test_results_for_other_steps_are_counted_and_ignored(tmp_path: Path) -> None:
    world = await World.make(tmp_path)
    worker = await world.join()
    peer = next(iter(worker.peers.values()))
    peer.send("step_result", scheduler.StepResult(step_id=77, slots=[1], token_ids=[1]))
    await world.settle()
    await world.submit()
    assert world.detokenizer.stream(1)[1] == common.FINISH_REASON_LENGTH
    await world.advance(1)
    world.service.load()
    assert world.context.registry.get_sample_value("headrace_scheduler_ignored_results_total") == 1


async def test_tokens_for_a_full_detokenizer_are_kept_and_sent_in_order(tmp_path: Path) -> None:
    world = await World.make(tmp_path)
    await world.join()
    await world.submit("r0", stream_id=9)
    world.network.full_towards.add("detokenizer-0")
    await world.submit(tokens=[1, 2, 3])
    assert world.service.core.num_requests == 0
    assert world.detokenizer.stream(1) == ({}, 0)
    world.network.full_towards.clear()
    await world.advance(1)
    assert world.detokenizer.stream(1) == (outputs([1, 2, 3], 8), common.FINISH_REASON_LENGTH)
    assert world.service.core.outbox.num_kept == 0


async def test_a_redirected_stream_goes_on_at_another_detokenizer(tmp_path: Path) -> None:
    world = await World.make(tmp_path)
    worker = await world.join()
    await world.submit("r0", stream_id=9)
    other = DetokenizerEnd(world.network.wire("detokenizer", "detokenizer-1"), "fake://detokenizer-1")
    await world.submit(tokens=[1, 2, 3], stopping=common.StoppingParams(max_tokens=20), detokenizer=world.detokenizer.target)
    expected = outputs([1, 2, 3], 20)
    worker.is_held = True
    await world.submit("r2", [4, 4], stream_id=2, stopping=common.StoppingParams(max_tokens=20))
    world.detokenizer.wire.kill()
    redirect = scheduler.Redirect(request_id="r2", detokenizer=other.target, from_position=0)
    world.scheduler_peer().send("redirect", redirect)
    worker.go_on()
    await world.settle()
    assert world.detokenizer.stream(1)[0] == expected
    assert other.stream(2) == (outputs([4, 4], 20), common.FINISH_REASON_LENGTH)


async def test_a_redirect_of_a_forgotten_request_is_answered(tmp_path: Path) -> None:
    world = await World.make(tmp_path)
    await world.join()
    await world.submit()
    redirect = scheduler.Redirect(request_id="r1", detokenizer=world.detokenizer.target, from_position=0)
    world.scheduler_peer().send("redirect", redirect)
    await world.settle()
    assert world.rejections()["r1"].code == "replica_dead"


async def test_a_stop_string_ends_the_sequence_without_further_tokens(tmp_path: Path) -> None:
    world = await World.make(tmp_path)
    worker = await world.join()
    await world.submit("r0", stream_id=9)
    worker.is_held = True
    await world.submit()
    scheduler_at_detokenizer = next(iter(world.detokenizer.peers.values()))
    scheduler_at_detokenizer.send("stop", scheduler.Stop(stream_ids=[1, 12345]))
    await world.settle()
    worker.go_on()
    await world.settle()
    assert world.detokenizer.stream(1) == ({}, 0)
    assert not worker.fake.held
    assert world.service.core.num_requests == 0


async def test_a_lost_routers_requests_are_freed(tmp_path: Path) -> None:
    world = await World.make(tmp_path)
    worker = await world.join()
    worker.is_held = True
    await world.submit()
    world.router_wire.kill()
    await world.advance(6)
    worker.go_on()
    await world.settle()
    assert world.service.core.num_requests == 0
    assert not worker.fake.held


async def test_abort_frees_within_one_step(tmp_path: Path) -> None:
    world = await World.make(tmp_path)
    worker = await world.join()
    worker.is_held = True
    await world.submit()
    world.scheduler_peer().send("abort", scheduler.Abort(request_ids=["r1", "unknown"]))
    await world.settle()
    assert world.service.load().num_free_pages == world.service.load().num_total_pages
    worker.go_on()
    await world.settle()
    assert not worker.fake.held
    assert not world.rejections()


async def test_a_deadline_ends_a_waiting_and_a_running_request(tmp_path: Path) -> None:
    for timeout_s in GROWING_S:
        world = await World.make(tmp_path)
        worker = await world.join(max_num_seqs=1)
        worker.is_held = True
        deadline_unix_ns = time.time_ns() + int(timeout_s * 1e9)
        await world.submit("running", stream_id=1, deadline_unix_ns=deadline_unix_ns)
        await world.submit("waiting", stream_id=2, deadline_unix_ns=deadline_unix_ns)
        await until(world, lambda there=world: len(there.rejections()) == 2)  # type: ignore[misc]
        assert {error.code for error in world.rejections().values()} == {"deadline_exceeded"}
        if "waiting queue" in world.rejections()["waiting"].message:
            break
    assert "waiting queue" in world.rejections()["waiting"].message
    await world.submit("late", stream_id=3, deadline_unix_ns=time.time_ns() - 1)
    assert world.rejections()["late"].code == "deadline_exceeded"


async def test_a_rejection_that_finds_a_full_queue_is_told_later(tmp_path: Path) -> None:
    world = await World.make(tmp_path)
    await world.join()
    world.network.full_towards.add("router-0")
    await world.submit(tokens=[])
    await world.submit("r2", tokens=[])
    assert not world.rejections()
    world.network.full_towards.clear()
    await world.advance(1)
    assert world.rejections().keys() == {"r1", "r2"}


async def test_plans_that_find_a_full_queue_go_later_and_in_order(tmp_path: Path) -> None:
    world = await World.make(tmp_path)
    worker = await world.join()
    world.network.full_towards.add("worker-0")
    await world.submit(tokens=[1, 2, 3])
    assert not worker.bodies("step_plan")
    world.network.full_towards.clear()
    await world.advance(1)
    assert world.detokenizer.stream(1) == (outputs([1, 2, 3], 8), common.FINISH_REASON_LENGTH)


async def test_a_worker_without_a_page_pool_or_with_another_model_is_no_lane(tmp_path: Path) -> None:
    world = await World.make(tmp_path)
    refused = [await world.join("worker-0", pool="sliding")]
    assert world.service.not_ready_reason() == "no lanes"
    await world.join("worker-1")
    refused += [
        await world.join("worker-2", model=common.ModelInfo(name="other", max_model_len=64)),
        await world.join("worker-3", work_kinds=[]),
    ]
    assert world.service.load().num_lanes == 1
    assert all(worker.back.refused_reason and not worker.peers for worker in refused)
    assert "'other'" in refused[1].back.refused_reason and "'tiny'" in refused[1].back.refused_reason


async def test_a_worker_with_another_model_is_taken_when_the_last_lane_has_left(tmp_path: Path) -> None:
    world = await World.make(tmp_path)
    old = [await world.join("worker-0"), await world.join("worker-1")]
    new = await world.join("worker-2", model=common.ModelInfo(name="new", max_model_len=128))
    for worker in old:
        assert not new.peers
        await worker.wire.close()
        await world.advance(1.5)
    assert world.service.load().num_lanes == 1
    assert [model.name for model in world.scheduler_peer().models] == ["new"]
    await world.submit(tokens=[1, 2, 3], model="new")
    assert world.detokenizer.stream(1) == (outputs([1, 2, 3], 8), common.FINISH_REASON_LENGTH)


async def test_a_draining_worker_gets_no_new_sequences(tmp_path: Path) -> None:
    world = await World.make(tmp_path)
    first = await world.join("worker-0")
    peer = next(iter(first.peers.values()))
    peer.send("drain", control.Drain())
    second = await world.join("worker-1")
    await world.submit()
    assert not first.bodies("step_plan")
    assert second.bodies("step_plan")


async def test_drain_waits_for_open_requests_and_sends_new_ones_elsewhere(tmp_path: Path) -> None:
    world = await World.make(tmp_path)
    worker = await world.join()
    worker.is_held = True
    await world.submit()
    draining = asyncio.ensure_future(world.service.drain())
    await world.settle()
    assert world.scheduler_peer().is_draining
    await world.submit("r2", stream_id=2)
    assert world.rejections()["r2"].code == "replica_dead"
    assert not draining.done()
    worker.go_on()
    await world.settle()
    await draining
    assert world.detokenizer.stream(1)[1] == common.FINISH_REASON_LENGTH
    await world.service.stop()


async def test_spans_cover_the_link_the_queue_and_the_run(tmp_path: Path) -> None:
    tracer, exporter = memory_tracer()
    world = await World.make(tmp_path, tracer=tracer)
    worker = await world.join()
    await world.submit(traceparent=TRACEPARENT)
    spans = {span.name: span for span in exporter.get_finished_spans()}
    assert set(spans) == {"queue router-scheduler", "scheduler.queue", "scheduler.run"}
    run = spans["scheduler.run"]
    assert f"{run.context.span_id:016x}" in worker.bodies("step_plan")[0].new_sequences[0].work.traceparent
    assert run.attributes["gen_ai.usage.output_tokens"] == 8
    assert spans["scheduler.queue"].end_time <= run.start_time


async def test_metrics_follow_the_core(tmp_path: Path) -> None:
    world = await World.make(tmp_path)
    # Two sequences of 3 + 30 tokens need 16 pages in the end.
    await world.join(num_pages=12)
    for index in range(2):
        await world.submit(f"r{index}", stream_id=index + 1, stopping=common.StoppingParams(max_tokens=30))
    world.service.load()
    sample = world.context.registry.get_sample_value
    assert sample("headrace_scheduler_sequences", {"state": "running"}) == 0
    assert sample("headrace_kv_pages", {"state": "running"}) == 0
    assert sample("headrace_kv_pages", {"state": "free"}) + sample("headrace_kv_pages", {"state": "cached"}) == 12
    assert sample("headrace_kv_pages", {"state": "cached"}) > 0
    assert sample("headrace_kv_cache_usage_ratio") == 0
    assert sample("headrace_scheduler_steps_total") == world.service.core.counts.num_steps
    assert sample("headrace_scheduler_queue_wait_seconds_count") == 2
    assert sample("headrace_step_duration_seconds_count") == world.service.core.counts.num_steps
    assert world.service.progress().num_steps >= world.service.core.counts.num_steps


async def test_prompts_beside_decodes_are_cut_to_the_time_that_is_set(tmp_path: Path) -> None:
    num_rows = {}
    for target_s in (0, 0.004):
        world = await World.make(tmp_path, mixed_step_target_s=target_s, run_ahead=False)
        worker = await world.join()
        worker.is_held, worker.token_ns = True, 1_000_000
        await world.submit("short", stream_id=1, stopping=common.StoppingParams(max_tokens=40))
        await world.submit("long", [7] * 100, stream_id=2)
        worker.go_on()
        await until(world, lambda core=world.service.core: core.num_requests == 0)  # type: ignore[misc]
        assert world.detokenizer.stream(2) == (outputs([7] * 100, 8), common.FINISH_REASON_LENGTH)
        num_rows[target_s] = [list(plan.row_num_new_tokens) for plan in worker.bodies("step_plan") if plan.row_num_new_tokens]
        world.service.load()
        sample = world.context.registry.get_sample_value
        num_limited = sample("headrace_scheduler_limited_steps_total")
        assert num_limited == sum(row == [1, 4] for row in num_rows[target_s][:-1])
        assert sample("headrace_scheduler_limited_step_prompt_tokens_total") == 4 * num_limited
    assert [1, 15] in num_rows[0]
    assert [1, 4] not in num_rows[0]
    # As before until three such steps have told what they cost.
    assert [row for row in num_rows[0.004] if row[0] == 1][3:5] == [[1, 4], [1, 4]]


async def test_what_is_due_within_a_timers_grain_is_due_now(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Goal: the loop's timers count milliseconds, and a wait for less is not spent looking again and again."""
    world = await World.make(tmp_path)
    worker = await world.join()
    worker.is_held = True
    due_in_ns = 10 * TIMER_EARLY_NS
    monkeypatch.setattr(StepPacer, "next_plan_in_ns", lambda pacer, now_ns: due_in_ns if pacer.num_under_way else 0)
    await world.submit(tokens=[1] * 16)
    (site,) = world.service._workers.sites.values()
    assert len(worker.bodies("step_plan")) == 1
    assert site.timer is not None
    due_in_ns = TIMER_EARLY_NS
    world.service.wake()
    await world.settle()
    assert len(worker.bodies("step_plan")) == 2
    assert site.timer is None


async def test_the_link_to_an_idle_detokenizer_is_dropped(tmp_path: Path) -> None:
    world = await World.make(tmp_path, detokenizer_idle_s=1000)
    await world.join()
    await world.submit()
    await world.advance(1)
    assert world.detokenizer.peers
    world.service._detokenizers._idle_ns = 0
    await world.advance(1)
    assert not world.detokenizer.peers
    await world.submit("r2", stream_id=2)
    assert world.detokenizer.stream(2)[1] == common.FINISH_REASON_LENGTH


async def test_workers_of_one_group_step_together_and_put_prefills_off(tmp_path: Path) -> None:
    world = await World.make(tmp_path, prefill_delay_passes_max=4)
    first = await world.join("worker-0", lane_group="g")
    second = await world.join("worker-1", lane_group="g")
    for worker in (first, second):
        worker.is_held = True
    await world.submit("a", tokens=[5, 6, 7], stream_id=1, stopping=common.StoppingParams(max_tokens=20))
    await world.submit("b", tokens=[8, 9], stream_id=2, stopping=common.StoppingParams(max_tokens=20))
    await world.submit("c", tokens=[3, 4], stream_id=3)
    for _ in range(200):
        for worker in (first, second):
            worker.go_on()
            worker.is_held = True
        await world.settle()
        if not world.service.core.num_requests:
            break
    assert world.detokenizer.stream(1) == (outputs([5, 6, 7], 20), common.FINISH_REASON_LENGTH)
    assert world.detokenizer.stream(2) == (outputs([8, 9], 20), common.FINISH_REASON_LENGTH)
    assert world.detokenizer.stream(3) == (outputs([3, 4], 8), common.FINISH_REASON_LENGTH)
    world.service.load()
    sample = world.context.registry.get_sample_value
    labels = {"input_estimation": "mixed", "output_allow": "false", "output_reason": "delay", "actual_execution": "false"}
    assert (sample("headrace_prefill_delayer_outcomes_total", labels) or 0) > 0
    assert (sample("headrace_prefill_delayer_wait_passes_sum") or 0) > 0
    assert (sample("headrace_prefill_delayer_wait_seconds_sum") or 0) > 0

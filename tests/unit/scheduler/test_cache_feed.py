"""The scheduler tells routers what its lanes have cached, and flushes when it is asked to."""

from __future__ import annotations

from pathlib import Path

from headrace.v1 import router_pb2 as router
from headrace.v1 import scheduler_pb2 as scheduler
from services.router import messages as router_messages
from services.router.prefix_directory import CachePrompt, PrefixDirectory
from services.scheduler.cache_feed import CacheFeed
from tests.unit.scheduler import builders
from tests.unit.scheduler.network import WorkerEnd, World
from tests.unit.scheduler.system import System

PROMPT = list(range(1, 21))


class Follower:
    """A router's view, from all that has come."""

    def __init__(self, world: World) -> None:
        self._world = world
        self._num_seen = 0
        self.known = PrefixDirectory()

    def num_cached(self, prompt: list[int]) -> int:
        events = self._world.router.bodies("cache_events")
        for body in events[self._num_seen :]:
            assert self.known.update(1, router_messages.lane_news(body)), "a gap in the numbers"
        self._num_seen = len(events)
        tokens = b"".join(token.to_bytes(4, "little") for token in prompt)
        return self.known.num_cached_tokens(1, CachePrompt(tokens))


async def followed(tmp_path: Path) -> tuple[World, WorkerEnd, Follower]:
    """A follower that knows of a worker's cache with the prompt in it."""
    world = await World.make(tmp_path)
    worker = await world.join()
    follower = Follower(world)
    world.scheduler_peer().send("subscribe_cache", scheduler.SubscribeCache())
    await world.submit("r", PROMPT)
    assert follower.num_cached([*PROMPT, 3]) == 20
    return world, worker, follower


async def test_a_subscriber_gets_a_snapshot_and_then_every_change(tmp_path: Path) -> None:
    world = await World.make(tmp_path)
    await world.join()
    await world.submit("before", PROMPT)
    assert not world.router.bodies("cache_events"), "nobody has asked"
    follower = Follower(world)
    world.scheduler_peer().send("subscribe_cache", scheduler.SubscribeCache())
    await world.settle()
    assert follower.num_cached([*PROMPT, 3]) == 20
    other = [30 + token for token in PROMPT[:16]]
    await world.submit("after", other, stream_id=2)
    assert follower.num_cached([*other, 3]) == 16
    assert len(world.router.bodies("cache_events")) < 8, "one message a lane and wake at most"
    world.scheduler_peer().send("flush_cache", scheduler.FlushCache(call_id="c"))
    await world.settle()
    (answer,) = world.router.bodies("cache_flushed")
    # 27 and 23 tokens were computed, pages have 4.
    assert answer == router.CacheFlushed(call_id="c", num_pages=6 + 5)
    assert follower.num_cached([*PROMPT, 3]) == 0
    await world.submit("again", PROMPT, stream_id=3)
    assert world.detokenizer.bodies("token_batch")[-1].num_cached_tokens == []
    assert follower.num_cached([*PROMPT, 3]) == 20


async def test_a_lane_that_is_gone_is_forgotten_and_a_new_one_is_told(tmp_path: Path) -> None:
    world, worker, follower = await followed(tmp_path)
    worker.wire.kill()
    await world.advance(6)
    await world.join("worker-1")
    assert follower.num_cached([*PROMPT, 3]) == 0
    await world.submit("again", PROMPT, stream_id=2)
    assert follower.num_cached([*PROMPT, 3]) == 20


async def test_news_that_a_full_queue_refused_come_with_a_heartbeat(tmp_path: Path) -> None:
    world, worker, follower = await followed(tmp_path)
    world.network.full_towards.add("router-0")
    await worker.wire.close()
    await world.settle()
    assert world.service.load().num_lanes == 0
    assert follower.num_cached([*PROMPT, 3]) == 20
    world.network.full_towards.clear()
    await world.advance(2)
    assert follower.num_cached([*PROMPT, 3]) == 0
    num_told = len(world.router.bodies("cache_events"))
    await world.advance(2)
    assert len(world.router.bodies("cache_events")) == num_told, "once is enough"


def test_who_missed_something_gets_a_snapshot_and_the_others_the_events() -> None:
    system = System(builders.scheduler())
    site = system.join(builders.capacity(max_num_batched_tokens=64))
    feed = CacheFeed(system.core.lanes)
    assert list(feed.collect()) == []
    feed.subscribe(1)
    feed.subscribe(2)
    assert [(owner, news.is_snapshot) for owner, news in feed.collect()] == [(1, True), (2, True)]
    system.submit(builders.sequence(system.core, "a", PROMPT))
    system.run()
    feed.missed(1, site.lane.lane_id)
    first, second = [news for _, news in feed.collect()]
    assert (first.is_snapshot, second.is_snapshot) == (True, False)
    # A snapshot is several events, each of blocks that follow one another.
    hashes = [{one for event in news.events for one in event.hashes} for news in (first, second)]
    assert hashes[0] == hashes[1]
    assert first.first_number == second.first_number + len(second.events)
    assert list(feed.collect()) == []
    feed.unsubscribe(1)
    assert site.lane.kv.tree.log is not None
    feed.unsubscribe(2)
    assert site.lane.kv.tree.log is None


def test_a_lane_that_is_gone_stays_due_when_somebody_subscribes_again() -> None:
    system = System(builders.scheduler())
    lane = system.join(builders.capacity()).lane
    feed = CacheFeed(system.core.lanes)
    feed.subscribe(1)
    assert [owner for owner, _ in feed.collect()] == [1]
    system.core.lane_lost(lane.lane_id, 0)
    (told,) = feed.collect()
    feed.missed(1, lane.lane_id)
    feed.subscribe(1)
    assert list(feed.collect()) == [told]
    assert list(feed.collect()) == []

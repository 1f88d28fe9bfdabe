"""A real router before two real schedulers with workers on paper: requests go where their prompts are cached."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from pathlib import Path

import pytest

from headrace.service import ServiceContext
from headrace.v1 import common_pb2 as common
from headrace.wire.fake import FakeNetwork
from services.scheduler.config import Settings as SchedulerSettings
from services.scheduler.service import SchedulerService
from tests.integration.router.test_router_service import ADDRESS, Answer, System
from tests.patience import WAIT_S
from tests.unit.scheduler.network import DetokenizerEnd, WorkerEnd, capacity


class Site:
    """A scheduler and its worker."""

    def __init__(self, network: FakeNetwork, name: str, directory: Path) -> None:
        self._network, self._name, self._directory = network, name, directory
        self._address = f"fake://{name}"

    async def start(self) -> None:
        """The scheduler dials the router, the worker the scheduler."""
        wire = self._network.wire("scheduler", self._name)
        context = ServiceContext.for_test("scheduler", wire, run_directory=self._directory)
        context.bind_address = lambda backplane: self._address  # type: ignore[method-assign]
        context.dial_targets = lambda backplane: [ADDRESS]  # type: ignore[method-assign]
        self.service = SchedulerService(context, SchedulerSettings())
        await self.service.start()
        model = common.ModelInfo(name="m", max_model_len=128, loaded_unix_s=7)
        self.worker = WorkerEnd(
            self._network.wire("worker", f"{self._name}-worker"), self._address, capacity(page_size=1, model=model)
        )

    @property
    def num_prompts(self) -> int:
        """Sequences its worker was given."""
        return sum(len(plan.new_sequences) for plan in self.worker.bodies("step_plan"))

    @property
    def num_cached(self) -> int:
        """Tokens of them that it had already."""
        return sum(new.num_cached_tokens for plan in self.worker.bodies("step_plan") for new in plan.new_sequences)


class Cluster:
    """All of it, in one event loop."""

    def __init__(self, directory: Path, *, cache_aware: bool) -> None:
        self.router = System(directory, cache_aware=cache_aware)
        self.sites = [Site(self.router.network, f"scheduler-{index}", directory) for index in range(2)]

    async def start(self) -> None:
        """The services, and scripted tokenizer and detokenizer between them."""
        await self.router.service.start()
        self.router.start("tokenizer", "tokenizer-0")
        detokenizer = self.router.start("detokenizer", "detokenizer-0")
        DetokenizerEnd(detokenizer.wire, "fake://detokenizer-0")
        for site in self.sites:
            await site.start()
        await self.settle(2)
        assert all(site.service.load().num_lanes == 1 for site in self.sites)

    async def settle(self, seconds: float = 1.0) -> None:
        """Let everything that is on its way arrive, and heartbeats after it."""
        for _ in range(20):
            self.router.network.advance(seconds / 20)
            await asyncio.sleep(0.005)

    async def ask(self) -> int:
        """Ask for the prompt, always the same, and hang up once a worker has it. Gives the site."""
        before = [site.num_prompts for site in self.sites]
        answer = Answer(self.router)
        await self.router.until(lambda: [site.num_prompts for site in self.sites] != before)
        await self.settle()
        answer.task.cancel()
        await self.router.until(lambda: not any(site.service.core.num_requests for site in self.sites))
        await self.settle()
        (chosen,) = [index for index, site in enumerate(self.sites) if site.num_prompts != before[index]]
        return chosen

    async def stop(self) -> None:
        """End the services."""
        for site in self.sites:
            await site.service.stop()
        await asyncio.wait_for(self.router.service.stop(), WAIT_S)


@pytest.fixture
async def cluster(request: pytest.FixtureRequest, tmp_path: Path) -> AsyncIterator[Cluster]:
    cluster = Cluster(tmp_path, cache_aware=request.param)
    await cluster.start()
    yield cluster
    await cluster.stop()


@pytest.mark.parametrize("cluster", [True], indirect=True)
async def test_a_prompt_goes_where_it_is_cached_until_the_caches_are_flushed(cluster: Cluster) -> None:
    chosen = await cluster.ask()
    site = cluster.sites[chosen]
    assert [await cluster.ask() for _ in range(8)] == [chosen] * 8
    # Of three tokens the last is always computed.
    assert site.num_cached == 8 * 2
    for lane in site.service.core.lanes:
        lane.kv.flush()
    await cluster.settle()
    # It was given nine requests and the other none.
    assert [await cluster.ask() for _ in range(3)] == [1 - chosen] * 3


@pytest.mark.parametrize("cluster", [False], indirect=True)
async def test_without_regard_for_caches_they_take_turns(cluster: Cluster) -> None:
    first = await cluster.ask()
    assert [await cluster.ask() for _ in range(3)] == [1 - first, first, 1 - first]

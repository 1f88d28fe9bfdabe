"""Two tenants, one with many times the load, are served alike: five processes, over HTTP, with a mock worker for the volume."""

from __future__ import annotations

import asyncio
from pathlib import Path

import openai
import pytest

from tests.e2e.server import Server
from tests.patience import WAIT_S

pytestmark = pytest.mark.slow

MODEL = "smollm2-135m-instruct"
NUM_OPEN = {"few": 12, "many": 60}
"""Four are computed at a time: one of the few that comes late still finds others of its tenant waiting."""
NUM_ANSWERS = 200


async def served(server: Server) -> dict[str, int]:
    """Tokens served to each tenant, input once and output twice, while both had work. One is known by its key, one by `user`."""
    counts = dict.fromkeys(NUM_OPEN, 0)
    clients = {
        name: openai.AsyncOpenAI(base_url=f"{server.http}/v1", api_key=f"key of {name}", max_retries=0, timeout=WAIT_S)
        for name in NUM_OPEN
    }
    num_answers = 0
    answered: set[str] = set()

    async def keep_asking(name: str) -> None:
        nonlocal num_answers
        extra = {"user": name} if name == "many" else {}
        while num_answers < NUM_ANSWERS:
            answer = await clients[name].completions.create(
                model=MODEL, prompt="Some words to begin with", max_tokens=16, extra_body={"ignore_eos": True, **extra}
            )
            assert answer.usage is not None
            answered.add(name)
            # Before both had work nobody could be served alike.
            if len(answered) == len(NUM_OPEN) and num_answers < NUM_ANSWERS:
                num_answers += 1
                counts[name] += answer.usage.prompt_tokens + 2 * answer.usage.completion_tokens

    await asyncio.gather(*(keep_asking(name) for name, num_open in NUM_OPEN.items() for _ in range(num_open)))
    for client in clients.values():
        await client.close()
    return counts


@pytest.mark.parametrize("policy", ["fair", "fcfs"])
async def test_tenants_are_served_alike_whatever_they_send(policy: str, default_model_directory: Path, model_store: Path) -> None:
    with Server(
        model_store,
        scheduler_policy=policy,
        worker_runner="mock",
        worker_max_num_seqs="4",
        worker_mock_step_s="0.01",
    ) as server:
        counts = await served(server)
    print(f"\n{policy}: {counts}")
    apart = abs(counts["many"] - counts["few"]) / max(counts.values())
    if policy == "fair":
        assert apart < 0.1
    else:
        assert apart > 0.5, "the load is no test of fairness: first come first served is fair, too"

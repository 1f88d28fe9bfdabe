"""Goal: the weights outlive the scheduler. Method: the whole tree with the mock runner; its scheduler gets SIGKILL under load.

The mock needs a model directory for its sizes and the tokenizer, but no torch: what is tested here is the link and the lives.
"""

from __future__ import annotations

import threading
from collections.abc import Iterator
from pathlib import Path

import openai
import pytest

from tests.e2e.process_tree import kill, wait_until
from tests.e2e.server import Server
from tests.patience import WAIT_S

pytestmark = pytest.mark.slow

MODEL = "smollm2-135m-instruct"
NUM_STREAMS = 4


@pytest.fixture(scope="module")
def tree(default_model_directory: Path, model_store: Path) -> Iterator[Server]:
    # Steps of 20 ms: at every moment there are plans under way and results on the way back.
    with Server(model_store, worker_runner="mock", worker_mock_step_s="0.02", supervision_crash_loop_restarts="100") as server:
        yield server


def client(server: Server) -> openai.OpenAI:
    return openai.OpenAI(base_url=f"{server.http}/v1", api_key="none", max_retries=0, timeout=WAIT_S)


def is_answered(server: Server) -> bool:
    try:
        answer = client(server).completions.create(model=MODEL, prompt="Hi", max_tokens=2, extra_body={"ignore_eos": True})
    except openai.OpenAIError:
        return False
    return answer.usage is not None and answer.usage.completion_tokens == 2


@pytest.mark.parametrize("kill_number", range(3))
def test_rank_outlives_schedulers_killed_with_plans_under_way(tree: Server, kill_number: int) -> None:
    wait_until(lambda: is_answered(tree), WAIT_S, "serving before the kill")
    rank, scheduler = tree.pid_of("services.worker.rank"), tree.pid_of("services.scheduler")
    num_tokens = [0] * NUM_STREAMS

    def stream(index: int) -> None:
        pieces = client(tree).completions.create(
            model=MODEL, prompt=f"{index}", max_tokens=150, stream=True, extra_body={"ignore_eos": True}
        )
        for _ in pieces:
            num_tokens[index] += 1

    threads = [threading.Thread(target=stream, args=(index,)) for index in range(NUM_STREAMS)]
    for thread in threads:
        thread.start()
    wait_until(lambda: min(num_tokens) > 3, WAIT_S, "tokens on every stream")
    kill(scheduler)
    wait_until(lambda: is_answered(tree), WAIT_S, "serving after the kill")
    for thread in threads:
        thread.join(WAIT_S)
    assert not any(thread.is_alive() for thread in threads)
    assert tree.pid_of("services.scheduler") != scheduler
    assert tree.pid_of("services.worker.rank") == rank

"""A small HTTP server over OpenVINO GenAI's continuous batching pipeline, which has none of its own that pip installs.

    python bench/peers/openvino_server.py MODEL_DIRECTORY --port 8000 --threads 2 --cache-gib 1

Runs in OpenVINO's own environment (openvino-genai, tokenizers, aiohttp) and imports nothing of this project. `POST /v1/completions`
streams as OpenAI's does; `POST /in_process` plays a list of requests without HTTP in the loop, so that what HTTP costs can be told
apart.

A step of the pipeline holds Python's interpreter lock from start to end, so a thread for it gains nothing and makes text arrive in
lumps. Instead the event loop itself steps while requests are open, and looks after its sockets between two steps.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import openvino as ov
import openvino_genai as genai
from aiohttp import web
from tokenizers import Tokenizer
from tokenizers.decoders import DecodeStream

MAX_NUM_SEQS = 32
MAX_BATCHED_TOKENS = 512
"""Best of what was tried on two cores (256, 512, 2048), and what the pipeline's documentation advises for latency."""

SOCKET_ROUNDS = 8
"""Turns of the event loop between two steps: enough to accept a connection, read a request and submit it before the next step."""

OnTokens = Callable[[list[int]], None]


@dataclass
class OpenRequest:
    """One request in the pipeline; `on_tokens` is called after every step that made some, and with `[]` at the end."""

    prompt_ids: list[int]
    max_tokens: int
    ignore_eos: bool
    on_tokens: OnTokens
    handle: Any = None
    num_read: int = 0
    is_cancelled: bool = False


@dataclass
class TimedRun:
    """One request of an in-process run: when it was sent, when each token was there, monotonic nanoseconds."""

    started_ns: int
    token_times_ns: list[int] = field(default_factory=list)


class Engine:
    """The pipeline and the task that steps it."""

    def __init__(self, model: Path, *, threads: int, cache_gib: int) -> None:
        scheduler = genai.SchedulerConfig()
        scheduler.cache_size = cache_gib
        scheduler.max_num_batched_tokens = MAX_BATCHED_TOKENS
        scheduler.max_num_seqs = MAX_NUM_SEQS
        scheduler.dynamic_split_fuse = True
        scheduler.enable_prefix_caching = True
        properties = {"INFERENCE_NUM_THREADS": threads}
        self._pipeline = genai.ContinuousBatchingPipeline(str(model), scheduler, "CPU", properties)
        self._running: list[OpenRequest] = []
        self._has_work = asyncio.Event()
        self._num_submitted = 0

    def submit(self, request: OpenRequest) -> None:
        """Have a request computed."""
        self._running.append(self._begin(request))
        self._has_work.set()

    async def run(self) -> None:
        """Step while there is work; sleep while there is none."""
        while True:
            if not self._running:
                self._has_work.clear()
                await self._has_work.wait()
            self._pipeline.step()
            self._running = [request for request in self._running if not self._deliver(request)]
            for _ in range(SOCKET_ROUNDS):
                await asyncio.sleep(0)

    def _begin(self, request: OpenRequest) -> OpenRequest:
        config = genai.GenerationConfig()
        config.max_new_tokens = request.max_tokens
        config.do_sample = False
        config.ignore_eos = request.ignore_eos
        ids = ov.Tensor([request.prompt_ids])
        self._num_submitted += 1
        request.handle = self._pipeline.add_request(self._num_submitted, ids, config)
        return request

    def _deliver(self, request: OpenRequest) -> bool:
        """Pass on what a step made; whether the request has ended."""
        if request.is_cancelled:
            request.handle.cancel()
        tokens: list[int] = []
        while request.handle.can_read():
            for output in request.handle.read().values():
                tokens += output.generated_ids
        if tokens:
            request.on_tokens(tokens)
        is_ended = str(request.handle.get_status().name) != "RUNNING"
        if is_ended:
            request.on_tokens([])
        return is_ended


class Server:
    """The HTTP side."""

    def __init__(self, engine: Engine, tokenizer: Tokenizer) -> None:
        self._engine = engine
        self._tokenizer = tokenizer

    def application(self) -> web.Application:
        """The routes."""
        application = web.Application(client_max_size=64 << 20)
        application.on_startup.append(self.start)
        application.router.add_get("/health", self._health)
        application.router.add_post("/v1/completions", self._completions)
        application.router.add_post("/in_process", self._in_process)
        return application

    async def start(self, _: web.Application) -> None:
        """Let the pipeline step in this event loop."""
        self._stepping = asyncio.create_task(self._engine.run())

    async def _health(self, _: web.Request) -> web.Response:
        return web.Response(text="ok")

    async def _completions(self, request: web.Request) -> web.StreamResponse:
        body = json.loads(await request.read())
        arrived, opened = self._open(body)
        decoder = DecodeStream(skip_special_tokens=True)
        response = web.StreamResponse(headers={"content-type": "text/event-stream"})
        num_tokens = 0
        try:
            await response.prepare(request)
            while tokens := await arrived.get():
                num_tokens += len(tokens)
                pieces = [decoder.step(self._tokenizer, token) for token in tokens]
                await _write(response, {"choices": [{"index": 0, "text": "".join(piece or "" for piece in pieces)}]})
        finally:
            opened.is_cancelled = True
        reason = "length" if num_tokens >= body["max_tokens"] else "stop"
        await _write(response, {"choices": [{"index": 0, "text": "", "finish_reason": reason}]})
        usage = {"prompt_tokens": len(opened.prompt_ids), "completion_tokens": num_tokens}
        await _write(response, {"choices": [], "usage": usage})
        await response.write(b"data: [DONE]\n\n")
        return response

    def _open(self, body: dict[str, Any]) -> tuple[asyncio.Queue[list[int]], OpenRequest]:
        arrived: asyncio.Queue[list[int]] = asyncio.Queue()
        opened = OpenRequest(
            prompt_ids=self._tokenizer.encode(body["prompt"]).ids,
            max_tokens=body["max_tokens"],
            ignore_eos=body.get("ignore_eos", False),
            on_tokens=arrived.put_nowait,
        )
        self._engine.submit(opened)
        return arrived, opened

    async def _in_process(self, request: web.Request) -> web.Response:
        body = json.loads(await request.read())
        remaining = iter(body["requests"])
        runs: list[dict[str, Any]] = []

        async def client() -> None:
            for spec in remaining:
                run, num_prompt_tokens = await self._play(spec)
                runs.append({"index": spec["index"], "prompt_tokens": num_prompt_tokens, **asdict(run)})

        await asyncio.gather(*(client() for _ in range(body["concurrency"])))
        return web.json_response({"runs": runs})

    async def _play(self, spec: dict[str, Any]) -> tuple[TimedRun, int]:
        ended = asyncio.Event()
        run = TimedRun(started_ns=time.monotonic_ns())

        def note(tokens: list[int]) -> None:
            now_ns = time.monotonic_ns()
            run.token_times_ns += [now_ns] * len(tokens)
            if not tokens:
                ended.set()

        ids = self._tokenizer.encode(spec["prompt"]).ids
        self._engine.submit(OpenRequest(prompt_ids=ids, max_tokens=spec["max_tokens"], ignore_eos=True, on_tokens=note))
        await ended.wait()
        return run, len(ids)


async def _write(response: web.StreamResponse, chunk: dict[str, Any]) -> None:
    await response.write(b"data: " + json.dumps(chunk).encode() + b"\n\n")


def main() -> None:
    """Load the model and serve it until stopped."""
    parser = argparse.ArgumentParser(description="Serve a model by OpenVINO GenAI.")
    parser.add_argument("model", type=Path)
    parser.add_argument("--port", type=int, required=True)
    parser.add_argument("--threads", type=int, required=True)
    parser.add_argument("--cache-gib", type=int, default=1)
    options = parser.parse_args()
    engine = Engine(options.model, threads=options.threads, cache_gib=options.cache_gib)
    tokenizer = Tokenizer.from_file(str(options.model / "tokenizer.json"))
    web.run_app(Server(engine, tokenizer).application(), host="127.0.0.1", port=options.port, access_log=None)


if __name__ == "__main__":
    main()

"""The shell of rank 0: plans of the scheduler in, results out, on the main thread; computing on a thread of its own.

Plans queue towards the compute thread and are computed strictly in order; results come back through the event loop. torch lets go
of the interpreter while it computes, so the link is served meanwhile. When the scheduler is lost, every sequence is forgotten
before the next scheduler's first plan, and results still under way are dropped: they belong to a lane that no longer exists.
A result that cannot be sent says nothing of why: it waits until the queue has room again, or until the scheduler is found lost.
"""

from __future__ import annotations

import asyncio
import gc
import threading
import time
from collections import deque
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from typing import TYPE_CHECKING, Any, Final

import numpy as np
import numpy.typing as npt
import structlog

from headrace.errors import OverloadedError, ProtocolError, ReplicaDeadError
from headrace.lifecycle import LOADING, State
from headrace.models.embedding_config import EmbeddingConfig, load_embedding_config
from headrace.models.model_config import load_model_config
from headrace.service import ServiceContext
from headrace.telemetry import logs
from headrace.telemetry.metrics import WorkerMetrics
from headrace.v1.common_pb2 import EmbeddingInfo, ModelInfo
from headrace.v1.control_pb2 import Capacity, Load, PagePoolInfo, Progress, Register, Role, WorkKind
from headrace.v1.scheduler_pb2 import RowError, StepResult
from headrace.v1.worker_pb2 import StepPlan, WorkerInbox
from headrace.wire.envelope import int32_array
from headrace.wire.session import Peer
from headrace.wire.topology import SCHEDULER_BACKPLANE
from services.worker import machine
from services.worker.backend_choice import DeviceOptions
from services.worker.batch_inputs import Limits
from services.worker.compute_thread import ComputeThread, Job
from services.worker.config import HOST_KV_CACHE_BYTES, Settings
from services.worker.drafting.factory import make_speculation
from services.worker.embed_runner import EmbedRunner, MockEmbedder
from services.worker.entering import num_entering_tokens
from services.worker.grammar_compiler import GrammarCompiler, constrain
from services.worker.launcher import num_compute_threads
from services.worker.load_progress import LoadProgress
from services.worker.mock_runner import MockRunner
from services.worker.runner import POOL_NAME, Runner
from services.worker.sequence_spans import SequenceSpans
from services.worker.torch_import import import_torch

if TYPE_CHECKING:
    from pathlib import Path

    from headrace.supervision.child import Notifier
    from headrace.wire.fake import FakeBack
    from headrace.wire.link import Back
    from services.worker.loading import LoadOptions, LoadReport

log = logs.get_logger()

RESEND_INTERVAL_S: Final = 0.02
_MOCK_MODEL_LEN: Final = 8192


def progress_log(notifier: Notifier | None = None) -> Callable[[int, int], None]:
    """Give what tells how far loading is, to the log and to the supervisor; whichever thread calls it."""
    progress, lock = LoadProgress(time.monotonic()), threading.Lock()
    # Other threads know nothing of this one's context.
    bound = log.bind(**structlog.contextvars.get_contextvars())

    def tell(num_values: int, num_in_all: int) -> None:
        with lock:
            percent = progress.add(num_values, num_in_all, time.monotonic())
        if percent is not None:
            bound.info("weights.read", percent=percent)
            if notifier is not None:
                notifier.state(State.STARTING, f"{LOADING}{percent} %")

    return tell


class ResultQueue:
    """Results on their way to the scheduler.

    A full queue is a scheduler that is busy or dead. Results build its view, so none is skipped while it may live; its link will
    tell when it does not. It plans only a few steps ahead, so few are ever kept.
    """

    def __init__(self, metrics: WorkerMetrics) -> None:
        self._metrics = metrics
        self._unsent: deque[tuple[Peer, StepResult, list[bytes]]] = deque()
        self._retry: asyncio.TimerHandle | None = None

    def send(self, scheduler: Peer, result: StepResult, frames: list[bytes]) -> None:
        """Send after all before it, now or as soon as there is room."""
        self._unsent.append((scheduler, result, frames))
        if self._retry is None:
            self._send_all()

    def drop(self) -> None:
        """Give up what is unsent: its scheduler is lost."""
        if self._retry is not None:
            self._retry.cancel()
            self._retry = None
        if self._unsent:
            log.warning("results.dropped", num_results=len(self._unsent))
            self._metrics.dropped_results.inc(len(self._unsent))
            self._unsent.clear()

    def _send_all(self) -> None:
        self._retry = None
        while self._unsent:
            scheduler, result, frames = self._unsent[0]
            try:
                scheduler.send("step_result", result, frames)
            except OverloadedError:
                self._retry = asyncio.get_running_loop().call_later(RESEND_INTERVAL_S, self._send_all)
                return
            except ReplicaDeadError:
                self.drop()
                return
            self._unsent.popleft()


class WorkerService:
    """Rank 0 of a worker group: one lane of the scheduler it has joined."""

    def __init__(self, context: ServiceContext, settings: Settings) -> None:
        self._context = context
        self._settings = settings
        self._metrics = WorkerMetrics(context.registry)
        self._spans = SequenceSpans(context.tracer)
        self._compute: ComputeThread | None = None
        self._schedulers: Back | FakeBack | None = None
        self._scheduler: Peer | None = None
        self._life = 0
        self._pending: deque[Job] = deque()
        self._results = ResultQueue(self._metrics)
        self._grammars: GrammarCompiler | None = None
        self._num_steps = 0
        self._idle_counted_ns = 0
        self._last_step_unix_ns = 0
        self._model = ModelInfo()
        self._capacity = Capacity()
        self._moved = asyncio.Event()

    async def start(self) -> None:
        """Load the model, then join a scheduler while the model is tried out.

        Raises:
            ModelError: The model directory cannot be used.
            ConfigError: The settings fit neither the model nor the machine.
        """
        make_runner = self._make_mock if self._settings.runner == "mock" else self._make_model
        self._compute = ComputeThread(make_runner, on_result=self._on_result, on_error=self._on_compute_error)
        runner = await self._compute.start()
        if not gc.isenabled():
            # The process had it off while it loaded (see `rank.py`). What is here now stays: it is never searched again.
            gc.freeze()
            gc.enable()
        self._describe(runner)
        self._compute.warm_up()
        self._schedulers = self._context.wire.dial(
            SCHEDULER_BACKPLANE,
            self._context.dial_targets(SCHEDULER_BACKPLANE),
            self,
            register=self._register,
            join="fewest_lanes",
        )

    def on_peer(self, peer: Peer) -> None:
        """A scheduler took us on as a lane. It knows nothing of what is held here, so nothing may be."""
        self._begin_life(peer)
        log.info("scheduler.joined", scheduler=peer.instance)

    def on_peer_lost(self, peer: Peer, reason: str) -> None:
        """The scheduler is gone, and with it every sequence of ours; it or another one will put them in again."""
        if peer is self._scheduler:
            log.warning("peer.lost", peer=peer.instance, reason=reason)
            self._begin_life(None)

    def on_heartbeat(self, peer: Peer) -> None:
        """The scheduler's load changes nothing here."""

    def on_message(self, peer: Peer, message: WorkerInbox, frames: list[memoryview]) -> None:
        """Queue a plan for the compute thread."""
        if peer is not self._scheduler or self._compute is None:
            # The link counts what it drops; a plan of a scheduler that we left is one of those.
            raise ProtocolError(f"a plan of {peer.instance}, whose lane this worker is not")
        plan = message.step_plan
        job = Job(plan, self._token_ids(plan, frames), self._life, time.monotonic_ns())
        if self._grammars is not None:
            # Compiled while the steps before are computed, and the prompt.
            for sequence in plan.new_sequences:
                if sequence.HasField("constrained"):
                    self._grammars.want(sequence.constrained.constraint.source)
        self._pending.append(job)
        self._compute.submit(job)

    def not_ready_reason(self) -> str | None:
        """Ready while a scheduler has us as a lane."""
        if self._schedulers is None:
            return "the model is being loaded"
        return None if self._scheduler is not None else self._schedulers.refused_reason or "no scheduler has answered yet"

    def models(self) -> tuple[ModelInfo, ...]:
        """The one model."""
        return (self._model,)

    def load(self) -> Load:
        """Sequences count as running while there is a plan to compute: without one, the scheduler is who is waited for."""
        num_sequences = self._num_sequences()
        self._metrics.sequences.set(num_sequences)
        return Load(num_running=max(1, num_sequences) if self._pending else 0, num_waiting=max(0, len(self._pending) - 1))

    def progress(self) -> Progress:
        """Steps computed."""
        age_ns = time.monotonic_ns() - self._pending[0].received_ns if self._pending else 0
        return Progress(num_steps=self._num_steps, last_step_unix_ns=self._last_step_unix_ns, oldest_waiting_age_ns=age_ns)

    def health(self) -> dict[str, Any]:
        """What this lane is and holds."""
        return {
            "model": self._model.name,
            "scheduler": self._scheduler.instance if self._scheduler is not None else "",
            "num_sequences": self._num_sequences(),
        }

    async def drain(self) -> None:
        """Take no new sequence and wait until the scheduler has freed the last one."""
        if self._schedulers is not None:
            self._schedulers.announce_drain()
        while self._scheduler is not None and (self._pending or self._num_sequences()):
            self._moved.clear()
            await self._moved.wait()

    async def stop(self) -> None:
        """End the compute thread; what is still held is given up."""
        self._spans.end_all(now_unix_ns=time.time_ns())
        self._results.drop()
        if self._grammars is not None:
            self._grammars.stop()
        if self._compute is not None:
            await self._compute.stop()

    def _num_sequences(self) -> int:
        runner = self._compute.runner if self._compute is not None else None
        return runner.num_sequences if runner is not None else 0

    def _register(self) -> Register:
        return Register(role=Role.ROLE_WORKER, instance=self._context.instance, models=self.models(), capacity=self._capacity)

    def _begin_life(self, scheduler: Peer | None) -> None:
        self._scheduler = scheduler
        self._life += 1
        self._pending.clear()
        self._results.drop()
        self._moved.set()
        self._spans.end_all(now_unix_ns=time.time_ns())
        if self._compute is not None:
            self._compute.reset()

    def _token_ids(self, plan: StepPlan, frames: list[memoryview]) -> npt.NDArray[np.int32] | None:
        if not plan.new_sequences:
            return None
        try:
            return int32_array(frames[0] if frames else None, count=num_entering_tokens(plan))
        except ProtocolError as error:
            # Plans build on one another: with one lost, no later one can be computed truthfully.
            self._context.fail(error)
            raise

    def _on_result(self, job: Job, result: StepResult, frames: list[bytes]) -> None:
        if job.life != self._life or self._scheduler is None:
            self._metrics.dropped_results.inc()
            return
        self._pending.popleft()
        self._moved.set()
        self._num_steps += 1
        self._last_step_unix_ns = result.finished_unix_ns
        self._results.send(self._scheduler, result, frames)
        self._spans.on_plan(job.plan, now_unix_ns=result.started_unix_ns)
        self._spans.on_result(result)
        if result.vector_size:
            self._spans.on_vectors(result)
        self._count(job.plan, result)

    def _count(self, plan: StepPlan, result: StepResult) -> None:
        assert self._compute is not None
        idle_ns = self._compute.idle_ns
        self._metrics.idle.inc((idle_ns - self._idle_counted_ns) / 1e9)
        self._idle_counted_ns = idle_ns
        self._metrics.steps.inc()
        self._metrics.step_duration.observe((result.finished_unix_ns - result.started_unix_ns) / 1e9)
        counts = plan.row_num_new_tokens
        num_decode = sum(1 for count in counts if count == 1) if counts else len(plan.row_slots) or len(result.slots)
        self._metrics.tokens.labels("decode").inc(num_decode)
        if counts:
            self._metrics.tokens.labels("prefill").inc(sum(counts) - num_decode)
        if result.num_drafts:
            _count_drafts(self._metrics, result)
        for reason in result.failed_reasons:
            self._metrics.row_errors.labels(RowError.Name(reason)).inc()
        if result.failed_slots:
            log.warning("rows.failed", slots=list(result.failed_slots), reasons=[RowError.Name(r) for r in result.failed_reasons])

    def _on_compute_error(self, error: Exception) -> None:
        log.error("step.failed", error=repr(error), exc_info=error)
        self._context.fail(error)

    def _describe(self, runner: Runner) -> None:
        limits = runner.limits
        self._model = ModelInfo(
            name=self._context.settings.model.name_for_clients,
            max_model_len=limits.max_model_len,
            loaded_unix_s=int(time.time()),
        )
        self._capacity = Capacity(
            model=self._model,
            pools=[PagePoolInfo(name=POOL_NAME, num_pages=limits.num_pages, page_size=limits.page_size)],
            max_num_seqs=limits.max_num_seqs,
            max_num_batched_tokens=limits.max_num_batched_tokens,
            num_ranks=self._settings.num_ranks,
            work_kinds=[WorkKind.WORK_KIND_GENERATE],
            vocab_size=limits.vocab_size,
            lane_group=self._settings.lane_group,
            copies_pages=True,
            max_num_drafts=runner.max_num_drafts,
        )
        if isinstance(runner, EmbedRunner):
            vectors = runner.vectors
            embedding = EmbeddingInfo(size=vectors.size, is_matryoshka=vectors.is_matryoshka, dimensions=vectors.dimensions)
            self._model.embedding.CopyFrom(embedding)
            self._capacity.MergeFrom(Capacity(model=self._model))
            del self._capacity.pools[:]
            self._capacity.work_kinds[:] = [WorkKind.WORK_KIND_EMBED]

    def _make_mock(self) -> Runner:
        settings = self._settings
        config = load_model_config(self._context.model_directory)
        max_model_len = self._context.settings.model.max_model_len or min(config.max_position_embeddings, _MOCK_MODEL_LEN)
        num_tokens = settings.kv_cache_tokens or settings.max_num_seqs * max_model_len
        limits = Limits(
            max_num_seqs=settings.max_num_seqs,
            max_num_batched_tokens=settings.max_num_batched_tokens,
            max_model_len=max_model_len,
            num_pages=-(-max(num_tokens, max_model_len) // settings.page_size),
            page_size=settings.page_size,
            vocab_size=config.vocab_size,
        )
        log.warning("model.mocked", model=self._context.settings.model.name_for_clients)
        if (vectors := load_embedding_config(self._context.model_directory, config)) is not None:
            return EmbedRunner(MockEmbedder(vectors.size), limits, vectors)
        return MockRunner(limits, step_s=settings.mock_step_s, token_s=settings.mock_token_s, sleep=time.sleep)

    def _make_model(self) -> Runner:
        begun_ns = time.monotonic_ns()
        # torch takes a second to import and is not wanted by the mock.
        torch = import_torch()
        from services.worker.loading import load_runner

        imported_ns = time.monotonic_ns()
        self._context.end_phase("torch")
        settings = self._settings
        num_threads = num_compute_threads(settings)
        options = _load_options(self._context, settings, num_threads)
        vectors = load_embedding_config(options.directory, load_model_config(options.directory))
        if vectors is not None:
            return _make_embedder(self._context, options, vectors)
        # Loading is thousands of small operations. Shared among threads, each would cost a barrier, which on a busy machine takes
        # longer than the operation; whole layers side by side meet only at the end.
        torch.set_num_threads(1)
        pool = ThreadPoolExecutor(num_threads, thread_name_prefix="load")
        try:
            with machine.short_lived_blocks():
                runner, report = load_runner(
                    options,
                    cpu_flags=machine.cpu_flags(),
                    available_bytes=machine.available_memory_bytes,
                    map_parts=pool.map,
                    on_progress=progress_log(self._context.notifier),
                    on_capped=_log_capped,
                )
        finally:
            pool.shutdown(cancel_futures=True)
        # Beside native kernels torch samples only, and its threads would wait where ours compute.
        torch.set_num_threads(1 if report.backend == "native" else num_threads)
        runner.speculation = make_speculation(
            settings.speculative, max_num_drafts=settings.num_speculative_tokens, limits=runner.limits, now_ns=time.monotonic_ns
        )
        self._grammars = constrain(runner, report.config, options.directory, max_bytes=settings.grammar_cache_bytes)
        loaded_ns = time.monotonic_ns()
        # Packing is part of it: each run of rows is packed when it is read.
        self._context.end_phase("load")
        _log_decisions(report, options.directory)
        log.info(
            "model.loaded",
            directory=str(options.directory),
            backend=report.backend,
            backend_reason=report.backend_reason,
            dtype=report.dtype,
            dtype_reason=report.dtype_reason,
            num_threads=num_threads,
            weight_bytes=report.memory.weight_bytes,
            kv_bytes=report.memory.kv_bytes,
            margin_bytes=report.memory.margin_bytes,
            num_pages=report.memory.num_pages,
            page_size=settings.page_size,
            max_model_len=runner.limits.max_model_len,
            import_s=round((imported_ns - begun_ns) / 1e9, 3),
            load_s=round((loaded_ns - imported_ns) / 1e9, 3),
        )
        return runner


def _count_drafts(metrics: WorkerMetrics, result: StepResult) -> None:
    metrics.tokens.labels("draft").inc(sum(result.num_drafts))
    for num_drafts, num_tokens in zip(result.num_drafts, result.num_tokens or [1] * len(result.slots), strict=True):
        if num_drafts:
            metrics.accept_length.observe(num_tokens)
            metrics.draft_tokens.labels("accepted").inc(num_tokens - 1)
            metrics.draft_tokens.labels("rejected").inc(num_drafts + 1 - num_tokens)


def _device_options(settings: Settings) -> DeviceOptions:
    return DeviceOptions(
        device=settings.device,
        attention_backend=settings.attention_backend,
        graph_batch_sizes=tuple(settings.graph_batch_sizes),
        kv_cache_bytes=None if settings.kv_cache_bytes == "auto" else settings.kv_cache_bytes,
        reserve_bytes=None if settings.reserve_bytes == "auto" else settings.reserve_bytes,
    )


def _log_capped(max_tokens: int) -> None:
    log.warning("steps.capped", max_tokens=max_tokens, reason="the GPU had no memory for a larger step: raise worker.reserve_bytes")


def _log_decisions(loaded: LoadReport, directory: Path) -> None:
    if loaded.unknown_fields:
        log.warning("model.fields_ignored", directory=str(directory), fields=list(loaded.unknown_fields))
    if loaded.unpacked:
        first, reason = next(iter(loaded.unpacked.items()))
        log.warning("weights.unpacked", num_matrices=len(loaded.unpacked), first=first, reason=reason)
    report = loaded.device
    if report.dropped_batch_sizes:
        log.warning(
            "graphs.dropped",
            batch_sizes=list(report.dropped_batch_sizes),
            reason="the GPU had no memory for them: raise worker.reserve_bytes or lower worker.graph_batch_sizes",
        )
    log.info(
        "device.prepared",
        device=report.name,
        reason=report.reason,
        step_bytes=report.step_bytes,
        reserve_bytes=report.reserve_bytes,
        graph_batch_sizes=list(report.graph_batch_sizes),
    )


def _load_options(context: ServiceContext, settings: Settings, num_threads: int) -> LoadOptions:
    from services.worker.loading import LoadOptions

    return LoadOptions(
        directory=context.model_directory,
        backend=settings.backend,
        num_threads=num_threads,
        dtype=settings.dtype,
        max_model_len=context.settings.model.max_model_len,
        max_num_seqs=settings.max_num_seqs,
        max_num_batched_tokens=settings.max_num_batched_tokens,
        page_size=settings.page_size,
        kv_cache_bytes=HOST_KV_CACHE_BYTES if settings.kv_cache_bytes == "auto" else settings.kv_cache_bytes,
        kv_cache_tokens=settings.kv_cache_tokens,
        kv_cache_dtype=settings.kv_cache_dtype,
        external_package=context.settings.model.external_package,
        device=_device_options(settings),
    )


def _make_embedder(context: ServiceContext, options: LoadOptions, vectors: EmbeddingConfig) -> Runner:
    from services.worker.embed_loading import load_embed_runner

    runner = load_embed_runner(options, vectors, cpu_flags=machine.cpu_flags())
    context.end_phase("load")
    log.info("model.loaded", directory=str(options.directory), vector_size=vectors.size, num_threads=options.num_threads)
    return runner

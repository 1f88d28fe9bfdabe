"""Goal: all that the worker does on a GPU beside arithmetic: graphs, padding, staging, memory, and running out of it.

Method: a stand-in for `torch.cuda` whose graphs record and compute again (`fake_cuda.py`), under the real loader, network and
kernels; tensors are the CPU's.
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from headrace.errors import ConfigError
from services.worker import loading, triton_loading, triton_network
from services.worker.backend_choice import DeviceOptions
from services.worker.batch_inputs import Limits
from services.worker.device import GpuDevice
from services.worker.layers.ops import StepTensors
from services.worker.layers.triton_ops import TritonOps
from services.worker.loading import LoadReport
from tests.interpreted.fake_cuda import FakeCuda, FakeGraph
from tests.interpreted.quantizing import quantize_checkpoint
from tests.interpreted.running import load, make_driver, mixed_steps, options_for, token_ids
from tests.interpreted.variants import Variants
from tests.parity.conftest import Driver
from tests.parity.families import FAMILIES, assert_near
from tests.unit.worker.test_sampler import rows as sampled_rows

KV_BYTES = 8 * 2 * 2 * 32 * 4
"""Of a page: tokens, keys and values, heads, head size, float32; of the checkpoint, which has one layer."""

MAX_TOKENS = 24


def one_layer(checkpoint: Callable[..., Path]) -> Path:
    return checkpoint("qwen3", num_hidden_layers=1)


@pytest.fixture
def cuda() -> FakeCuda:
    return FakeCuda()


@pytest.fixture
def load_gpu(cuda: FakeCuda, checkpoint: Callable[..., Path], monkeypatch: pytest.MonkeyPatch) -> Callable[..., Any]:
    """Load a checkpoint onto the stand-in; gives a driver and the report."""
    find = loading.find_device
    device = GpuDevice("cuda", torch.device("cpu"), cuda=cuda, pin=lambda tensor: tensor)
    monkeypatch.setattr(loading, "find_device", lambda setting: (device, "a stand-in") if setting == "cuda" else find(setting))

    def make(
        *, on_capped: Any = lambda max_tokens: None, directory: Path | None = None, **changes: Any
    ) -> tuple[Driver, LoadReport]:
        fields = {"device": "cuda", "graph_batch_sizes": (1, 2), "kv_cache_bytes": 64 * KV_BYTES, "reserve_bytes": 1 << 20}
        split = {key: changes.pop(key) for key in list(changes) if key in DeviceOptions.__dataclass_fields__}
        sizes = {"max_num_batched_tokens": MAX_TOKENS, "kv_cache_tokens": None} | changes
        options = options_for(directory or one_layer(checkpoint), "auto", device=DeviceOptions(**(fields | split)), **sizes)
        runner, report = load(options, on_capped=on_capped)
        return Driver(runner), report

    return make


def test_replayed_graphs_give_the_tokens_and_logits_of_torch(
    load_gpu: Callable[..., Any], cuda: FakeCuda, checkpoint: Callable[..., Path]
) -> None:
    driver, report = load_gpu(graph_batch_sizes=(1, 2, 4))
    assert report.device.graph_batch_sizes == (1, 2, 4)
    assert report.backend == "triton"
    # The largest first, and all in the memory of the first.
    assert cuda.pools == [None, "pool", "pool"]
    runs = []
    for each in (driver, make_driver(one_layer(checkpoint), "torch")):
        tokens, logits = mixed_steps(each)
        for rows in ({0: 1}, {2: 1, 1: 1}, {0: 1, 2: 1}):
            sampled, by_slot = each.step(rows)
            logits += [by_slot[slot] for slot in sorted(by_slot)]
            for slot, token_id in sampled.items():
                tokens[slot].append(token_id)
        runs.append((tokens, torch.stack(logits)))
    # Of four, three rows padded; of two twice; of one.
    assert [graph.num_replays for graph in cuda.graphs] == [1, 2, 1]
    assert runs[0][0] == runs[1][0]
    assert_near("torch", runs[0][1], runs[1][1])


@pytest.mark.parametrize("form", ["gguf", "int8 for int8", "fp8 blocks"])
def test_products_with_quantised_weights_are_captured(
    form: str, load_gpu: Callable[..., Any], cuda: FakeCuda, checkpoint: Callable[..., Path], tmp_path: Path
) -> None:
    """Goal: all kinds of segments in a graph. Method: replayed steps, one with a padded row, beside the same without graphs."""
    directory = quantize_checkpoint(checkpoint("llama", num_hidden_layers=1, intermediate_size=160), tmp_path, form)
    outputs = []
    for batch_sizes in ((2,), ()):
        driver, report = load_gpu(directory=directory, graph_batch_sizes=batch_sizes)
        assert not report.unpacked
        driver.enter(0, token_ids(5, seed=1))
        driver.enter(1, token_ids(3, seed=2))
        driver.step({0: 5, 1: 3})
        logits = [driver.step(rows)[1] for rows in ({0: 1, 1: 1}, {0: 1})]
        outputs.append(torch.stack([by_slot[slot] for by_slot in logits for slot in sorted(by_slot)]))
    assert [graph.num_replays for graph in cuda.graphs] == [2]
    torch.testing.assert_close(*outputs)


def test_norms_of_queries_and_keys_lie_on_two_streams_while_a_graph_is_captured_and_at_no_other_time(
    load_gpu: Callable[..., Any], cuda: FakeCuda
) -> None:
    driver, _ = load_gpu(graph_batch_sizes=(2,))
    fork = ["side waits for main", "on side", "on main", "main waits for side"]
    streams = [event for event in cuda.events if "side" in event or "main" in event]
    assert streams == fork
    driver.enter(0, token_ids(3, seed=1))
    driver.step({0: 3})
    assert [event for event in cuda.events if "side" in event or "main" in event] == streams


def test_padded_rows_store_nothing_and_change_nothing(load_gpu: Callable[..., Any]) -> None:
    driver, _ = load_gpu(graph_batch_sizes=(4,))
    alone, _ = load_gpu(graph_batch_sizes=())
    outputs = []
    for each in (driver, alone):
        each.enter(3, token_ids(9, seed=5))
        each.step({3: 9})
        layers = each.runner._network._network._kv_layers
        before = [layer.clone() for layer in layers]
        _, logits = each.step({3: 1})
        changed = [(old != new).flatten(2).any(-1).nonzero().tolist() for old, new in zip(before, layers, strict=True)]
        assert all(len(places) == 1 for places in changed)
        outputs.append(logits[3])
    torch.testing.assert_close(*outputs)


def test_steps_that_are_no_decode_and_batches_over_the_largest_graph_are_computed_without(
    load_gpu: Callable[..., Any], cuda: FakeCuda
) -> None:
    driver, _ = load_gpu(graph_batch_sizes=(1, 2, 400), max_num_seqs=3)
    # 400 counts as max_num_seqs.
    for slot in range(3):
        driver.enter(slot, token_ids(2 + slot, seed=slot))
    driver.step({0: 2, 1: 3, 2: 4})
    driver.step({0: 1, 1: 1, 2: 1})
    assert [graph.num_replays for graph in cuda.graphs] == [1, 0, 0]


def test_a_row_that_does_not_sample_yet_goes_through_a_graph_too(load_gpu: Callable[..., Any], cuda: FakeCuda) -> None:
    """A chunk of one token computes and stores; there is no token to be read."""
    driver, _ = load_gpu(graph_batch_sizes=(2,))
    plain, _ = load_gpu(graph_batch_sizes=())
    outputs = []
    for each in (driver, plain):
        each.enter(0, token_ids(4, seed=1))
        each.enter(1, token_ids(3, seed=2))
        each.step({0: 4, 1: 1})
        sampled, _ = each.step({1: 1, 0: 1})
        assert sampled.keys() == {0}
        outputs.append((sampled, each.step({1: 1, 0: 1})[0]))
    assert outputs[0] == outputs[1]
    assert cuda.graphs[0].num_replays == 2


def test_pages_get_what_is_free_but_for_the_reserve(load_gpu: Callable[..., Any], cuda: FakeCuda) -> None:
    cuda.free, cuda.peak = (600 << 20) + 100 * KV_BYTES, 1 << 20
    driver, report = load_gpu(kv_cache_bytes=None, reserve_bytes=None, graph_batch_sizes=(1, 2))
    # 512 MiB + 1.25 P + P B / T + 12 B V + 8 MiB G
    reserve = (512 << 20) + (5 << 18) + -(-(1 << 20) * 2 // MAX_TOKENS) + 12 * 2 * 251 + 2 * (8 << 20)
    assert (report.device.step_bytes, report.device.reserve_bytes) == (1 << 20, reserve)
    assert driver.runner.limits.num_pages == (cuda.free - reserve) // KV_BYTES


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"kv_cache_bytes": None, "reserve_bytes": 1 << 30}, r"worker.device: 1024 MiB are free beside .* the reserve is 1024 MiB"),
        (
            {"kv_cache_bytes": (1 << 29) + KV_BYTES, "reserve_bytes": 1 << 29},
            r"worker.kv_cache_bytes: .* lower it to 536870912 bytes or less",
        ),
        ({"page_size": 128}, r"attention: page_size must have or be 1 to 64, got 128"),
    ],
)
def test_settings_that_do_not_fit_stop_the_start(load_gpu: Callable[..., Any], changes: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        load_gpu(**changes)


def test_heads_that_no_kernel_is_made_for_stop_the_start(checkpoint: Callable[..., Path]) -> None:
    with pytest.raises(ConfigError, match="head_dim must have or be 1 to 256, got 288"):
        make_driver(checkpoint("qwen3", num_hidden_layers=1, head_dim=288), "triton")


def fail(cuda: FakeCuda, monkeypatch: pytest.MonkeyPatch, is_too_large: Callable[[int], bool]) -> list[int]:
    """Let operations over too many tokens find no memory; gives how many each attempt had."""
    attempts: list[int] = []
    embed = TritonOps.embed

    def limited(self: TritonOps, *args: Any, **kwargs: Any) -> torch.Tensor:
        assert self._step is not None
        attempts.append(len(self._step.token_ids))
        if is_too_large(attempts[-1]):
            raise cuda.OutOfMemoryError("CUDA out of memory")
        return embed(self, *args, **kwargs)

    monkeypatch.setattr(TritonOps, "embed", limited)
    return attempts


def test_a_step_that_finds_no_memory_is_computed_in_parts_and_gives_the_same(
    load_gpu: Callable[..., Any], cuda: FakeCuda, monkeypatch: pytest.MonkeyPatch, checkpoint: Callable[..., Path]
) -> None:
    monkeypatch.setattr(triton_network, "PART_TOKENS_MIN", 4)
    capped: list[int] = []
    driver, _ = load_gpu(graph_batch_sizes=(), on_capped=capped.append)
    expected, logits = large_steps(make_driver(one_layer(checkpoint), "torch"))
    attempts = fail(cuda, monkeypatch, lambda num_tokens: num_tokens > 7)
    found, part_logits = large_steps(driver)
    assert found == expected
    assert_near("torch", part_logits, logits)
    assert capped == [12, 6]
    assert "empty cache" in cuda.events
    # 24 tokens: whole, in halves, in quarters; the 9 afterwards are in parts at once.
    assert attempts == [24, 12, 6, 6, 6, 6, 6, 3]


def large_steps(driver: Driver) -> tuple[list[dict[int, int]], torch.Tensor]:
    """A step of 24 tokens and one of 9, decode rows and prompts; rows lie across the borders of parts."""
    for slot, num_tokens in enumerate((1, 9, 1, 14)):
        driver.enter(slot, token_ids(num_tokens, seed=slot))
    found, logits = [], []
    first = driver.step({3: 13, 0: 1, 1: 9, 2: 1})
    driver.enter(4, token_ids(5, seed=9))
    for sampled, by_slot in (first, driver.step({1: 1, 4: 5, 3: 1, 0: 1, 2: 1})):
        found.append(sampled)
        logits += [by_slot[slot] for slot in sorted(by_slot)]
    return found, torch.stack(logits)


def test_a_step_that_finds_no_memory_for_a_few_tokens_ends_the_worker_with_what_to_do(
    load_gpu: Callable[..., Any], cuda: FakeCuda, monkeypatch: pytest.MonkeyPatch
) -> None:
    driver, _ = load_gpu(graph_batch_sizes=())
    fail(cuda, monkeypatch, lambda num_tokens: True)
    driver.enter(0, token_ids(20, seed=1))
    with pytest.raises(ConfigError, match=r"no memory left for a step of 10 tokens, .* worker.reserve_bytes is too small"):
        driver.step({0: 20})


def test_graphs_for_which_there_is_no_memory_are_done_without(
    load_gpu: Callable[..., Any], cuda: FakeCuda, monkeypatch: pytest.MonkeyPatch
) -> None:
    fail(cuda, monkeypatch, lambda num_tokens: num_tokens == 4)
    driver, report = load_gpu(graph_batch_sizes=(1, 2, 4))
    assert report.device.graph_batch_sizes == (1, 2)
    assert report.device.dropped_batch_sizes == (4,)
    for slot in range(3):
        driver.enter(slot, token_ids(3, seed=slot))
    driver.step(dict.fromkeys(range(3), 3))
    # Three rows fit into no graph.
    driver.step(dict.fromkeys(range(3), 1))
    driver.step({1: 1})
    assert [graph.num_replays for graph in cuda.graphs] == [0, 1]


def test_a_graph_that_cannot_be_captured_for_another_reason_stops_the_start(
    load_gpu: Callable[..., Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(TritonOps, "gated", lambda self, x, activation: x[:, : x.shape[1] // 2] * float(x[0, 0]))
    with pytest.raises(RuntimeError, match="operation not permitted when stream is capturing"):
        load_gpu()


@pytest.mark.parametrize(
    ("place", "message"),
    [
        ("take_stacked", "model.name: the weights do not fit into the GPU's memory, of which 1024 of 2048 MiB were free"),
        ("largest step", "worker.max_num_batched_tokens: a step of 24 tokens does not fit into the 1024 MiB"),
        ("pages", "worker.kv_cache_bytes: 0 MiB of KV pages could not be had, 1024 MiB are free"),
    ],
)
def test_no_memory_at_load_says_what_to_change(
    load_gpu: Callable[..., Any], cuda: FakeCuda, monkeypatch: pytest.MonkeyPatch, place: str, message: str
) -> None:
    def refuse(*args: Any, **kwargs: Any) -> Any:
        raise cuda.OutOfMemoryError("CUDA out of memory. Tried to allocate 2 GiB")

    if place == "take_stacked":
        monkeypatch.setattr(TritonOps, "_placed", refuse)
    elif place == "largest step":
        fail(cuda, monkeypatch, lambda num_tokens: True)
    else:
        cache = triton_loading.KvCache
        monkeypatch.setattr(
            triton_loading,
            "KvCache",
            lambda *a, num_pages, **k: refuse() if num_pages == 64 else cache(*a, num_pages=num_pages, **k),
        )
    with pytest.raises(ConfigError, match=message):
        load_gpu()


def test_other_errors_are_not_taken_for_a_lack_of_memory(load_gpu: Callable[..., Any], monkeypatch: pytest.MonkeyPatch) -> None:
    driver, _ = load_gpu(graph_batch_sizes=())

    def broken(self: TritonOps, *args: Any, **kwargs: Any) -> Any:
        raise RuntimeError("an illegal memory access was encountered")

    monkeypatch.setattr(TritonOps, "embed", broken)
    driver.enter(0, token_ids(3, seed=1))
    with pytest.raises(RuntimeError, match="illegal memory access"):
        driver.step({0: 3})


def test_draws_are_those_of_the_cpu(load_gpu: Callable[..., Any], checkpoint: Callable[..., Path]) -> None:
    ours, _ = load_gpu()
    theirs = make_driver(one_layer(checkpoint), "torch")
    for driver in (ours, theirs):
        driver.enter(0, token_ids(5, seed=1), temperature=0.8, top_p=0.9, top_k=50, seed=2**63 + 5)
        driver.enter(1, token_ids(4, seed=2))
        driver.enter(2, token_ids(3, seed=3), temperature=1.3, min_p=0.05, seed=7, presence_penalty=1.5, repetition_penalty=1.2)
    first = [driver.step({0: 5, 1: 4, 2: 3})[0] for driver in (ours, theirs)]
    rest = [[driver.step({0: 1, 1: 1, 2: 1})[0] for _ in range(4)] for driver in (ours, theirs)]
    assert first[0] == first[1]
    assert rest[0] == rest[1]


def test_failed_rows_fail_alone_and_copied_pages_are_copies(load_gpu: Callable[..., Any]) -> None:
    driver, _ = load_gpu(graph_batch_sizes=(2,))
    driver.enter(0, token_ids(11, seed=1))
    driver.step({0: 11})
    driver.fork(1, 0, token_ids(11, seed=1))
    sampled, _ = driver.step({0: 1, 1: 1})
    again, _ = driver.step({0: 1, 1: 1})
    assert sampled.keys() == again.keys() == {0, 1}
    network = driver.runner._network._network
    network.clear_pages(torch.tensor([1, 2]))
    assert all(not bool(layer[1:3].any()) for layer in network._kv_layers)


def random_step(generator: np.random.Generator, limits: Limits) -> StepTensors:
    """Decode rows, rows of several tokens, or both, of any lengths, over the first page; some tokens are sampled."""
    num_decode, num_extend = generator.integers(0, 4), generator.integers(0, 3)
    num_decode += num_decode + num_extend == 0
    new = generator.integers(2, (limits.max_num_batched_tokens - num_decode) // max(num_extend, 1) + 1, num_extend)
    counts = np.concatenate((np.ones(num_decode, dtype=np.int64), new))
    starts = generator.integers(0, generator.choice((40, 400, limits.max_model_len)) - counts + 1)
    positions = np.concatenate([start + np.arange(count) for start, count in zip(starts, counts, strict=True)])
    sampled = np.sort(generator.permutation(len(positions))[: generator.integers(1, len(counts) + 1)])
    return StepTensors(
        token_ids=torch.zeros(len(positions), dtype=torch.int64),
        positions=torch.from_numpy(positions),
        slot_mapping=torch.from_numpy(positions % limits.page_size),
        row_starts=torch.from_numpy(starts),
        row_counts=torch.from_numpy(counts),
        page_tables=torch.zeros((len(counts), -(-limits.max_model_len // limits.page_size)), dtype=torch.int64),
        num_decode_rows=int(num_decode),
        sampled_tokens=torch.from_numpy(sampled),
    )


@pytest.mark.parametrize(
    ("form", "batch_sizes", "changes"),
    [
        ("qwen3", (1, 3), {}),
        ("qwen3", (), {"head_dim": 20}),
        ("gpt_oss", (3,), {}),
        *((form, (), {}) for form in ("gptq", "int8", "int8 for int8", "fp8 blocks")),
    ],
    ids=["graphs", "no graphs", "experts", "codes of 4 bits", "codes of 8 bits", "quantised inputs", "eight-bit floats"],
)
def test_no_step_has_a_kernel_compiled_that_the_start_has_not(
    form: str,
    batch_sizes: tuple[int, ...],
    changes: dict[str, int],
    load_gpu: Callable[..., Any],
    checkpoint: Callable[..., Path],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Goal: no request waits for a compiler, whatever the numbers of a step and wherever they lie, and what is launched again
    without asking Triton is what Triton would have chosen.

    Method: Triton is asked at each launch which variant of the kernel it takes. After the start nothing is computed any more.
    """
    variants = Variants(monkeypatch)
    is_family = form in FAMILIES
    sizes = {"num_hidden_layers": 2 if is_family else 1, "max_position_embeddings": 2048}
    directory = checkpoint(form if is_family else "llama biases", **(sizes | changes))
    directory = directory if is_family else quantize_checkpoint(directory, tmp_path, form)
    driver, _ = load_gpu(directory=directory, graph_batch_sizes=batch_sizes, max_model_len=1200, kv_cache_bytes=1 << 22)
    driver.runner.warm_up()
    network, draw, limits = driver.runner._network._network, driver.runner._draw, driver.runner.limits
    variants.is_computing = False
    monkeypatch.setattr(FakeGraph, "replay", lambda graph: None)
    generator, at_start = np.random.default_rng(1), set(variants.found)
    assert {name for name, *_ in at_start} > {"extend_attention_kernel", "sample_draw_kernel", "store_kv_kernel"}
    with torch.inference_mode():
        for _ in range(120):
            logits = network.forward(random_step(generator, limits))
            indices = np.flatnonzero(generator.integers(0, 2, len(logits)))
            draw(logits, sampled_rows(len(logits)), indices)
    assert sorted(name for name, *_ in variants.found - at_start) == []
    assert variants.by_launch
    assert [found for found in variants.by_launch.values() if len(found) > 1] == []

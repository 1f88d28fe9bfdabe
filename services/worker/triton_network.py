"""A model on a GPU with its KV pages: captured graphs for decode steps, operations one by one for all others. See `Network`.

A step that finds no memory is computed in halves, and so are all after it that are as large: the worker goes on, slower. Which part
a token is computed in changes nothing of what it attends to.
"""

from __future__ import annotations

from collections.abc import Callable

import torch

from headrace.errors import ConfigError
from services.worker.attention.triton_paged import StagedStep
from services.worker.batch_inputs import Limits
from services.worker.decode_graphs import DecodeGraphs, Outputs
from services.worker.device import Device
from services.worker.gpu_step import StepStaging
from services.worker.kv_cache import KvCache
from services.worker.layers.ops import Best, Model, StepTensors
from services.worker.layers.triton_ops import TritonOps
from services.worker.step_parts import PART_TOKENS_MIN, parts_of


class TritonNetwork:
    """See `Network`.

    Args:
        model: The network.
        ops: What it was built with.
        kv_cache: Its pages.
        device: What computes.
        limits: Sizes of the worker.
        batch_sizes: Numbers of rows for which decode graphs are captured.
        on_capped: Told of the new largest part when a step found no memory.
    """

    def __init__(
        self,
        model: Model,
        ops: TritonOps,
        kv_cache: KvCache,
        device: Device,
        limits: Limits,
        *,
        batch_sizes: tuple[int, ...] = (),
        on_capped: Callable[[int], None] = lambda max_tokens: None,
    ) -> None:
        self._model = model
        self._ops = ops
        self._kv_layers = kv_cache.layers
        self._device = device
        self._staging = StepStaging(device, limits)
        self._graphs = DecodeGraphs(device, self._staging, limits, vocab_size=limits.vocab_size, batch_sizes=batch_sizes)
        self._max_tokens = limits.max_num_batched_tokens
        self._on_capped = on_capped
        self._outputs: Outputs | None = None
        self._best = device.staging(4 * limits.max_num_batched_tokens, torch.int64)
        self._is_read = device.fence()

    @property
    def graph_batch_sizes(self) -> tuple[int, ...]:
        """Decode graphs that were captured."""
        return self._graphs.batch_sizes

    def capture(self) -> tuple[int, ...]:
        """Capture the decode graphs; gives the numbers of rows for which the memory did not suffice."""
        return self._graphs.capture(self._compute) if self._device.can_capture else ()

    def compute_whole(self, step: StepTensors) -> None:
        """Compute a step in one part, without a graph, or fail, for what it takes."""
        self._outputs = Outputs.of(self._compute(self._staging.load(step)))

    def forward(self, step: StepTensors) -> torch.Tensor:
        """See `Network.forward`."""
        size = self._graphs.size_for(step)
        self._outputs = self._graphs.replay(step, size) if size is not None else Outputs.of(self._in_parts(step))
        return self._outputs.logits

    def best(self) -> Best | None:
        """See `Network.best`; waits for the step."""
        assert self._outputs is not None
        count = self._outputs.best.shape[0]
        tokens, is_finite = self._best[:count], self._best[count : 2 * count]
        tokens.copy_(self._outputs.best, non_blocking=True)
        is_finite.copy_(self._outputs.is_finite, non_blocking=True)
        self._is_read.record()
        self._is_read.synchronize()
        return tokens.numpy().copy(), is_finite.numpy().astype(bool)

    def copy_pages(self, sources: torch.Tensor, targets: torch.Tensor) -> None:
        """See `Network.copy_pages`."""
        sources, targets = self._placed(sources), self._placed(targets)
        for layer_pages in self._kv_layers:
            layer_pages[targets] = layer_pages[sources]

    def clear_pages(self, pages: torch.Tensor) -> None:
        """See `Network.clear_pages`."""
        pages = self._placed(pages)
        for layer_pages in self._kv_layers:
            layer_pages[pages] = 0

    def _compute(self, step: StagedStep) -> torch.Tensor:
        self._ops.begin(step, self._kv_layers)
        logits: torch.Tensor = self._model.forward(self._ops)
        return logits

    def _in_parts(self, step: StepTensors) -> torch.Tensor:
        """Compute a step, in as few parts as the memory has been seen to allow."""
        while True:
            logits = self._try_in_parts(step, self._max_tokens)
            if logits is not None:
                return logits
            num_tokens = min(step.token_ids.shape[0], self._max_tokens)
            if num_tokens <= PART_TOKENS_MIN:
                raise ConfigError(
                    f"the GPU has no memory left for a step of {num_tokens} tokens, {self._device.free_bytes()} bytes are free: "
                    "another process takes it, or worker.reserve_bytes is too small",
                    param="worker.reserve_bytes",
                )
            self._max_tokens = -(-num_tokens // 2)
            self._device.release()
            self._on_capped(self._max_tokens)

    def _try_in_parts(self, step: StepTensors, max_tokens: int) -> torch.Tensor | None:
        """Compute a step; None where the memory does not suffice. The error is let go of, with what was taken before it."""
        try:
            if step.token_ids.shape[0] <= max_tokens:
                return self._compute(self._staging.load(step))
            parts = parts_of(step, max_tokens)
            logits = torch.cat([self._compute(self._staging.load(part)) for part, _ in parts])
            order = torch.cat([sampled for _, sampled in parts]).argsort()
            return logits.index_select(0, self._placed(order))
        except Exception as error:
            if not self._device.is_out_of_memory(error):
                raise
            return None

    def _placed(self, indices: torch.Tensor) -> torch.Tensor:
        return indices.to(self._device.torch_device)


def largest_step(limits: Limits) -> StepTensors:
    """A step as large as the limits allow, over the first pages, which all its rows share: what they then hold means nothing."""
    num_tokens = limits.max_num_batched_tokens
    row_length = min(num_tokens, limits.max_model_len)
    num_rows = min(-(-num_tokens // row_length), limits.max_num_seqs)
    num_tokens = min(num_tokens, num_rows * row_length)
    flat = torch.arange(num_tokens, device="cpu")
    counts = torch.full((num_rows,), row_length, dtype=torch.int64, device="cpu")
    counts[-1] = num_tokens - (num_rows - 1) * row_length
    # Rows of one token stand at the front.
    counts = counts.sort().values
    starts = torch.repeat_interleave(counts.cumsum(0) - counts, counts)
    num_pages = -(-row_length // limits.page_size)
    return StepTensors(
        token_ids=torch.zeros_like(flat),
        positions=flat - starts,
        slot_mapping=flat - starts,
        row_starts=torch.zeros_like(counts),
        row_counts=counts,
        page_tables=torch.arange(num_pages, device="cpu").expand(num_rows, -1),
        num_decode_rows=int((counts == 1).sum()),
        sampled_tokens=flat[: limits.max_num_seqs],
    )


def longest_step(limits: Limits) -> StepTensors:
    """A decode step of one row at the end of the longest context, over one page again and again."""
    position = torch.tensor([limits.max_model_len - 1], device="cpu")
    return StepTensors(
        token_ids=torch.zeros_like(position),
        positions=position,
        slot_mapping=position % limits.page_size,
        row_starts=position,
        row_counts=torch.ones_like(position),
        page_tables=torch.zeros((1, -(-limits.max_model_len // limits.page_size)), dtype=torch.int64, device="cpu"),
        num_decode_rows=1,
        sampled_tokens=torch.zeros_like(position),
    )

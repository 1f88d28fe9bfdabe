"""From a model directory to a runner on a GPU, or under Triton's interpreter: checks, weights, memory, pages, graphs.

Everything that a device may lack is asked for here, before the worker says that it has started: a start that fails ends with
status 2 and one line, and is not tried again. Importing this imports Triton.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace

import torch

from headrace.errors import ConfigError
from headrace.models.model_config import ModelConfig
from kernels.attention_inputs import HeadShape, check_shape
from kernels.launching import Arguments, KernelArgumentError
from services.worker.backend_choice import TRITON, DeviceOptions
from services.worker.batch_inputs import Limits
from services.worker.config import HOST_KV_CACHE_BYTES
from services.worker.device import Device
from services.worker.gpu_memory import (
    DeviceReport,
    pages_too_large,
    plan_gpu_memory,
    reserve_of,
    step_too_large,
    weights_too_large,
)
from services.worker.kv_cache import KvCache, MemoryPlan, PageShape, plan_memory
from services.worker.layers.ops import Model
from services.worker.layers.triton_ops import TritonOps
from services.worker.models.registry import build_model
from services.worker.triton_draw import TritonDraw
from services.worker.triton_network import TritonNetwork, largest_step, longest_step
from services.worker.weights import WeightLoader


@dataclass(frozen=True, slots=True)
class Loaded:
    """A network that is ready, and what was decided on the way."""

    network: TritonNetwork
    draw: TritonDraw
    limits: Limits
    memory: MemoryPlan
    report: DeviceReport


class TritonLoader:
    """Loads one model onto one device.

    Args:
        device: Where to.
        reason: Why it was taken, for the log.
        options: What the settings say of it.
        config: The model.
        limits: Sizes of the worker; the number of pages is decided here.
        kv_cache_tokens: See `plan_gpu_memory`.
        on_capped: See `TritonNetwork`.

    Raises:
        ConfigError: The kernels are not made for the model's heads or for the page size.
    """

    def __init__(
        self,
        device: Device,
        reason: str,
        options: DeviceOptions,
        config: ModelConfig,
        limits: Limits,
        *,
        kv_cache_tokens: int | None,
        on_capped: Callable[[int], None],
    ) -> None:
        self._device = device
        self._reason = reason
        self._options = options
        self._config = config
        self._limits = limits
        self._kv_cache_tokens = kv_cache_tokens
        self._on_capped = on_capped
        wanted = options.graph_batch_sizes if device.can_capture else ()
        self._batch_sizes = tuple(sorted({min(size, limits.max_num_seqs) for size in wanted}))
        shape = HeadShape(config.num_heads, config.num_kv_heads, config.head_dim, limits.page_size)
        try:
            check_shape(Arguments("attention", device.torch_device), shape)
        except KernelArgumentError as error:
            raise ConfigError(
                f"worker.attention_backend is {TRITON}, whose kernels are not made for this model or page size: {error}",
                param="worker.attention_backend",
            ) from error

    def load(self, weights: WeightLoader, *, external_package: str) -> Loaded:
        """Load.

        Args:
            weights: Of the model directory.
            external_package: See `build_model`.

        Raises:
            ModelError: The directory cannot be used.
            ConfigError: The settings do not fit the model or the memory.
        """
        free_bytes = self._device.free_bytes()
        ops = TritonOps(weights, self._device)
        try:
            model = build_model(self._config, ops, max_model_len=self._limits.max_model_len, external_package=external_package)
        except Exception as error:
            if not self._device.is_out_of_memory(error):
                raise
            raise weights_too_large(free_bytes, self._device.total_bytes()) from error
        weights.check_all_taken()
        return self._load_pages(model, ops, ops.num_bytes, weights.dtype)

    def _load_pages(self, model: Model, ops: TritonOps, weight_bytes: int, dtype: torch.dtype) -> Loaded:
        config, limits = self._config, self._limits
        shape = PageShape(config.num_layers, config.num_kv_heads, config.head_dim, limits.page_size, dtype)
        step_bytes = self._step_bytes(model, ops, shape)
        memory, reserve_bytes = self._plan(shape, step_bytes, weight_bytes)
        limits = replace(limits, num_pages=memory.num_pages)
        try:
            pages = KvCache(shape, num_pages=memory.num_pages, device=self._device.torch_device)
            network = TritonNetwork(
                model, ops, pages, self._device, limits, batch_sizes=self._batch_sizes, on_capped=self._on_capped
            )
        except Exception as error:
            if not self._device.is_out_of_memory(error):
                raise
            raise pages_too_large(memory.kv_bytes, self._device.free_bytes()) from error
        with torch.inference_mode():
            dropped = network.capture()
            if self._device.can_capture:
                # With all else in its place: what a request may ask for later is had now, memory and compiled kernels.
                network.forward(largest_step(limits))
                network.compute_whole(longest_step(limits))
        report = DeviceReport(
            name=self._device.name,
            reason=self._reason,
            step_bytes=step_bytes,
            reserve_bytes=reserve_bytes,
            graph_batch_sizes=network.graph_batch_sizes,
            dropped_batch_sizes=dropped,
        )
        return Loaded(network, TritonDraw(self._device, limits), limits, memory, report)

    def _step_bytes(self, model: Model, ops: TritonOps, shape: PageShape) -> int:
        """Measure what the largest step takes, over as few pages as it needs; 0 where nothing is measured."""
        if not self._device.can_capture:
            return 0
        step = largest_step(self._limits)
        pages = KvCache(shape, num_pages=step.page_tables.shape[1], device=self._device.torch_device)
        network = TritonNetwork(model, ops, pages, self._device, self._limits)
        try:
            with torch.inference_mode():
                return self._device.peak_bytes(lambda: network.compute_whole(step))
        except Exception as error:
            if not self._device.is_out_of_memory(error):
                raise
            raise step_too_large(step.token_ids.shape[0], self._device.free_bytes()) from error

    def _plan(self, shape: PageShape, step_bytes: int, weight_bytes: int) -> tuple[MemoryPlan, int]:
        """Divide the memory; gives the reserve too, in bytes."""
        options, limits = self._options, self._limits
        free_bytes = self._device.free_bytes()
        if not self._device.can_capture:
            memory = plan_memory(
                shape,
                weight_bytes=weight_bytes,
                available_bytes=free_bytes,
                kv_cache_bytes=options.kv_cache_bytes or HOST_KV_CACHE_BYTES,
                kv_cache_tokens=self._kv_cache_tokens,
                max_model_len=limits.max_model_len,
            )
            return memory, 0
        measured = reserve_of(step_bytes, limits, self._batch_sizes)
        reserve_bytes = measured if options.reserve_bytes is None else options.reserve_bytes
        memory = plan_gpu_memory(
            shape,
            weight_bytes=weight_bytes,
            free_bytes=free_bytes,
            reserve_bytes=reserve_bytes,
            kv_cache_bytes=options.kv_cache_bytes,
            kv_cache_tokens=self._kv_cache_tokens,
            max_model_len=limits.max_model_len,
        )
        return memory, reserve_bytes

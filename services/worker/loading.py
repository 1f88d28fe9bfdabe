"""From a model directory to a runner that is ready: type, weights, memory plan, pages, warm-up.

Decisions only; what they were is in `LoadReport`, for the log.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, replace
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Final

import torch

from headrace.errors import ConfigError
from headrace.models.model_config import ModelConfig, load_model_config
from headrace.models.pooling_config import load_pooling_config
from kernels.cpu.library import ISA_NAMES, NativeLibraryError, load_library
from kernels.interpreting import start_interpreter
from services.worker.attention.torch_cpu import TorchCpuAttention
from services.worker.backend_choice import TRITON, DeviceOptions, choose_backend
from services.worker.batch_inputs import Limits
from services.worker.constraints.masks import LikeliestAllowed, likeliest_allowed, native_likeliest_allowed
from services.worker.device import Device, find_device
from services.worker.embedder import Embedder, EmbedLimits
from services.worker.gpu_memory import DeviceReport
from services.worker.kv_cache import KvCache, MemoryPlan, PageShape, count_pages, plan_memory
from services.worker.layers.config_check import unknown_fields
from services.worker.layers.linear import can_pack_bfloat16
from services.worker.layers.native_ops import NativeNetwork, NativeOps, check_page_size
from services.worker.layers.native_packing import UnsupportedError
from services.worker.layers.ops import Network
from services.worker.layers.torch_ops import TorchEncoder, TorchNetwork, TorchOps
from services.worker.model_runner import ModelRunner
from services.worker.models.registry import build_encoder, build_model
from services.worker.native_draw import NativeDraw
from services.worker.sampler import Draw
from services.worker.weights import MapParts, OnProgress, WeightLoader

if TYPE_CHECKING:
    from services.worker.triton_loading import Loaded

_DTYPES: Final = {"float32": torch.float32, "bfloat16": torch.bfloat16}

KV_FORMATS: Final[dict[str, torch.dtype | None]] = {"auto": None, "fp8_e4m3": torch.float8_e4m3fn}
"""8-bit type of the pages by `worker.kv_cache_dtype`; None where they are of the computation's type."""

NATIVE_BFLOAT16_FLAGS: Final = frozenset({"avx512_bf16", "amx_bf16", "bf16"})
"""CPU flags, as /proc/cpuinfo names them, that say that bfloat16 is multiplied natively."""


@dataclass(frozen=True, slots=True)
class LoadOptions:
    """What the settings say of loading; units in the names.

    Attributes:
        backend: `auto`, `native` or `torch`.
        num_threads: Threads that compute.
        dtype: `auto`, `float32` or `bfloat16`.
        max_model_len: Longest sequence in tokens; None for the model's own.
        kv_cache_tokens: Leads over `kv_cache_bytes` where it is given.
        kv_cache_dtype: `auto` or `fp8_e4m3`.
        external_package: A package with further model families; empty for none.
        device: Where it is computed, and what that needs.
    """

    directory: Path
    backend: str
    num_threads: int
    dtype: str
    max_model_len: int | None
    max_num_seqs: int
    max_num_batched_tokens: int
    page_size: int
    kv_cache_bytes: int
    kv_cache_tokens: int | None
    kv_cache_dtype: str = "auto"
    external_package: str = ""
    device: DeviceOptions = field(default_factory=DeviceOptions)


@dataclass(frozen=True, slots=True)
class LoadReport:
    """What was decided.

    Attributes:
        unknown_fields: Those of config.json of which it is not known whether they matter.
        unpacked: Matrices that could not stay quantised, each with the reason: see `WeightLoader`.
    """

    config: ModelConfig
    backend: str
    backend_reason: str
    dtype: str
    dtype_reason: str
    memory: MemoryPlan
    unknown_fields: tuple[str, ...]
    unpacked: Mapping[str, str]
    device: DeviceReport


def choose_dtype(setting: str, cpu_flags: frozenset[str], *, device: str = "cpu") -> tuple[str, str]:
    """Resolve `auto`; gives the type's name and the reason, for the log."""
    if setting != "auto":
        return setting, "set"
    if device != "cpu":
        return "bfloat16", "every GPU that is supported multiplies bfloat16 natively"
    if cpu_flags & NATIVE_BFLOAT16_FLAGS and can_pack_bfloat16():
        return "bfloat16", "this CPU multiplies bfloat16 natively"
    return "float32", "this CPU has no native bfloat16 (avx512_bf16, amx_bf16)"


def choose_max_model_len(setting: int | None, config: ModelConfig) -> int:
    """Give the longest sequence, in tokens.

    Raises:
        ConfigError: More is asked for than the model has positions.
    """
    if setting is None:
        return config.max_position_embeddings
    if setting > config.max_model_len:
        raise ConfigError(
            f"model.max_model_len is {setting}; the model has {config.max_model_len} positions: lower it",
            param="model.max_model_len",
        )
    return setting


@dataclass(frozen=True, slots=True)
class _Backend:
    """A model whose weights are loaded, before its KV pages are made.

    Attributes:
        name: `native` or `torch`.
        reason: Why it was taken, for the log.
        weight_bytes: Memory of the weights.
        kv_dtype: Type of the pages.
        unpacked: See `LoadReport`.
        make_network: Makes the pages, given their number and shape.
        draw: See `ModelRunner`.
        likeliest_allowed: See `ModelRunner`.
    """

    name: str
    reason: str
    weight_bytes: int
    kv_dtype: torch.dtype
    unpacked: Mapping[str, str]
    make_network: Callable[[int, PageShape], Network]
    draw: Draw | None = None
    likeliest_allowed: LikeliestAllowed = likeliest_allowed

    def make_runner(self, num_pages: int, shape: PageShape, limits: Limits) -> ModelRunner:
        """A runner over so many pages."""
        network = self.make_network(num_pages, shape)
        return ModelRunner(network, limits, draw=self.draw, likeliest_allowed=self.likeliest_allowed)


def load_runner(
    options: LoadOptions,
    *,
    cpu_flags: frozenset[str],
    available_bytes: Callable[[], int],
    map_parts: MapParts = map,
    on_progress: OnProgress | None = None,
    on_capped: Callable[[int], None] = lambda max_tokens: None,
) -> tuple[ModelRunner, LoadReport]:
    """Load a model and make a runner for it, not yet warm.

    Args:
        options: Settings.
        cpu_flags: What the CPU can do.
        available_bytes: Asked for the free memory after the weights are in.
        map_parts: See `WeightLoader`.
        on_progress: See `WeightLoader`.
        on_capped: See `TritonNetwork`.

    Raises:
        ModelError: The directory cannot be used.
        ConfigError: The settings do not fit the model or the memory.
    """
    config = load_model_config(options.directory)
    max_model_len = choose_max_model_len(options.max_model_len, config)
    open_weights = partial(WeightLoader, options.directory, map_parts=map_parts, on_progress=on_progress)
    device, device_reason = find_device(options.device.device)
    dtype_name, dtype_reason = choose_dtype(options.dtype, cpu_flags, device=device.name)
    dtype = _DTYPES[dtype_name]
    chosen = choose_backend(device=device.name, backend=options.backend, attention_backend=options.device.attention_backend)
    if chosen == TRITON:
        _check_kv_dtype(options)
        weights = open_weights(dtype=dtype)
        loaded = _load_triton(options, config, weights, device, device_reason, max_model_len=max_model_len, on_capped=on_capped)
        runner = ModelRunner(loaded.network, loaded.limits, draw=loaded.draw)
        return runner, LoadReport(
            config=config,
            backend=TRITON,
            backend_reason=device_reason,
            dtype=dtype_name,
            dtype_reason=dtype_reason,
            memory=loaded.memory,
            unknown_fields=unknown_fields(config),
            unpacked=dict(weights.unpacked),
            device=loaded.report,
        )
    options = replace(options, backend=chosen)
    # Native kernels keep no larger type than bfloat16, so no fewer pages than these can be needed.
    smallest = _page_shape(options, config, _kv_dtype(options, dtype if chosen == "torch" else torch.bfloat16))
    count_pages(
        smallest, kv_cache_bytes=options.kv_cache_bytes, kv_cache_tokens=options.kv_cache_tokens, max_model_len=max_model_len
    )
    backend = _load_backend(options, config, dtype, max_model_len=max_model_len, open_weights=open_weights)
    shape = _page_shape(options, config, backend.kv_dtype)
    memory = plan_memory(
        shape,
        weight_bytes=backend.weight_bytes,
        available_bytes=available_bytes(),
        kv_cache_bytes=options.kv_cache_bytes,
        kv_cache_tokens=options.kv_cache_tokens,
        max_model_len=max_model_len,
    )
    limits = Limits(
        max_num_seqs=options.max_num_seqs,
        max_num_batched_tokens=options.max_num_batched_tokens,
        max_model_len=max_model_len,
        num_pages=memory.num_pages,
        page_size=options.page_size,
        vocab_size=config.vocab_size,
    )
    runner = backend.make_runner(memory.num_pages, shape, limits)
    report = LoadReport(
        config=config,
        backend=backend.name,
        backend_reason=backend.reason,
        dtype=dtype_name,
        dtype_reason=dtype_reason,
        memory=memory,
        unknown_fields=unknown_fields(config),
        unpacked=backend.unpacked,
        device=DeviceReport(device.name, device_reason),
    )
    return runner, report


def _page_shape(options: LoadOptions, config: ModelConfig, dtype: torch.dtype) -> PageShape:
    return PageShape(
        num_layers=config.num_layers,
        num_kv_heads=config.num_kv_heads,
        head_dim=config.head_dim,
        page_size=options.page_size,
        dtype=dtype,
    )


def _check_kv_dtype(options: LoadOptions) -> None:
    """Refuse pages of 8 bits, which Triton's kernels do not have; asked before weights are read.

    Raises:
        ConfigError: They are asked for.
    """
    if options.kv_cache_dtype != "auto":
        raise ConfigError(
            f"worker.kv_cache_dtype is {options.kv_cache_dtype}, which the native kernels and torch have on a CPU, and the backend "
            f"is {TRITON}: set it to auto",
            param="worker.kv_cache_dtype",
        )


def _kv_dtype(options: LoadOptions, dtype: torch.dtype) -> torch.dtype:
    """Type of the pages of a computation in `dtype`; those of an 8-bit format are kept as bytes, which every operation can copy."""
    return dtype if KV_FORMATS[options.kv_cache_dtype] is None else torch.uint8


def _load_backend(
    options: LoadOptions, config: ModelConfig, dtype: torch.dtype, *, max_model_len: int, open_weights: Callable[..., WeightLoader]
) -> _Backend:
    """Take the native kernels where they are built and can compute the model, unless the settings say otherwise."""
    reason = "set"
    if options.backend != "torch":
        try:
            return _load_native(options, config, max_model_len=max_model_len, open_weights=open_weights)
        except (NativeLibraryError, UnsupportedError) as error:
            if options.backend == "native":
                raise ConfigError(f"worker.backend is native: {error}", param="worker.backend") from error
            reason = str(error)
    weights = open_weights(dtype=dtype)
    kv_format = KV_FORMATS[options.kv_cache_dtype]
    ops = TorchOps(weights, TorchCpuAttention(page_size=options.page_size, dtype=dtype, kv_format=kv_format))
    model = build_model(config, ops, max_model_len=max_model_len, external_package=options.external_package)
    weights.check_all_taken()

    def make_network(num_pages: int, shape: PageShape) -> Network:
        return TorchNetwork(model, ops, KvCache(shape, num_pages=num_pages))

    kv_dtype = _kv_dtype(options, dtype)
    return _Backend("torch", reason, weights.num_bytes, kv_dtype, dict(weights.unpacked), make_network)


def _load_native(
    options: LoadOptions, config: ModelConfig, *, max_model_len: int, open_weights: Callable[..., WeightLoader]
) -> _Backend:
    if options.dtype == "float32":
        raise UnsupportedError("the native kernels keep keys and values in bfloat16 or 8 bits, and worker.dtype is float32")
    check_page_size(options.page_size)
    library = load_library()
    # Quantised weights stay as they are; this is the type of all others.
    weights = open_weights(dtype=torch.bfloat16)
    ops = NativeOps(library, weights)
    model = build_model(config, ops, max_model_len=max_model_len, external_package=options.external_package)
    weights.check_all_taken()
    network = NativeNetwork(
        library,
        model,
        ops,
        page_size=options.page_size,
        kv_format=KV_FORMATS[options.kv_cache_dtype],
        max_tokens=options.max_num_batched_tokens,
        num_threads=options.num_threads,
    )

    def make_network(num_pages: int, shape: PageShape) -> Network:
        network.make_pages(num_pages, shape.num_bytes // (shape.num_layers * shape.dtype.itemsize))
        return network

    return _Backend(
        name="native",
        reason=ISA_NAMES[network.isa],
        weight_bytes=ops.num_bytes,
        kv_dtype=_kv_dtype(options, torch.bfloat16),
        unpacked=dict(weights.unpacked),
        make_network=make_network,
        draw=NativeDraw(library, config.vocab_size),
        likeliest_allowed=native_likeliest_allowed(library),
    )


def _load_triton(
    options: LoadOptions,
    config: ModelConfig,
    weights: WeightLoader,
    device: Device,
    device_reason: str,
    *,
    max_model_len: int,
    on_capped: Callable[[int], None],
) -> Loaded:
    """Load for Triton's kernels. Triton takes half a second to import, and none but these want it."""
    if device.name == "cpu":
        start_interpreter()
    from services.worker.triton_loading import TritonLoader

    limits = Limits(
        max_num_seqs=options.max_num_seqs,
        max_num_batched_tokens=options.max_num_batched_tokens,
        max_model_len=max_model_len,
        num_pages=0,
        page_size=options.page_size,
        vocab_size=config.vocab_size,
    )
    loader = TritonLoader(
        device, device_reason, options.device, config, limits, kv_cache_tokens=options.kv_cache_tokens, on_capped=on_capped
    )
    return loader.load(weights, external_package=options.external_package)


def load_embedder(options: LoadOptions, *, cpu_flags: frozenset[str], map_parts: MapParts = map) -> Embedder:
    """Load an encoder. It has no pages: of the options, those that size them are not looked at.

    Args:
        options: Settings.
        cpu_flags: What the CPU can do.
        map_parts: See `WeightLoader`.

    Raises:
        ModelError: The directory cannot be used.
        ConfigError: The settings do not fit the model.
    """
    config = load_model_config(options.directory)
    max_model_len = choose_max_model_len(options.max_model_len, config)
    pooling = load_pooling_config(options.directory)
    dtype = _DTYPES[choose_dtype(options.dtype, cpu_flags)[0]]
    weights = WeightLoader(options.directory, dtype=dtype, map_parts=map_parts)
    ops = TorchOps(weights, TorchCpuAttention(page_size=options.page_size, dtype=dtype))
    model = build_encoder(config, ops, pooling=pooling.pooling, external_package=options.external_package)
    weights.check_all_taken()
    network = TorchEncoder(model, ops, is_normalized=pooling.is_normalized)
    return Embedder(network, EmbedLimits(max_model_len=max_model_len, vocab_size=config.vocab_size))

"""How a GPU's memory is divided: weights, KV pages, and a reserve for all else; and what is said when it does not suffice.

The reserve is, in bytes,

    512 MiB + 1.25 P + [P · B / T + 12 · B · V + 8 MiB · G]

where P is what the largest step (T = `max_num_batched_tokens`) takes at its highest beside weights and pages, measured at start
with this model on this device. A quarter more is for pieces of memory that do not fit together, the 512 MiB for what is not taken
through torch (the driver's context, compiled kernels, libraries' workspace). In brackets, decode graphs: B rows of the largest one,
each with three rows of V float32 logits, and 8 MiB for the launches of each of the G graphs. KV pages get what is free beside it.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Final

from headrace.errors import ConfigError
from services.worker.batch_inputs import Limits
from services.worker.kv_cache import MemoryPlan, PageShape, plan_memory

MIB: Final = 1 << 20
BASE_BYTES: Final = 512 * MIB
GRAPH_BYTES: Final = 8 * MIB
_LOGIT_BYTES: Final = 12


@dataclass(frozen=True, slots=True)
class DeviceReport:
    """What was found and decided on a device, for the log; see `gpu_memory.py`.

    Attributes:
        name: `cpu`, `cuda` or `rocm`.
        reason: Which one, and why.
        step_bytes: P, the largest step's memory; 0 where it was not measured.
        reserve_bytes: Memory that KV pages leave.
        graph_batch_sizes: Decode graphs that were captured.
        dropped_batch_sizes: Those for which the memory did not suffice.
    """

    name: str
    reason: str
    step_bytes: int = 0
    reserve_bytes: int = 0
    graph_batch_sizes: tuple[int, ...] = ()
    dropped_batch_sizes: tuple[int, ...] = ()


def reserve_of(step_bytes: int, limits: Limits, batch_sizes: tuple[int, ...]) -> int:
    """Give the reserve.

    Args:
        step_bytes: P.
        limits: Sizes of the worker.
        batch_sizes: Decode graphs that are to be captured.
    """
    reserve = BASE_BYTES + step_bytes + step_bytes // 4
    if batch_sizes:
        num_rows = min(max(batch_sizes), limits.max_num_seqs)
        reserve += -(-step_bytes * num_rows // limits.max_num_batched_tokens)
        reserve += _LOGIT_BYTES * num_rows * limits.vocab_size + GRAPH_BYTES * len(batch_sizes)
    return reserve


def plan_gpu_memory(
    shape: PageShape,
    *,
    weight_bytes: int,
    free_bytes: int,
    reserve_bytes: int,
    kv_cache_bytes: int | None,
    kv_cache_tokens: int | None,
    max_model_len: int,
) -> MemoryPlan:
    """Decide the number of pages.

    Args:
        shape: Shape of a page.
        weight_bytes: Size of the loaded weights.
        free_bytes: What is free beside them.
        reserve_bytes: What the pages must leave.
        kv_cache_bytes: Memory for the pages; None for all that is free but for the reserve.
        kv_cache_tokens: Tokens to hold; leads over `kv_cache_bytes`.
        max_model_len: Tokens that one sequence may reach.

    Raises:
        ConfigError: One sequence does not fit into the pages, or the pages not beside the reserve.
    """
    room = free_bytes - reserve_bytes
    smallest = -(-max_model_len // shape.page_size) * shape.num_bytes
    if room < smallest:
        raise ConfigError(
            f"worker.device: {free_bytes / MIB:.0f} MiB are free beside {weight_bytes / MIB:.0f} MiB of weights; the reserve is "
            f"{reserve_bytes / MIB:.0f} MiB, and one sequence of model.max_model_len = {max_model_len} tokens needs "
            f"{smallest / MIB:.0f} MiB of KV pages: lower model.max_model_len, worker.max_num_batched_tokens (the reserve grows "
            "with it) or worker.graph_batch_sizes, or take a smaller model or a GPU that nobody else uses",
            param="worker.device",
        )
    wanted = room if kv_cache_bytes is None else kv_cache_bytes
    plan = plan_memory(
        shape,
        weight_bytes=weight_bytes,
        available_bytes=free_bytes,
        kv_cache_bytes=wanted,
        kv_cache_tokens=kv_cache_tokens,
        max_model_len=max_model_len,
    )
    if plan.kv_bytes > room:
        setting = "kv_cache_bytes" if kv_cache_tokens is None else "kv_cache_tokens"
        raise ConfigError(
            f"worker.{setting}: {plan.kv_bytes / MIB:.0f} MiB of KV pages leave less of the {free_bytes / MIB:.0f} MiB that are "
            f"free than the reserve, {reserve_bytes / MIB:.0f} MiB: lower it to {room} bytes or less",
            param=f"worker.{setting}",
        )
    return plan


def weights_too_large(free_bytes: int, total_bytes: int) -> ConfigError:
    """Say that the weights do not fit."""
    return ConfigError(
        f"model.name: the weights do not fit into the GPU's memory, of which {free_bytes / MIB:.0f} of "
        f"{total_bytes / MIB:.0f} MiB were free: take a smaller model or one that is quantised, or a GPU that nobody else uses",
        param="model.name",
    )


def step_too_large(num_tokens: int, free_bytes: int) -> ConfigError:
    """Say that the largest step does not fit beside the weights alone."""
    return ConfigError(
        f"worker.max_num_batched_tokens: a step of {num_tokens} tokens does not fit into the {free_bytes / MIB:.0f} MiB of the "
        "GPU's memory that are free beside the weights: lower it, or take a smaller model",
        param="worker.max_num_batched_tokens",
    )


def pages_too_large(kv_bytes: int, free_bytes: int) -> ConfigError:
    """Say that the pages could not be had, though they had been counted as free."""
    return ConfigError(
        f"worker.kv_cache_bytes: {kv_bytes / MIB:.0f} MiB of KV pages could not be had, {free_bytes / MIB:.0f} MiB are free: "
        "another process takes memory of this GPU; set worker.kv_cache_bytes to less, or worker.reserve_bytes to more",
        param="worker.kv_cache_bytes",
    )

"""vLLM's V1 scheduler alone, for `bench.micro.vllm_scheduler`: run by an interpreter that has vLLM, imports nothing of ours.

    python vllm_side.py MODEL_DIRECTORY NUM_RUNNING NUM_WAITING NUM_STEPS

Prints one JSON object: median and 99th percentile of a decode step (schedule, then update with one token a request), microseconds.
"""

from __future__ import annotations

import gc
import json
import statistics
import sys
import time
from typing import Any

PROMPT_TOKENS = 128
BLOCK_SIZE = 16


def make_scheduler(model: str, num_running: int) -> Any:
    """A scheduler without an engine round it, as vLLM's own tests make one."""
    import torch
    from vllm.config import CacheConfig, ModelConfig, SchedulerConfig, VllmConfig
    from vllm.v1.core.sched.scheduler import Scheduler
    from vllm.v1.kv_cache_interface import FullAttentionSpec, KVCacheConfig, KVCacheGroupSpec
    from vllm.v1.structured_output import StructuredOutputManager

    model_config = ModelConfig(model=model, skip_tokenizer_init=True, dtype="float32", seed=1)
    scheduler_config = SchedulerConfig(
        max_num_seqs=num_running,
        max_num_batched_tokens=8192,
        max_model_len=model_config.max_model_len,
        enable_chunked_prefill=True,
        is_encoder_decoder=False,
    )
    cache_config = CacheConfig(block_size=BLOCK_SIZE, enable_prefix_caching=True)
    num_blocks = num_running * 128
    cache_config.num_gpu_blocks = num_blocks
    config = VllmConfig(model_config=model_config, scheduler_config=scheduler_config, cache_config=cache_config)
    spec = FullAttentionSpec(block_size=BLOCK_SIZE, num_kv_heads=1, head_size=1, dtype=torch.float32)
    return Scheduler(
        vllm_config=config,
        kv_cache_config=KVCacheConfig(
            num_blocks=num_blocks, kv_cache_tensors=[], kv_cache_groups=[KVCacheGroupSpec(["layer"], spec)]
        ),
        structured_output_manager=StructuredOutputManager(config),
        block_size=BLOCK_SIZE,
        log_stats=False,
    )


def make_request(index: int) -> Any:
    """A request that never ends; half of its prompt is everyone's, half its own."""
    from vllm.sampling_params import SamplingParams
    from vllm.utils.hashing import sha256
    from vllm.v1.core.kv_cache_utils import get_request_block_hasher, init_none_hash
    from vllm.v1.request import Request

    init_none_hash(sha256)
    half = PROMPT_TOKENS // 2
    return Request(
        request_id=f"r{index}",
        prompt_token_ids=[17] * half + [index % 40_000] * half,
        sampling_params=SamplingParams(ignore_eos=True, max_tokens=10**6),
        pooling_params=None,
        block_hasher=get_request_block_hasher(BLOCK_SIZE, sha256),
    )


def step(scheduler: Any) -> tuple[int, int]:
    """One step; nanoseconds it took, and the requests that computed."""
    from vllm.v1.outputs import ModelRunnerOutput

    started = time.perf_counter_ns()
    output = scheduler.schedule()
    planned_ns = time.perf_counter_ns() - started
    ids = list(output.num_scheduled_tokens)
    sampled = []
    for request_id in ids:
        request = scheduler.requests[request_id]
        # A prompt that is not whole yet samples nothing.
        sampled.append([17] if request.num_computed_tokens >= request.num_prompt_tokens else [])
    result = ModelRunnerOutput(
        req_ids=ids,
        req_id_to_index={one: index for index, one in enumerate(ids)},
        sampled_token_ids=sampled,
        logprobs=None,
        prompt_logprobs_dict={},
        pooler_output=[],
    )
    resumed = time.perf_counter_ns()
    scheduler.update_from_output(output, result)
    return planned_ns + time.perf_counter_ns() - resumed, len(ids)


def main() -> None:
    """Measure one load."""
    model, num_running, num_waiting, num_steps = sys.argv[1], *map(int, sys.argv[2:5])
    scheduler = make_scheduler(model, num_running)
    for index in range(num_running + num_waiting):
        scheduler.add_request(make_request(index))
    for _ in range(num_running * PROMPT_TOKENS // 8192 + 20):
        step(scheduler)
    gc.collect()
    times = []
    for _ in range(num_steps):
        step_ns, num_rows = step(scheduler)
        assert num_rows == num_running, f"{num_rows} of {num_running} requests computed: this is no decode step of all"
        times.append(step_ns / 1e3)
    import vllm

    print(
        json.dumps(
            {
                "version": getattr(vllm, "__version__", "unknown"),
                "step_us": round(statistics.median(times), 1),
                "step_us_p99": round(statistics.quantiles(times, n=100)[98], 1),
            }
        )
    )


if __name__ == "__main__":
    main()

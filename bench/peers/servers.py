"""How each server is started: its command, its settings and why, and what it needs of a client. Data only; nothing runs here.

Each is set as its own documentation advises for this machine's cores. All have prefix caching, and room for KV of about the same
size: 1 GiB is some 46,000 tokens of this model at 16 bits.
"""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path

from bench.peers.layout import MODEL, Layout
from bench.peers.setup import model_gguf

OURS = "headrace"

_MAX_MODEL_LEN = 4096
_NUM_SLOTS = 16
_SLOT_TOKENS = 2560
_KV_GIB = 1
_OPENVINO_SERVER = Path(__file__).with_name("openvino_server.py")


@dataclass(frozen=True)
class ServerSpec:
    """One server to start."""

    name: str
    about: str
    """Weights and settings, in a phrase."""
    argv: Sequence[str]
    port: int
    ready_path: str
    model: str
    """The name that its API knows the model by."""
    env: Mapping[str, str] = field(default_factory=dict)
    start_limit_s: float = 180.0
    needs_bytes: int = 2 << 30
    """Memory to be had before it is started."""
    sends_ignore_eos: bool = True
    """Whether it takes `ignore_eos`; one that does not serves a model without an end token."""
    sends_done: bool = True
    """Whether its streams end in `data: [DONE]`."""
    work_share: float = 1.0
    """Of each workload's requests, how many it gets: less for a server so slow that it would take most of the time."""

    @property
    def base_url(self) -> str:
        """Where it answers."""
        return f"http://127.0.0.1:{self.port}"


def num_threads() -> int:
    """Cores that this process may use: what every server is told to use."""
    return len(os.sched_getaffinity(0))


def headrace(checkout: Path, *, port: int, options: Sequence[str], run_directory: Path) -> ServerSpec:
    """Ours, from a checkout with its `.venv`, with its defaults but for ports and what `options` (of `headrace serve`) say."""
    metrics = [f"--telemetry-{service}-metrics-port=0" for service in ("router", "tokenizer", "scheduler", "worker", "detokenizer")]
    program = checkout / ".venv" / "bin" / "headrace"
    return ServerSpec(
        name=OURS,
        about=f"the model's own file (Q4_1); {' '.join(options) or 'defaults'}",
        argv=[
            str(program),
            "serve",
            f"--router-http-port={port}",
            "--router-grpc-port=null",
            *metrics,
            f"--run-directory={run_directory}",
            *options,
        ],
        port=port,
        ready_path="/ready",
        model=MODEL,
    )


def vllm(layout: Layout, port: int) -> ServerSpec:
    """vLLM's CPU build: both cores to its one worker (by default it keeps one for the API), its advised preloads."""
    cores = sorted(os.sched_getaffinity(0))
    binding = f"{cores[0]}-{cores[-1]}" if cores == list(range(cores[0], cores[-1] + 1)) else ",".join(map(str, cores))
    preload = [
        path for path in (layout.tcmalloc(), layout.venv("vllm") / "lib" / "libiomp5.so") if path is not None and path.exists()
    ]
    names = ", ".join(path.name for path in preload)
    return ServerSpec(
        name="vllm",
        about=f"bfloat16; OMP bound to {binding}; preloaded: {names or 'nothing'}; KV {_KV_GIB} GiB",
        argv=[
            str(layout.program("vllm", "vllm")), "serve", str(layout.hf_model), "--served-model-name", MODEL, "--dtype", "bfloat16",
            "--host", "127.0.0.1", "--port", str(port), "--max-model-len", str(_MAX_MODEL_LEN), "--max-num-seqs", "32",
        ],
        env={
            "VLLM_CPU_KVCACHE_SPACE": str(_KV_GIB),
            "VLLM_CPU_OMP_THREADS_BIND": binding,
            "LD_PRELOAD": ":".join(map(str, preload)),
            "HF_HUB_OFFLINE": "1",
            "VLLM_NO_USAGE_STATS": "1",
        },
        port=port,
        ready_path="/health",
        model=MODEL,
        start_limit_s=480.0,
        needs_bytes=6 << 30,
    )  # fmt: skip


def vllm_ngram(layout: Layout, port: int) -> ServerSpec:
    """The same with its prompt lookup."""
    drafts = '{"method": "ngram", "num_speculative_tokens": 5, "prompt_lookup_max": 4, "prompt_lookup_min": 2}'
    return _with_options(vllm(layout, port), "vllm-ngram", ["--speculative-config", drafts])


def llamacpp(layout: Layout, port: int) -> ServerSpec:
    """llama.cpp's server: bfloat16, its fastest form here, and KV of its own for each slot, which is faster than one for all."""
    threads = str(num_threads())
    return ServerSpec(
        name="llamacpp",
        about=f"bfloat16 GGUF; {_NUM_SLOTS} slots of {_SLOT_TOKENS} tokens, not unified",
        argv=[
            str(layout.llama_server), "-m", str(layout.bf16_gguf), "-t", threads, "-tb", threads, "-np", str(_NUM_SLOTS),
            "-c", str(_NUM_SLOTS * _SLOT_TOKENS), "--no-kv-unified", "-fa", "on", "--no-webui",
            "--host", "127.0.0.1", "--port", str(port),
        ],
        port=port,
        ready_path="/health",
        model=MODEL,
        needs_bytes=3 << 30,
    )  # fmt: skip


def llamacpp_q4(layout: Layout, port: int) -> ServerSpec:
    """The same with the model's own 4-bit file, which is what a user would give it; a later `-m` counts."""
    return _with_options(llamacpp(layout, port), "llamacpp-q4", ["-m", str(model_gguf())])


def llamacpp_ngram(layout: Layout, port: int) -> ServerSpec:
    """The same with its prompt lookup."""
    return _with_options(llamacpp(layout, port), "llamacpp-ngram", ["--spec-type", "ngram-simple"])


def _with_options(spec: ServerSpec, name: str, options: Sequence[str]) -> ServerSpec:
    return replace(spec, name=name, argv=[*spec.argv, *options], about=f"{spec.about}; {' '.join(options)}")


def openvino(layout: Layout, port: int) -> ServerSpec:
    """OpenVINO GenAI's continuous batching pipeline behind our small server."""
    return ServerSpec(
        name="openvino",
        about=f"8-bit weights; {num_threads()} threads; KV {_KV_GIB} GiB in its default type",
        argv=[
            str(layout.program("openvino", "python")), str(_OPENVINO_SERVER), str(layout.openvino_model), "--port", str(port),
            "--threads", str(num_threads()), "--cache-gib", str(_KV_GIB),
        ],
        port=port,
        ready_path="/health",
        model=MODEL,
        needs_bytes=2 << 30,
    )  # fmt: skip


def transformers(layout: Layout, port: int) -> ServerSpec:
    """`transformers serve` with continuous batching."""
    return ServerSpec(
        name="transformers",
        about="bfloat16; continuous batching; 512 KV blocks of 64 tokens",
        argv=[
            str(layout.program("transformers", "transformers")), "serve", str(layout.hf_model_endless), "--continuous-batching",
            "--device", "cpu", "--dtype", "bfloat16", "--attn-implementation", "sdpa", "--cb-num-blocks", "512",
            "--cb-block-size", "64", "--cb-max-batch-tokens", "512", "--host", "127.0.0.1", "--port", str(port),
        ],
        env={"OMP_NUM_THREADS": str(num_threads()), "HF_HUB_OFFLINE": "1"},
        port=port,
        ready_path="/health",
        model=str(layout.hf_model_endless),
        needs_bytes=3 << 30,
        sends_ignore_eos=False,
        sends_done=False,
        work_share=0.25,
    )  # fmt: skip

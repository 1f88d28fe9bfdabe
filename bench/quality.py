"""How near each way of computing comes to float32: `python -m bench.quality`.

The text is docstrings of the standard library, so every machine has it, cut into windows. transformers computes the next-token
distributions of every position in float32, from the very weights of the file; ours are set beside them: mean Kullback-Leibler
divergence in nats, perplexity, and how often the likeliest token is the same one.

It needs transformers, which is among the development packages.
"""

from __future__ import annotations

import argparse
import ast
import json
import math
import os
import sys
import tempfile
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Final

import torch
import transformers
from tokenizers import Tokenizer

from bench.machine import provenance
from bench.peers.hf_copy import write_hf_copy
from headrace.models.store import resolve
from headrace.models.weights import open_weights
from services.worker.layers.ops import Network, StepTensors
from services.worker.loading import LoadOptions, load_runner

WINDOW_TOKENS: Final = 512
PAGE_TOKENS: Final = 32
DEFAULT_TOKENS: Final = 20480
_MODULES: Final = (
    "argparse", "asyncio.tasks", "collections", "concurrent.futures._base", "configparser", "contextlib", "csv", "datetime",
    "decimal", "difflib", "doctest", "email.message", "fractions", "functools", "heapq", "http.client", "http.cookiejar", "inspect",
    "ipaddress", "json", "logging", "mailbox", "optparse", "os", "pathlib", "pdb", "pickle", "random", "shutil", "smtplib",
    "socket", "sqlite3", "statistics", "string", "subprocess", "tarfile", "tempfile", "textwrap", "threading", "turtle", "typing",
    "unittest.case", "unittest.mock", "urllib.request", "uuid", "zipfile",
)  # fmt: skip

NATIVE_CODES: Final = "native, weights of the file"
NATIVE_BFLOAT16: Final = "native, bfloat16"
TORCH_BFLOAT16: Final = "our torch path, bfloat16"
TRANSFORMERS_BFLOAT16: Final = "transformers, bfloat16"
NATIVE_CODES_FLOAT8_KV: Final = "native, weights of the file, float8 KV"
NATIVE_FLOAT8_KV: Final = "native, bfloat16, float8 KV"
TORCH_FLOAT8_KV: Final = "our torch path, bfloat16, float8 KV"


@dataclass(frozen=True, slots=True)
class Limit:
    """How far a way of computing may be from float32.

    Attributes:
        mean_kl_max: In nats.
        perplexity_change_max: Distance of the perplexity's ratio from 1.
        greedy_agreement_min: Share of positions.
    """

    mean_kl_max: float
    perplexity_change_max: float
    greedy_agreement_min: float

    def is_kept_by(self, way: Quality) -> bool:
        """Whether a way of computing is within all of it."""
        is_same_text = abs(way.perplexity_ratio - 1) <= self.perplexity_change_max
        return way.mean_kl <= self.mean_kl_max and is_same_text and way.greedy_agreement >= self.greedy_agreement_min


LIMITS: Final = {
    # int8 activations in groups of 32, on the file's own 4 and 8 bits.
    NATIVE_CODES: Limit(5e-3, 0.01, 0.95),
    NATIVE_BFLOAT16: Limit(1e-3, 0.005, 0.97),
    # torch rounds to bfloat16 between all operations; transformers' own bfloat16 is as far away.
    TORCH_BFLOAT16: Limit(3e-3, 0.01, 0.95),
    TRANSFORMERS_BFLOAT16: Limit(3e-3, 0.01, 0.95),
    # Asked for only (`worker.kv_cache_dtype`).
    NATIVE_CODES_FLOAT8_KV: Limit(2e-2, 0.02, 0.90),
    NATIVE_FLOAT8_KV: Limit(2e-2, 0.02, 0.90),
    TORCH_FLOAT8_KV: Limit(2e-2, 0.02, 0.90),
}
"""By name; docs/quality.md says what was measured."""

LogProbs = Callable[[list[int]], torch.Tensor]
"""Natural logarithms of the next-token distributions of all positions of a window, `[num_tokens, vocab_size]`."""


@dataclass(frozen=True, slots=True)
class Quality:
    """One way of computing beside float32, over `num_tokens` positions.

    Attributes:
        mean_kl: Mean of KL(float32 ‖ this), in nats.
        perplexity: Of the text; so is `perplexity_float32`.
        greedy_agreement: Share of positions where the likeliest token is float32's.
    """

    name: str
    num_tokens: int
    mean_kl: float
    perplexity: float
    perplexity_float32: float
    greedy_agreement: float

    @property
    def perplexity_ratio(self) -> float:
        """Perplexity over float32's."""
        return self.perplexity / self.perplexity_float32


def docstring_windows(tokenizer: Tokenizer, num_tokens: int, window_tokens: int = WINDOW_TOKENS) -> list[list[int]]:
    """The first tokens of the modules' docstrings, in windows.

    Raises:
        ValueError: The docstrings are fewer tokens.
    """
    token_ids: list[int] = []
    library = Path(os.__file__).parent
    for name in _MODULES:
        path = library.joinpath(*name.split("."))
        source = path / "__init__.py" if path.is_dir() else path.with_suffix(".py")
        text = "\n\n".join(_docstrings(ast.parse(source.read_text("utf-8"))))
        token_ids += tokenizer.encode(text + "\n\n", add_special_tokens=False).ids
        if len(token_ids) >= num_tokens:
            return [token_ids[start : start + window_tokens] for start in range(0, num_tokens, window_tokens)]
    raise ValueError(f"the docstrings are {len(token_ids)} tokens, fewer than {num_tokens}: ask for fewer")


def _docstrings(tree: ast.Module) -> Iterator[str]:
    for node in ast.walk(tree):
        if isinstance(node, ast.Module | ast.ClassDef | ast.FunctionDef | ast.AsyncFunctionDef) and (
            text := ast.get_docstring(node)
        ):
            yield text


def reference(directory: Path, dtype: torch.dtype = torch.float32) -> LogProbs:
    """transformers' model with the weights of a model directory; of another type, to say what that type alone costs."""
    model: Any = transformers.LlamaForCausalLM(transformers.LlamaConfig.from_pretrained(directory))
    weights = open_weights(directory)
    state = {name: torch.from_numpy(weights.load(name)) for name in weights.names()}
    # Raw 16-bit integers stand for bfloat16.
    state = {
        name: (tensor.view(torch.bfloat16) if tensor.dtype == torch.uint16 else tensor).float() for name, tensor in state.items()
    }
    state.setdefault("lm_head.weight", state["model.embed_tokens.weight"])
    model.load_state_dict(state)
    model = model.to(dtype).eval()

    def log_probs(window: list[int]) -> torch.Tensor:
        with torch.inference_mode():
            return torch.log_softmax(model(torch.tensor([window])).logits[0].float(), dim=-1)

    return log_probs


def ours(directory: Path, *, backend: str, dtype: str, kv_cache_dtype: str = "auto") -> LogProbs:
    """Our worker's network; every position of a window is sampled."""
    options = LoadOptions(
        directory=directory,
        backend=backend,
        num_threads=len(os.sched_getaffinity(0)),
        dtype=dtype,
        max_model_len=WINDOW_TOKENS,
        max_num_seqs=1,
        max_num_batched_tokens=WINDOW_TOKENS,
        page_size=PAGE_TOKENS,
        kv_cache_bytes=0,
        kv_cache_tokens=2 * WINDOW_TOKENS,
        kv_cache_dtype=kv_cache_dtype,
    )
    runner, _ = load_runner(options, cpu_flags=frozenset(), available_bytes=lambda: 4 << 30)
    network: Network = runner._network

    def log_probs(window: list[int]) -> torch.Tensor:
        return torch.log_softmax(network.forward(_whole_step(window)), dim=-1)

    return log_probs


def _whole_step(window: list[int]) -> StepTensors:
    """A window as one prefill, in the first pages."""
    count = len(window)
    positions = torch.arange(count)
    # Entries past the window repeat one of its pages, as far as kernels may look.
    pages = torch.arange(2 * WINDOW_TOKENS // PAGE_TOKENS + 4).clamp(max=(count - 1) // PAGE_TOKENS)
    return StepTensors(
        token_ids=torch.tensor(window),
        positions=positions,
        slot_mapping=positions,
        row_starts=torch.tensor([0]),
        row_counts=torch.tensor([count]),
        page_tables=pages[None],
        num_decode_rows=0,
        sampled_tokens=positions,
    )


def compare(windows: list[list[int]], expected: LogProbs, others: dict[str, LogProbs]) -> list[Quality]:
    """Set ways of computing beside float32's, window by window."""
    sums = {name: [0.0, 0.0, 0.0] for name in others}
    num_positions = num_targets = 0
    loss_float32 = 0.0
    for window in windows:
        theirs = expected(window)
        targets = torch.tensor(window[1:])
        num_positions += len(window)
        num_targets += len(window) - 1
        loss_float32 += _loss(theirs, targets)
        for name, log_probs in others.items():
            given = log_probs(window)
            divergences = (theirs.exp() * (theirs - given)).sum(dim=-1, dtype=torch.float64)
            agreed = (theirs.argmax(dim=-1) == given.argmax(dim=-1)).sum()
            for index, value in enumerate((float(divergences.sum()), _loss(given, targets), float(agreed))):
                sums[name][index] += value
    return [
        Quality(
            name=name,
            num_tokens=num_positions,
            mean_kl=divergence / num_positions,
            perplexity=math.exp(loss / num_targets),
            perplexity_float32=math.exp(loss_float32 / num_targets),
            greedy_agreement=agreed / num_positions,
        )
        for name, (divergence, loss, agreed) in sums.items()
    ]


def _loss(log_probs: torch.Tensor, targets: torch.Tensor) -> float:
    return -float(log_probs[:-1].gather(1, targets[:, None]).sum(dtype=torch.float64))


def measure(directory: Path, num_tokens: int, *, window_tokens: int = WINDOW_TOKENS) -> list[Quality]:
    """The file's own weights natively, and a bfloat16 copy natively and by torch; each beside float32 of the same weights."""
    windows = docstring_windows(Tokenizer.from_file(str(directory / "tokenizer.json")), num_tokens, window_tokens)
    own = {
        NATIVE_CODES: ours(directory, backend="native", dtype="auto"),
        NATIVE_CODES_FLOAT8_KV: ours(directory, backend="native", dtype="auto", kv_cache_dtype="fp8_e4m3"),
    }
    results = compare(windows, reference(directory), own)
    with tempfile.TemporaryDirectory(prefix="headrace-quality-") as folder:
        copy = Path(folder)
        write_hf_copy(directory, copy)
        others = {
            NATIVE_BFLOAT16: ours(copy, backend="native", dtype="bfloat16"),
            TORCH_BFLOAT16: ours(copy, backend="torch", dtype="bfloat16"),
            TRANSFORMERS_BFLOAT16: reference(copy, torch.bfloat16),
            NATIVE_FLOAT8_KV: ours(copy, backend="native", dtype="bfloat16", kv_cache_dtype="fp8_e4m3"),
            TORCH_FLOAT8_KV: ours(copy, backend="torch", dtype="bfloat16", kv_cache_dtype="fp8_e4m3"),
        }
        return results + compare(windows, reference(copy), others)


def table(results: list[Quality]) -> str:
    """The results as Markdown."""
    lines = ["| computed | tokens | mean KL (nats) | perplexity | over float32's | greedy agreement |", "|---|---|---|---|---|---|"]
    for each in results:
        numbers = f"{each.mean_kl:.2e} | {each.perplexity:.4f} | {each.perplexity_ratio:.5f} | {each.greedy_agreement:.2%}"
        lines.append(f"| {each.name} | {each.num_tokens} | {numbers} |")
    return "\n".join(lines)


def main(arguments: list[str]) -> int:
    """Print the table, and write everything as JSON where that is asked for; exit status 1 when a way is beyond its limit."""
    parser = argparse.ArgumentParser(prog="python -m bench.quality", description=__doc__.partition("\n")[0])
    parser.add_argument("--model", default="smollm2-135m-instruct", help="name in the store")
    parser.add_argument("--store", type=Path, default=Path("~/.cache/headrace/models"))
    parser.add_argument("--tokens", type=int, default=DEFAULT_TOKENS, help=f"a multiple of {WINDOW_TOKENS}")
    parser.add_argument("--json", type=Path, default=None, help="file to write")
    options = parser.parse_args(arguments)
    if options.tokens < WINDOW_TOKENS or options.tokens % WINDOW_TOKENS:
        parser.error(f"--tokens is {options.tokens}, not a multiple of {WINDOW_TOKENS}")
    results = measure(resolve(options.model, options.store.expanduser()), options.tokens)
    print(table(results))
    beyond = [each.name for each in results if not LIMITS[each.name].is_kept_by(each)]
    if options.json is not None:
        document: dict[str, Any] = {"provenance": provenance(), "results": [asdict(each) for each in results]}
        options.json.write_text(json.dumps(document, indent=2) + "\n")
    if beyond:
        print(f"beyond its limit: {', '.join(beyond)}", file=sys.stderr)
    return 1 if beyond else 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))

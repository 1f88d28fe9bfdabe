"""What is simulated: requests with arrival, lengths, tenant and prompt, generated or read from a file.

The file form is that of Mooncake's published traces: one JSON object a line with `timestamp` (ms), `input_length` and
`output_length` (tokens) and `hash_ids`, where each id names the tokens of one block of the prompt; equal ids mean equal tokens.
`hash_ids` may be missing or empty: such a prompt is like no other. Optional here: `tenant` (text) and `priority` (whole number).
"""

from __future__ import annotations

import json
import math
from array import array
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from functools import lru_cache
from typing import Any, Final

import numpy as np

VOCAB_SIZE: Final = 32_000
_FIELDS: Final = {"timestamp", "input_length", "output_length", "hash_ids", "tenant", "priority"}


class TraceError(ValueError):
    """A line of a trace cannot be used; the message has its number and what is wrong."""


@dataclass(frozen=True, slots=True)
class SimRequest:
    """One request: `arrival_ns` from the begin of the trace, the prompt's tokens, how many it will get."""

    arrival_ns: int
    prompt: array[int]
    num_output_tokens: int
    tenant: str = ""
    priority: int = 0


@dataclass(frozen=True)
class Workload:
    """What a generated trace is like. Lengths are lognormal with these means; `sigma` is that of their logarithm.

    Attributes:
        rate_per_s: Requests a second, arriving at random (Poisson) in bursts of `burst` at once.
        num_prefixes: Shared beginnings, each request has one of them at random; 0 for none.
        prefix_tokens: Their length; prompts are that and their own input.
        tenant_load: Shares of the requests by tenant.
    """

    num_requests: int
    rate_per_s: float
    mean_input_tokens: int = 512
    mean_output_tokens: int = 128
    sigma: float = 0.8
    max_tokens: int = 8192
    burst: int = 1
    num_prefixes: int = 0
    prefix_tokens: int = 0
    tenant_load: tuple[float, ...] = (1.0,)
    seed: int = 0


def generate(workload: Workload) -> Iterator[SimRequest]:
    """Make a trace; the same seed makes the same one."""
    random = np.random.default_rng(workload.seed)
    prefixes = [_random_tokens(random, workload.prefix_tokens) for _ in range(workload.num_prefixes)]
    shares = np.array(workload.tenant_load) / sum(workload.tenant_load)
    tenants = [f"tenant-{index}" if len(shares) > 1 else "" for index in range(len(shares))]
    arrival_s = 0.0
    for index in range(workload.num_requests):
        if index % workload.burst == 0:
            arrival_s += random.exponential(workload.burst / workload.rate_per_s)
        prompt = array("i")
        if prefixes:
            prompt.extend(prefixes[random.integers(len(prefixes))])
        prompt.extend(_random_tokens(random, _length(random, workload.mean_input_tokens, workload)))
        tenant = tenants[random.choice(len(tenants), p=shares)] if len(tenants) > 1 else ""
        yield SimRequest(int(arrival_s * 1e9), prompt, _length(random, workload.mean_output_tokens, workload), tenant)


def read_trace(lines: Iterable[str], *, block_tokens: int = 512) -> Iterator[SimRequest]:
    """Read a trace file's lines, in order of arrival.

    Raises:
        TraceError: A line is no such object, or goes back in time.
    """
    last_ms = 0.0
    for number, line in enumerate(lines, start=1):
        if not line.strip():
            continue
        entry = _parse(line, number)
        arrival_ms = _time_ms(entry, number)
        if arrival_ms < last_ms:
            raise TraceError(f"line {number}: timestamp {arrival_ms:g} is before that of the line above, {last_ms:g}")
        last_ms = arrival_ms
        num_input = _integer(entry, "input_length", number, least=1)
        num_output = _integer(entry, "output_length", number, least=1)
        tenant = entry.get("tenant", "")
        if not isinstance(tenant, str):
            raise TraceError(f"line {number}: tenant must be a text, is {tenant!r}")
        priority = _integer({"priority": 0, **entry}, "priority", number)
        prompt = _prompt_of_blocks(entry, num_input, block_tokens, number)
        yield SimRequest(int(arrival_ms * 1e6), prompt, num_output, tenant, priority)


def last_arrival_s(lines: Sequence[str]) -> float:
    """When the last request of a trace file's lines arrives; 0 without any.

    Raises:
        TraceError: The last line cannot be used.
    """
    for number in range(len(lines), 0, -1):
        if lines[number - 1].strip():
            return _time_ms(_parse(lines[number - 1], number), number) / 1e3
    return 0.0


def _parse(line: str, number: int) -> dict[str, Any]:
    try:
        entry = json.loads(line)
    except json.JSONDecodeError as error:
        raise TraceError(f"line {number}: no JSON: {error}") from error
    if not isinstance(entry, dict):
        raise TraceError(f"line {number}: must be an object, is {type(entry).__name__}")
    if unknown := sorted(entry.keys() - _FIELDS):
        raise TraceError(f"line {number}: unknown field {unknown[0]!r}; known: {', '.join(sorted(_FIELDS))}")
    return entry


def _field(entry: dict[str, Any], name: str, number: int) -> Any:
    if name not in entry:
        raise TraceError(f"line {number}: {name} is missing")
    return entry[name]


def _time_ms(entry: dict[str, Any], number: int) -> float:
    value = _field(entry, "timestamp", number)
    if isinstance(value, bool) or not isinstance(value, (int, float)) or not 0 <= value < math.inf:
        raise TraceError(f"line {number}: timestamp must be a number of at least 0, is {value!r}")
    return float(value)


def _integer(entry: dict[str, Any], name: str, number: int, *, least: int | None = None) -> int:
    value = _field(entry, name, number)
    if isinstance(value, bool) or not isinstance(value, int) or (least is not None and value < least):
        bound = "" if least is None else f" of at least {least}"
        raise TraceError(f"line {number}: {name} must be a whole number{bound}, is {value!r}")
    return value


def _prompt_of_blocks(entry: dict[str, Any], num_tokens: int, block_tokens: int, number: int) -> array[int]:
    ids = entry.get("hash_ids", [])
    if not isinstance(ids, list) or not all(isinstance(one, int) and one >= 0 for one in ids):
        raise TraceError(f"line {number}: hash_ids must be a list of whole numbers of at least 0")
    if len(ids) * block_tokens < num_tokens and ids:
        raise TraceError(f"line {number}: {len(ids)} hash_ids of {block_tokens} tokens are fewer than input_length {num_tokens}")
    if not ids:
        return _random_tokens(np.random.default_rng([number, num_tokens]), num_tokens)
    prompt = array("i")
    for one in ids:
        prompt.frombytes(_block(one, block_tokens))
    return prompt[:num_tokens]


@lru_cache(maxsize=100_000)
def _block(block_id: int, num_tokens: int) -> bytes:
    return _random_tokens(np.random.default_rng(block_id), num_tokens).tobytes()


def _random_tokens(random: np.random.Generator, num_tokens: int) -> array[int]:
    tokens = array("i")
    tokens.frombytes(random.integers(2, VOCAB_SIZE, num_tokens, dtype=np.int32).tobytes())
    return tokens


def _length(random: np.random.Generator, mean: int, workload: Workload) -> int:
    """A lognormal length with this mean, at least 1."""
    location = np.log(mean) - workload.sigma**2 / 2
    return int(min(max(1, round(random.lognormal(location, workload.sigma))), workload.max_tokens))

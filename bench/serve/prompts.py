"""Prompts for the load: random words that are mostly one token each, or the lines of a JSONL file. Pure.

No tokenizer is needed: the words are so common that nearly every vocabulary holds each, with its leading space, as one token.
How many tokens a prompt of n words really is (with a start token, a chat template, a rare split word) is asked of the server by a
probe; `fit` corrects the number of words by what it says.
"""

from __future__ import annotations

import json
import random
from collections.abc import Iterable, Sequence
from typing import Any

from bench.serve.records import RequestSpec

_WORDS_TEXT = """
time year people way day man thing woman life child world school state family student group country problem hand part place case
week company system program question work government number night point home water room mother area money story fact month lot
right study book eye job word business issue side kind head house service friend father power hour game line end member law car
city community name president team minute idea body information back parent face others level office door health person art war
history party result change reason research girl moment air teacher force education foot boy age policy music market sense nation
plan college interest death experience effect use class control care field development role rate heart drug show leader light
voice wife mind price report decision son view relationship town road arm difference value building action season tax director
position player record paper space ground form event official matter center site project activity star table need court oil cost
industry figure street image phone data picture practice piece land product doctor wall patient worker news test movie north love
step
"""
WORDS: tuple[str, ...] = tuple(_WORDS_TEXT.split())


def random_words(rng: random.Random, num_words: int) -> str:
    """That many random words, each but the first with its leading space."""
    return " ".join(rng.choices(WORDS, k=num_words))


def random_prompt(*, seed: int, level: str, index: int, num_words: int, num_shared_words: int = 0) -> str:
    """The prompt of one request: the same for the same arguments, otherwise different from its first words on.

    `num_shared_words` of it, its beginning, are common to all requests of a seed.
    """
    shared = random_words(random.Random(f"{seed}/shared"), num_shared_words)
    # Python hashes a string seed with SHA-512, so neighbouring indices share nothing.
    own = random_words(random.Random(f"{seed}/{level}/{index}"), num_words - num_shared_words)
    return f"{shared} {own}".strip()


def fit(*, num_words: int, measured_tokens: int, wanted_tokens: int) -> int:
    """How many words give `wanted_tokens`, when `num_words` gave `measured_tokens`; at least one."""
    return max(1, num_words - (measured_tokens - wanted_tokens))


def parse_dataset(lines: Iterable[str], *, num_output_tokens: int) -> list[RequestSpec]:
    """Read requests from JSONL: `{"prompt": "..."}` or `{"messages": [...]}`, each with an optional `output_tokens`.

    Raises:
        ValueError: A line is not such an object; the message names the line.
    """
    specs: list[RequestSpec] = []
    for number, line in enumerate(lines, start=1):
        if not line.strip():
            continue
        try:
            entry = json.loads(line)
        except json.JSONDecodeError as error:
            raise ValueError(f"line {number}: not JSON: {error}") from error
        prompt = _prompt_of(entry)
        if prompt is None:
            raise ValueError(f"line {number}: needs `prompt` (text) or `messages` (a non-empty list of objects)")
        wanted = entry.get("output_tokens", num_output_tokens)
        if not isinstance(wanted, int) or isinstance(wanted, bool) or wanted < 1:
            raise ValueError(f"line {number}: `output_tokens` must be an integer of at least 1, is {wanted!r}")
        specs.append(RequestSpec(index=len(specs), prompt=prompt, num_output_tokens=wanted))
    if not specs:
        raise ValueError("the data set has no line")
    return specs


def _prompt_of(entry: Any) -> str | list[dict[str, Any]] | None:
    if not isinstance(entry, dict):
        return None
    prompt, messages = entry.get("prompt"), entry.get("messages")
    if isinstance(prompt, str) and prompt:
        return prompt
    if isinstance(messages, list) and messages and all(isinstance(message, dict) for message in messages):
        return messages
    return None


def cycle_dataset(specs: Sequence[RequestSpec], num_requests: int) -> list[RequestSpec]:
    """Exactly `num_requests` requests: the data set from its start, again and again where it is shorter."""
    return [
        RequestSpec(index=index, prompt=spec.prompt, num_output_tokens=spec.num_output_tokens)
        for index in range(num_requests)
        for spec in (specs[index % len(specs)],)
    ]


def poisson_offsets_ns(*, rate_per_s: float, num_requests: int, seed: int) -> list[int]:
    """When each request of an open loop is due, from the start: a Poisson process with that mean rate; the first is due at once."""
    rng = random.Random(f"{seed}/arrivals/{rate_per_s}")
    offsets, elapsed_s = [], 0.0
    for _ in range(num_requests):
        offsets.append(round(elapsed_s * 1e9))
        elapsed_s += rng.expovariate(rate_per_s)
    return offsets

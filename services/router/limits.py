"""Ranges of request fields, the same for every protocol. A refusal names the field, the limit and the value."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any, NoReturn

import numpy as np

from headrace.errors import InvalidRequestError
from headrace.priorities import PRIORITY_MAX, PRIORITY_MIN
from services.router.generation import SPECULATIVE_METHODS, Sampling, Speculative, Stopping, TokenArray

MAX_TEMPERATURE = 2.0
MAX_INT32 = 2**31 - 1
MIN_SEED, MAX_SEED = -(2**63), 2**64 - 1
MAX_STOP_STRINGS = 16
MAX_STOP_CHARS = 256
MAX_STOP_TOKENS = 64
MAX_MESSAGES = 16384
MAX_SALT_CHARS = 256
MAX_SPECULATIVE_TOKENS = 64
MAX_CHOICES = 128
MAX_SEQUENCES = 1024
MAX_PROMPT_TOKENS = 4 * 1024 * 1024
MAX_PENALTY = 2.0
MAX_BIAS = 100.0
MAX_BIASED_TOKENS = 1024
MAX_LOGPROBS = 20
MAX_INPUTS = 2048
MAX_DEPTH = 128
"""Most levels of objects and arrays within each other: far from where Python's and orjson's recursion ends (254 at the least)."""
_SHOWN_CHARS = 60


def shown(value: object) -> str:
    """A value as an error message shows it: short."""
    try:
        text = repr(value)
    except RecursionError:
        return "a value that is nested too deeply to be shown"
    return text if len(text) <= _SHOWN_CHARS else text[:_SHOWN_CHARS] + "…"


def refuse(param: str, limit: str, value: object) -> NoReturn:
    """Raise the error that names the field, the limit and the value."""
    raise InvalidRequestError(f"{param} must be {limit}; got {shown(value)}", param=param)


def check_depth(param: str, value: object) -> None:
    """Refuse a JSON value with more levels than what comes later can follow."""
    level: list[Any] = [value] if isinstance(value, (dict, list)) else []
    for _ in range(MAX_DEPTH):
        inside = (inner for outer in level for inner in (outer.values() if isinstance(outer, dict) else outer))
        level = [inner for inner in inside if isinstance(inner, (dict, list))]
        if not level:
            return
    if level:
        refuse(param, f"nested at most {MAX_DEPTH} deep", "one that is deeper")


def check_cache_salt(salt: str | None) -> str:
    """Refuse a salt that is empty or too long; gives it, empty for none."""
    if salt is not None and not 0 < len(salt) <= MAX_SALT_CHARS:
        refuse("cache_salt", f"a string of 1 to {MAX_SALT_CHARS} characters", salt)
    return salt or ""


def check_speculative(speculative: Speculative) -> None:
    """Refuse a method that is not known, and a number of tokens that is out of range or means nothing."""
    if speculative.method not in (None, *SPECULATIVE_METHODS):
        refuse("speculative.method", f"one of {', '.join(SPECULATIVE_METHODS)}", speculative.method)
    _check_int("speculative.num_speculative_tokens", speculative.num_tokens, least=1, most=MAX_SPECULATIVE_TOKENS)
    if speculative.method == "off" and speculative.num_tokens is not None:
        refuse("speculative.num_speculative_tokens", "left out where speculative.method is off", speculative.num_tokens)


def check_reasoning_budget(param: str, budget_tokens: int | None) -> None:
    """Refuse a budget that is none."""
    _check_int(param, budget_tokens, least=1, most=MAX_INT32)


def check_num_choices(param: str, num_choices: int) -> None:
    """Refuse a number of choices out of range."""
    _check_int(param, num_choices, least=1, most=MAX_CHOICES)


def check_best_of(best_of: int, num_choices: int, *, is_streaming: bool) -> None:
    """Refuse to choose the best of fewer than are wanted, or while they are streamed."""
    _check_int("best_of", best_of, least=num_choices, most=MAX_CHOICES)
    if is_streaming:
        refuse("best_of", f"n, {num_choices}, when stream is true", best_of)


def check_num_sequences(num_prompts: int, num_choices: int) -> None:
    """Refuse a request of too many outputs."""
    if num_prompts * num_choices > MAX_SEQUENCES:
        refuse(
            "prompt", f"at most {MAX_SEQUENCES // num_choices} prompts with {num_choices} choices each", f"{num_prompts} of them"
        )


def check_priority(priority: int) -> None:
    """Refuse a priority out of range."""
    if not PRIORITY_MIN <= priority <= PRIORITY_MAX:
        refuse("priority", f"between {PRIORITY_MIN} and {PRIORITY_MAX}", priority)


def _check_float(param: str, value: float | None, *, least: float, most: float, is_least_open: bool = False) -> None:
    if value is None:
        return
    bracket = "(" if is_least_open else "["
    if not math.isfinite(value) or value > most or value < least or (is_least_open and value == least):
        refuse(param, f"in {bracket}{least:g}, {most:g}]", value)


def _check_int(param: str, value: int | None, *, least: int, most: int) -> None:
    if value is not None and not least <= value <= most:
        refuse(param, f"in [{least}, {most}]", value)


def check_sampling(sampling: Sampling) -> None:
    """Refuse values no sampler can honour."""
    _check_float("temperature", sampling.temperature, least=0.0, most=MAX_TEMPERATURE)
    _check_float("top_p", sampling.top_p, least=0.0, most=1.0, is_least_open=True)
    _check_int("top_k", sampling.top_k, least=-1, most=MAX_INT32)
    _check_float("min_p", sampling.min_p, least=0.0, most=1.0)
    _check_int("seed", sampling.seed, least=MIN_SEED, most=MAX_SEED)
    _check_float("frequency_penalty", sampling.frequency_penalty, least=-MAX_PENALTY, most=MAX_PENALTY)
    _check_float("presence_penalty", sampling.presence_penalty, least=-MAX_PENALTY, most=MAX_PENALTY)
    _check_float("repetition_penalty", sampling.repetition_penalty, least=0.0, most=MAX_PENALTY, is_least_open=True)
    _check_logit_bias(sampling.logit_bias)


def _check_logit_bias(biases: tuple[tuple[int, float], ...]) -> None:
    if len(biases) > MAX_BIASED_TOKENS:
        refuse("logit_bias", f"of at most {MAX_BIASED_TOKENS} tokens", f"{len(biases)} of them")
    named = set()
    for token_id, bias in biases:
        if not 0 <= token_id <= MAX_INT32:
            refuse("logit_bias", f"of token ids in [0, {MAX_INT32}]", token_id)
        if not -MAX_BIAS <= bias <= MAX_BIAS:
            refuse(f"logit_bias.{token_id}", f"in [{-MAX_BIAS:g}, {MAX_BIAS:g}]", bias)
        if token_id in named:
            refuse("logit_bias", "of tokens that are named once each", f"{token_id} twice")
        named.add(token_id)


def check_logprobs(param: str, num_top: int | None) -> None:
    """Refuse to tell of more tokens than are worth sending."""
    _check_int(param, num_top, least=0, most=MAX_LOGPROBS)


def check_stopping(stopping: Stopping, *, max_tokens_param: str = "max_tokens") -> None:
    """Refuse values that could never stop a sequence as asked."""
    _check_int(max_tokens_param, stopping.max_tokens, least=1, most=MAX_INT32)
    _check_int("min_tokens", stopping.min_tokens, least=0, most=MAX_INT32)
    if stopping.max_tokens is not None and stopping.min_tokens > stopping.max_tokens:
        refuse("min_tokens", f"at most {max_tokens_param}, {stopping.max_tokens}", stopping.min_tokens)
    if len(stopping.stop) > MAX_STOP_STRINGS:
        refuse("stop", f"at most {MAX_STOP_STRINGS} strings", f"{len(stopping.stop)} strings")
    for text in stopping.stop:
        if not 1 <= len(text) <= MAX_STOP_CHARS:
            refuse("stop", f"strings of 1 to {MAX_STOP_CHARS} characters", f"one of {len(text)}")
    if len(stopping.stop_token_ids) > MAX_STOP_TOKENS:
        refuse("stop_token_ids", f"at most {MAX_STOP_TOKENS} ids", f"{len(stopping.stop_token_ids)} ids")
    for token_id in stopping.stop_token_ids:
        _check_int("stop_token_ids", token_id, least=0, most=MAX_INT32)


def check_token_ids(param: str, token_ids: Sequence[int]) -> TokenArray:
    """Token ids as an array; each must be a non-negative int32. The vocabulary's size is the tokenizer's to check."""
    if not 1 <= len(token_ids) <= MAX_PROMPT_TOKENS:
        refuse(param, f"1 to {MAX_PROMPT_TOKENS} token ids", f"{len(token_ids)} of them")
    for token_id in token_ids:
        # JSON's true is an int in Python; a prompt's array may hold anything.
        if type(token_id) is not int or not 0 <= token_id <= MAX_INT32:
            refuse(param, f"token ids in [0, {MAX_INT32}]", token_id)
    return np.asarray(token_ids, dtype=np.int32)


def seed_bits(seed: int) -> int:
    """A seed as the unsigned 64-bit number the wire carries; negative ones wrap."""
    return seed & (2**64 - 1)

"""Typed reading of a model directory's JSON files: config.json, generation_config.json, tokenizer_config.json, chat template.

Read by the tokenizer (lengths, chat template), the scheduler's side of registration (context length) and the worker (shape of the
network). Values are checked here, once, so that a damaged directory stops the start with one line and not a run with a traceback.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Final

from headrace.errors import ModelError

CONFIG_FILE: Final = "config.json"
GENERATION_CONFIG_FILE: Final = "generation_config.json"
TOKENIZER_FILE: Final = "tokenizer.json"
TOKENIZER_CONFIG_FILE: Final = "tokenizer_config.json"
CHAT_TEMPLATE_FILE: Final = "chat_template.jinja"

_JSON_BYTES_MAX: Final = 64 * 1024 * 1024
_SIZE_MAX: Final = 1 << 31
_PULL_AGAIN: Final = "pull the model again"


@dataclass(frozen=True, slots=True)
class ModelConfig:
    """The shape of a decoder-only text model, as config.json gives it.

    Attributes:
        architecture: Class name, for example `LlamaForCausalLM`.
        head_dim: Size of one attention head; `hidden_size / num_heads` where the file does not say.
        max_position_embeddings: Context length, in tokens.
        rope_theta: Base of the rotary frequencies, from the old or the new place in the file.
        rope_scaling: Scaling of positions with its `rope_type`, or None for plain rotary embedding.
        eos_token_ids: Tokens that end an answer: generation_config.json's, else config.json's.
        raw: The whole config.json, for what only one model family knows.
    """

    architecture: str
    vocab_size: int
    hidden_size: int
    intermediate_size: int
    num_layers: int
    num_heads: int
    num_kv_heads: int
    head_dim: int
    max_position_embeddings: int
    rms_norm_eps: float
    rope_theta: float
    rope_scaling: dict[str, Any] | None
    tie_word_embeddings: bool
    attention_bias: bool
    mlp_bias: bool
    hidden_act: str
    eos_token_ids: tuple[int, ...]
    bos_token_id: int | None
    raw: dict[str, Any] = field(repr=False, compare=False)


@dataclass(frozen=True, slots=True)
class TokenizerConfig:
    """What tokenizer_config.json says that tokenizer.json does not.

    Attributes:
        chat_template: Jinja source; None for a model without one.
        special_tokens: Named special tokens, for example `{"bos_token": "<s>"}`: chat templates refer to them by name.
    """

    chat_template: str | None
    special_tokens: dict[str, str]
    raw: dict[str, Any] = field(repr=False, compare=False)


def load_model_config(directory: Path) -> ModelConfig:
    """Read config.json, and the end-of-text tokens of generation_config.json.

    Raises:
        ModelError: A file is missing or damaged, or a value is missing, of the wrong kind, or contradicts another.
    """
    raw = read_json_object(directory / CONFIG_FILE)
    values = _Values(raw, directory / CONFIG_FILE)
    num_heads = values.size("num_attention_heads")
    num_kv_heads = values.size("num_key_value_heads", default=num_heads)
    if num_heads % num_kv_heads:
        raise values.bad("num_key_value_heads", f"is {num_kv_heads}, which does not divide num_attention_heads {num_heads}")
    hidden_size = values.size("hidden_size")
    if raw.get("head_dim") is None and hidden_size % num_heads:
        raise values.bad("num_attention_heads", f"is {num_heads}, which does not divide hidden_size {hidden_size}")
    rope_theta, rope_scaling = _rope(values)
    vocab_size = values.size("vocab_size")
    return ModelConfig(
        architecture=_architecture(values),
        vocab_size=vocab_size,
        hidden_size=hidden_size,
        intermediate_size=values.size("intermediate_size"),
        num_layers=values.size("num_hidden_layers"),
        num_heads=num_heads,
        num_kv_heads=num_kv_heads,
        head_dim=values.size("head_dim", default=hidden_size // num_heads),
        max_position_embeddings=values.size("max_position_embeddings"),
        rms_norm_eps=values.positive("rms_norm_eps", default=1e-6),
        rope_theta=rope_theta,
        rope_scaling=rope_scaling,
        tie_word_embeddings=values.flag("tie_word_embeddings"),
        attention_bias=values.flag("attention_bias"),
        mlp_bias=values.flag("mlp_bias"),
        hidden_act=values.text("hidden_act", default="silu"),
        eos_token_ids=_eos_token_ids(directory, values, vocab_size),
        bos_token_id=next(iter(values.token_ids("bos_token_id", vocab_size)), None),
        raw=raw,
    )


def load_generation_defaults(directory: Path) -> dict[str, Any]:
    """Give the model's own sampling defaults as its generation_config.json has them; empty without that file.

    Only what describes sampling is kept: `temperature`, `top_p`, `top_k`, `min_p`, `repetition_penalty`, `do_sample`,
    `max_new_tokens`.

    Raises:
        ModelError: The file is damaged, or a value is not a number.
    """
    path = directory / GENERATION_CONFIG_FILE
    if not path.is_file():
        return {}
    raw = read_json_object(path)
    defaults: dict[str, Any] = {}
    for name in ("temperature", "top_p", "top_k", "min_p", "repetition_penalty", "do_sample", "max_new_tokens"):
        value = raw.get(name)
        if value is None:
            continue
        if not isinstance(value, (int, float)):
            raise ModelError(f"{path}: {name} is {value!r}, not a number; {_PULL_AGAIN}")
        defaults[name] = value
    return defaults


def load_tokenizer_config(directory: Path) -> TokenizerConfig:
    """Read tokenizer_config.json, and chat_template.jinja, which leads where both have a template.

    Raises:
        ModelError: A file is damaged, or the template is not text.
    """
    path = directory / TOKENIZER_CONFIG_FILE
    raw = read_json_object(path) if path.is_file() else {}
    special_tokens: dict[str, str] = {}
    for name, value in raw.items():
        # A token is its text, or an object that holds the text with flags.
        content = value.get("content") if isinstance(value, dict) else value
        if name.endswith("_token") and isinstance(content, str):
            special_tokens[name] = content
    return TokenizerConfig(chat_template=_chat_template(directory, raw), special_tokens=special_tokens, raw=raw)


class _Values:
    """Checked access to one JSON object; errors name the file, the key and the value."""

    def __init__(self, raw: Mapping[str, Any], path: Path) -> None:
        self.raw = raw
        self.path = path

    def bad(self, key: str, what: str) -> ModelError:
        return ModelError(f"{self.path}: {key} {what}; {_PULL_AGAIN}", param=key)

    def size(self, key: str, *, default: int | None = None) -> int:
        value = self.raw.get(key)
        if value is None:
            value = default
        if value is None:
            raise self.bad(key, "is missing")
        if isinstance(value, bool) or not isinstance(value, int) or not 0 < value < _SIZE_MAX:
            raise self.bad(key, f"is {value!r}, not a whole number from 1 to {_SIZE_MAX - 1}")
        return value

    def positive(self, key: str, *, default: float) -> float:
        return self.checked_positive(key, self.raw.get(key, default))

    def checked_positive(self, key: str, value: Any) -> float:
        if isinstance(value, bool) or not isinstance(value, (int, float)) or not 0 < value < float("inf"):
            raise self.bad(key, f"is {value!r}, not a number above 0")
        return float(value)

    def flag(self, key: str) -> bool:
        value = self.raw.get(key)
        if value is not None and not isinstance(value, bool):
            raise self.bad(key, f"is {value!r}, not true or false")
        return bool(value)

    def text(self, key: str, *, default: str) -> str:
        value = self.raw.get(key, default)
        if not isinstance(value, str):
            raise self.bad(key, f"is {value!r}, not text")
        return value

    def token_ids(self, key: str, vocab_size: int) -> tuple[int, ...]:
        value = self.raw.get(key)
        ids = [] if value is None else value if isinstance(value, list) else [value]
        for token_id in ids:
            if isinstance(token_id, bool) or not isinstance(token_id, int) or not 0 <= token_id < vocab_size:
                raise self.bad(key, f"is {value!r}, not token ids from 0 to {vocab_size - 1}")
        return tuple(ids)


def _architecture(values: _Values) -> str:
    architectures = values.raw.get("architectures")
    if not isinstance(architectures, list) or len(architectures) != 1 or not isinstance(architectures[0], str):
        raise values.bad("architectures", f"is {architectures!r}, not a list of one class name")
    return architectures[0]


def _rope(values: _Values) -> tuple[float, dict[str, Any] | None]:
    """Accept both places: `rope_theta` with `rope_scaling`, and transformers 5's `rope_parameters`, which holds both."""
    parameters = values.raw.get("rope_parameters")
    key = "rope_scaling" if parameters is None else "rope_parameters"
    scaling = values.raw.get("rope_scaling") if parameters is None else parameters
    if scaling is not None and not isinstance(scaling, dict):
        raise values.bad(key, f"is {scaling!r}, not an object")
    scaling = dict(scaling or {})
    theta = scaling.pop("rope_theta", None)
    if theta is None:
        theta = values.raw.get("rope_theta", 10000.0)
    theta = values.checked_positive("rope_theta", theta)
    # `type` is the older spelling; files of the years between carry both.
    legacy_type = scaling.pop("type", None)
    rope_type = scaling.setdefault("rope_type", legacy_type or "default")
    if not isinstance(rope_type, str):
        raise values.bad(key, f"has rope_type {rope_type!r}, not text")
    return theta, None if rope_type == "default" else scaling


def _eos_token_ids(directory: Path, values: _Values, vocab_size: int) -> tuple[int, ...]:
    path = directory / GENERATION_CONFIG_FILE
    if path.is_file():
        ids = _Values(read_json_object(path), path).token_ids("eos_token_id", vocab_size)
        if ids:
            return ids
    return values.token_ids("eos_token_id", vocab_size)


def _chat_template(directory: Path, raw: Mapping[str, Any]) -> str | None:
    path = directory / CHAT_TEMPLATE_FILE
    if path.is_file():
        try:
            return path.read_text(encoding="utf-8")
        except (OSError, UnicodeDecodeError) as error:
            raise ModelError(f"{path}: cannot be read: {error}; {_PULL_AGAIN}") from error
    template = raw.get("chat_template")
    if isinstance(template, list):
        # Some models name several templates; the one called "default" is for plain chat.
        named = {item.get("name"): item.get("template") for item in template if isinstance(item, dict)}
        template = named.get("default")
    if template is not None and not isinstance(template, str):
        raise ModelError(f"{directory / TOKENIZER_CONFIG_FILE}: chat_template is not text; {_PULL_AGAIN}")
    return template


def read_json_object(path: Path) -> dict[str, Any]:
    """Read a JSON file of bounded size.

    Raises:
        ModelError: It is missing, too large, not JSON, or not an object.
    """
    try:
        if path.stat().st_size > _JSON_BYTES_MAX:
            raise ModelError(f"{path}: larger than {_JSON_BYTES_MAX} bytes; {_PULL_AGAIN}")
        value = json.loads(path.read_bytes())
    except FileNotFoundError as error:
        raise ModelError(f"{path}: missing; get the model with `headrace models pull <name>`") from error
    except (OSError, ValueError, RecursionError) as error:
        raise ModelError(f"{path}: cannot be read: {error}; {_PULL_AGAIN}") from error
    if not isinstance(value, dict):
        raise ModelError(f"{path}: is not a JSON object; {_PULL_AGAIN}")
    return value

"""Typed reading of a model directory's JSON files: config.json, generation_config.json, tokenizer_config.json, chat template.

Read by the tokenizer (lengths, chat template), the scheduler's side of registration (context length) and the worker (shape of the
network). Values are checked here, once, so that a damaged directory stops the start with one line and not a run with a traceback.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Final

from headrace.errors import ModelError
from headrace.models.config_defaults import CONFIG_DEFAULTS
from headrace.models.config_fields import PULL_AGAIN, ConfigFields
from headrace.models.json_file import read_json_object

CONFIG_FILE: Final = "config.json"
GENERATION_CONFIG_FILE: Final = "generation_config.json"
TOKENIZER_FILE: Final = "tokenizer.json"
TOKENIZER_CONFIG_FILE: Final = "tokenizer_config.json"
CHAT_TEMPLATE_FILE: Final = "chat_template.jinja"

_NESTED_TEXT: Final = "text_config"
_LAYER_TYPES: Final = ("full_attention", "sliding_attention", "chunked_attention", "linear_attention")
_ROPE_TYPES_WITH_ORIGIN: Final = ("llama3", "yarn", "longrope")


@dataclass(frozen=True, slots=True)
class RopeConfig:
    """Rotary position embedding of some layers.

    Attributes:
        theta: Base of the frequencies.
        rotary_factor: How much of each head, from its start, is turned.
        scaling: Scaling of positions with its `rope_type`, or None for plain rotary embedding. What config.json says beside it of
            the context before scaling is in it too, as `original_max_position_embeddings`.
    """

    theta: float
    rotary_factor: float = 1.0
    scaling: Mapping[str, Any] | None = None


@dataclass(frozen=True, slots=True)
class ModelConfig:
    """The shape of a text model, as config.json gives it. A file that nests it in `text_config` reads as if it did not.

    Attributes:
        architecture: Class name, for example `LlamaForCausalLM`.
        head_dim: Size of one attention head; `hidden_size / num_heads` where the file does not say.
        max_position_embeddings: Context length, in tokens.
        rope: Rotary embedding, from the old or the new place in the file.
        ropes_by_layer_type: By `full_attention` and the like, where the file tells them apart; else empty.
        eos_token_ids: Tokens that end an answer: generation_config.json's, else config.json's.
        fields: All of config.json, for what only some families know.
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
    rope: RopeConfig
    ropes_by_layer_type: Mapping[str, RopeConfig]
    tie_word_embeddings: bool
    eos_token_ids: tuple[int, ...]
    bos_token_id: int | None
    fields: ConfigFields = field(repr=False, compare=False)

    @property
    def max_model_len(self) -> int:
        """Longest sequence that the model can be set to, in tokens: past its context length if scaled positions reach further."""
        scaling = self.rope.scaling or {}
        factor = scaling.get("factor")
        origin = {"dynamic": self.max_position_embeddings, "yarn": scaling.get("original_max_position_embeddings")}.get(
            scaling.get("rope_type", "default")
        )
        if not isinstance(factor, (int, float)) or not isinstance(origin, int) or not 1 < factor < math.inf:
            return self.max_position_embeddings
        return max(self.max_position_embeddings, int(origin * factor))


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
    fields = _read_fields(directory / CONFIG_FILE)
    num_heads = fields.size("num_attention_heads")
    num_kv_heads = fields.size("num_key_value_heads", default=num_heads)
    if num_heads % num_kv_heads:
        raise fields.bad("num_key_value_heads", f"is {num_kv_heads}, which does not divide num_attention_heads {num_heads}")
    hidden_size = fields.size("hidden_size")
    if fields.get("head_dim") is None and hidden_size % num_heads:
        raise fields.bad("num_attention_heads", f"is {num_heads}, which does not divide hidden_size {hidden_size}")
    vocab_size = fields.size("vocab_size")
    max_position_embeddings = fields.size("max_position_embeddings")
    rope, ropes_by_layer_type = _ropes(fields, max_position_embeddings)
    return ModelConfig(
        architecture=_architecture(fields),
        vocab_size=vocab_size,
        hidden_size=hidden_size,
        intermediate_size=fields.size("intermediate_size"),
        num_layers=fields.size("num_hidden_layers"),
        num_heads=num_heads,
        num_kv_heads=num_kv_heads,
        head_dim=fields.size("head_dim", default=hidden_size // num_heads),
        max_position_embeddings=max_position_embeddings,
        rms_norm_eps=fields.positive("rms_norm_eps", default=1e-6),
        rope=rope,
        ropes_by_layer_type=ropes_by_layer_type,
        tie_word_embeddings=fields.flag("tie_word_embeddings"),
        eos_token_ids=_eos_token_ids(directory, fields, vocab_size),
        bos_token_id=next(iter(fields.token_ids("bos_token_id", vocab_size)), None),
        fields=fields,
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
            raise ModelError(f"{path}: {name} is {value!r}, not a number; {PULL_AGAIN}")
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


def _read_fields(path: Path) -> ConfigFields:
    raw = read_json_object(path)
    architecture = _architecture(ConfigFields(raw, path))
    nested = raw.get(_NESTED_TEXT)
    if nested is not None:
        if not isinstance(nested, dict):
            raise ConfigFields(raw, path).bad(_NESTED_TEXT, "is not an object")
        # What describes the text model leads; what is said of the whole, such as its end tokens, stands beside it.
        raw = {key: value for key, value in raw.items() if key != _NESTED_TEXT} | {
            key: value for key, value in nested.items() if key != "architectures"
        }
    return ConfigFields(raw, path, defaults=CONFIG_DEFAULTS.get(architecture, {}))


def _architecture(fields: ConfigFields) -> str:
    architectures = fields.get("architectures")
    if not isinstance(architectures, list) or len(architectures) != 1 or not isinstance(architectures[0], str):
        raise fields.bad("architectures", f"is {architectures!r}, not a list of one class name")
    return architectures[0]


def _ropes(fields: ConfigFields, max_position_embeddings: int) -> tuple[RopeConfig, dict[str, RopeConfig]]:
    """Accept all places: `rope_theta` with `rope_scaling`, and transformers 5's `rope_parameters`, by layer type or for all."""
    parameters = fields.get("rope_parameters")
    scaling = fields.get("rope_scaling")
    key = "rope_scaling" if parameters is None else "rope_parameters"
    found = scaling if parameters is None else parameters
    if found is not None and not isinstance(found, dict):
        raise fields.bad(key, f"is {found!r}, not an object")
    reader = _RopeReader(fields, key, max_position_embeddings)
    nested = {layer_type: value for layer_type, value in (found or {}).items() if layer_type in _LAYER_TYPES}
    if not nested:
        return reader.read(found or {}), {}
    by_layer_type = {}
    for layer_type, value in nested.items():
        if not isinstance(value, dict):
            raise fields.bad(key, f"has {layer_type} {value!r}, not an object")
        if value.get("rope_theta") is None and fields.raw.get("rope_theta") is None:
            # Families have defaults by layer type, and writers of this form leave none out.
            raise fields.bad(key, f"has no rope_theta for {layer_type}")
        by_layer_type[layer_type] = reader.read(value)
    first = next(iter(by_layer_type.values()))
    return by_layer_type.get("full_attention", first), by_layer_type


class _RopeReader:
    """Reads one object of rotary parameters; what it lacks is looked for beside it, in the file."""

    def __init__(self, fields: ConfigFields, key: str, max_position_embeddings: int) -> None:
        self._fields = fields
        self._key = key
        self._theta = fields.get("rope_theta", 10000.0)
        self._rotary_factor = fields.get("partial_rotary_factor", 1.0)
        self._origin = fields.get("original_max_position_embeddings")
        self._max_position_embeddings = max_position_embeddings

    def read(self, parameters: Mapping[str, Any]) -> RopeConfig:
        scaling = {name: value for name, value in parameters.items() if value is not None}
        theta = self._fields.checked_positive("rope_theta", scaling.pop("rope_theta", self._theta))
        rotary_factor = self._fields.checked_positive(
            "partial_rotary_factor", scaling.pop("partial_rotary_factor", self._rotary_factor)
        )
        if rotary_factor > 1:
            raise self._fields.bad("partial_rotary_factor", f"is {rotary_factor}, not a number up to 1")
        # `type` is the older spelling; files of the years between carry both.
        legacy_type = scaling.pop("type", None)
        rope_type = scaling.setdefault("rope_type", legacy_type or "default")
        if not isinstance(rope_type, str):
            raise self._fields.bad(self._key, f"has rope_type {rope_type!r}, not text")
        if rope_type in _ROPE_TYPES_WITH_ORIGIN:
            origin = self._origin or scaling.get("original_max_position_embeddings", self._max_position_embeddings)
            scaling["original_max_position_embeddings"] = origin
        is_plain = scaling == {"rope_type": "default"}
        return RopeConfig(theta, rotary_factor, None if is_plain else scaling)


def _eos_token_ids(directory: Path, fields: ConfigFields, vocab_size: int) -> tuple[int, ...]:
    own = fields.token_ids("eos_token_id", vocab_size)
    path = directory / GENERATION_CONFIG_FILE
    if path.is_file():
        return ConfigFields(read_json_object(path), path).token_ids("eos_token_id", vocab_size) or own
    return own


def _chat_template(directory: Path, raw: Mapping[str, Any]) -> str | None:
    path = directory / CHAT_TEMPLATE_FILE
    if path.is_file():
        try:
            return path.read_text(encoding="utf-8")
        except (OSError, UnicodeDecodeError) as error:
            raise ModelError(f"{path}: cannot be read: {error}; {PULL_AGAIN}") from error
    template = raw.get("chat_template")
    if isinstance(template, list):
        # Some models name several templates; the one called "default" is for plain chat.
        named = {item.get("name"): item.get("template") for item in template if isinstance(item, dict)}
        template = named.get("default")
    if template is not None and not isinstance(template, str):
        raise ModelError(f"{directory / TOKENIZER_CONFIG_FILE}: chat_template is not text; {PULL_AGAIN}")
    return template

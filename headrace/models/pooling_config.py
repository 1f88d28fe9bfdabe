"""How an encoder's directory says that a text's tokens become one vector: modules.json and the files that it points to.

A directory without modules.json means the mean over the tokens, as sentence-transformers takes it.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final, Literal

from headrace.errors import ModelError
from headrace.models.config_fields import PULL_AGAIN, ConfigFields
from headrace.models.json_file import read_json, read_json_object

Pooling = Literal["mean", "first", "last"]
"""How a text's tokens become one vector."""

MODULES_FILE: Final = "modules.json"
_POOLING_KEYS: Final[Mapping[str, Pooling]] = {
    "pooling_mode_mean_tokens": "mean",
    "pooling_mode_cls_token": "first",
    "pooling_mode_lasttoken": "last",
}
_POOLING_MODES: Final[Mapping[str, Pooling]] = {"mean": "mean", "cls": "first", "lasttoken": "last"}
_SUPPORTED: Final = "the mean of all tokens, the first token, the last token"


@dataclass(frozen=True, slots=True)
class PoolingConfig:
    """How vectors are made: from the mean of all tokens, the first or the last, and whether they are brought to length 1."""

    pooling: Pooling
    is_normalized: bool


def load_pooling_config(directory: Path) -> PoolingConfig:
    """Read how the vectors of an encoder are made.

    Raises:
        ModelError: A file is damaged, or a step is not supported; names it.
    """
    path = directory / MODULES_FILE
    if not path.is_file():
        return PoolingConfig("mean", is_normalized=False)
    modules = read_json(path)
    if not isinstance(modules, list) or not all(isinstance(module, dict) for module in modules):
        raise ModelError(f"{path}: is not a list of objects; {PULL_AGAIN}")
    pooling: Pooling = "mean"
    is_normalized = False
    for module in modules:
        # The full name of a class; packages were renamed, classes were not.
        kind = str(module.get("type")).rpartition(".")[2]
        if kind == "Pooling":
            pooling = _pooling(directory / str(module.get("path", "")) / "config.json")
        elif kind == "Normalize":
            is_normalized = True
        elif kind != "Transformer":
            raise ModelError(f"{path}: step {kind!r} is not supported; supported are Transformer, Pooling, Normalize", param="type")
    return PoolingConfig(pooling, is_normalized)


def _pooling(path: Path) -> Pooling:
    fields = ConfigFields(read_json_object(path), path)
    mode = fields.get("pooling_mode")
    if mode is not None:
        if mode not in _POOLING_MODES:
            raise fields.unsupported("pooling_mode", mode, ", ".join(_POOLING_MODES))
        return _POOLING_MODES[mode]
    chosen = [key for key, value in fields.raw.items() if key.startswith("pooling_mode_") and value is True]
    if len(chosen) != 1 or chosen[0] not in _POOLING_KEYS:
        raise fields.unsupported("pooling", _named(chosen), f"one of {', '.join(_POOLING_KEYS)}: {_SUPPORTED}")
    return _POOLING_KEYS[chosen[0]]


def _named(chosen: list[str]) -> Any:
    return chosen[0] if len(chosen) == 1 else chosen

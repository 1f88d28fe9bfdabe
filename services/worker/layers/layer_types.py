"""Which layers attend to all before them and which to a window, as config.json says it."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Final

from headrace.errors import ModelError
from headrace.models.model_config import ModelConfig

FULL: Final = "full_attention"
SLIDING: Final = "sliding_attention"


def layer_types(config: ModelConfig, default: Sequence[str]) -> tuple[str, ...]:
    """Read `layer_types`, one for each layer.

    Args:
        config: Shape of the model.
        default: What holds where the file has none.

    Raises:
        ModelError: There are fewer than layers, or one is neither `full_attention` nor `sliding_attention`.
    """
    found = config.fields.list_of("layer_types", str, length=config.num_layers)
    for name in found or ():
        if name not in (FULL, SLIDING):
            raise config.fields.unsupported("layer_types", name, f"{FULL}, {SLIDING}")
    return tuple(found or default)[: config.num_layers]


def windows(config: ModelConfig, types: Sequence[str], window: int | None) -> tuple[int | None, ...]:
    """Give each layer's window, in tokens.

    Args:
        config: For errors.
        types: From `layer_types`.
        window: `sliding_window` of the file.

    Raises:
        ModelError: A layer has a window, but the file does not say how wide.
    """
    if window is None and SLIDING in types:
        raise config.fields.bad("sliding_window", f"is missing, but layer_types has {SLIDING}")
    return tuple(window if name == SLIDING else None for name in types)


def optional_windows(config: ModelConfig) -> tuple[int | None, ...]:
    """Give each layer's window as the Qwen files have it: off unless `use_sliding_window`, then from `max_window_layers` up."""
    fields = config.fields
    is_used = fields.flag("use_sliding_window")
    window = fields.optional_size("sliding_window", default=4096)
    first = fields.get("max_window_layers", 28)
    if isinstance(first, bool) or not isinstance(first, int) or first < 0:
        raise fields.bad("max_window_layers", f"is {first!r}, not a whole number from 0")
    if not is_used:
        window = None
    default = [SLIDING if window is not None and layer >= first else FULL for layer in range(config.num_layers)]
    return windows(config, layer_types(config, default), window)


def check_unrelated(config: ModelConfig, name: str) -> None:
    """Refuse `name` where it is set: the family does not have it.

    Raises:
        ModelError: It is set.
    """
    value = config.fields.get(name)
    if value not in (None, False):
        raise ModelError(f"{config.fields.path}: {name} {value!r} is not supported for {config.architecture}", param=name)

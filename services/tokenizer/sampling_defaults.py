"""A model's own sampling defaults, from its generation_config.json, as the wire carries them."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from headrace.v1.common_pb2 import SamplingParams


def sampling_defaults(generation_config: Mapping[str, Any]) -> SamplingParams:
    """Translate; what the model does not set stays absent.

    Args:
        generation_config: Checked values, from `load_generation_defaults`.

    Returns:
        The defaults. `do_sample: false` means greedy, so temperature 0 and nothing else that draws; a repetition penalty stays.
    """
    defaults = SamplingParams()
    if 0.0 < float(generation_config.get("repetition_penalty", 0.0)) <= 2.0:
        defaults.repetition_penalty = float(generation_config["repetition_penalty"])
    if generation_config.get("do_sample") is False:
        defaults.temperature = 0.0
        return defaults
    for name in ("temperature", "top_p", "min_p"):
        if name in generation_config:
            setattr(defaults, name, float(generation_config[name]))
    if "top_k" in generation_config:
        defaults.top_k = int(generation_config["top_k"])
    return defaults

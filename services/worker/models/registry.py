"""Which class computes which architecture, by the name in config.json."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Final, Protocol

from headrace.errors import ModelError
from headrace.models.model_config import ModelConfig
from services.worker.layers.ops import Model, Ops
from services.worker.models.llama import LlamaForCausalLM


class ModelClass(Protocol):
    """What the registry holds."""

    def __call__(self, config: ModelConfig, ops: Ops, *, max_model_len: int) -> Model:
        """Ask for the network's weights."""
        ...


ARCHITECTURES: Final[Mapping[str, ModelClass]] = {
    "LlamaForCausalLM": LlamaForCausalLM,
}
"""Supported architectures."""


def build_model(config: ModelConfig, ops: Ops, *, max_model_len: int) -> Model:
    """Build the model that config.json names.

    Raises:
        ModelError: The architecture is not supported, or the weights do not fit it.
    """
    model_class = ARCHITECTURES.get(config.architecture)
    if model_class is None:
        raise ModelError(
            f"architecture {config.architecture!r} is not supported; supported are {', '.join(ARCHITECTURES)}: take another model",
            param="architectures",
        )
    return model_class(config, ops, max_model_len=max_model_len)

"""Which class computes which architecture, by the name in config.json."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, Final, Protocol

import torch

from headrace.errors import ModelError
from headrace.models.model_config import ModelConfig
from services.worker.attention.backend import AttentionBackend, StepTensors
from services.worker.models.llama import LlamaForCausalLM
from services.worker.weights import WeightLoader


class Model(Protocol):
    """A network: one step in, logits out."""

    def forward(self, step: StepTensors, kv_layers: tuple[torch.Tensor, ...]) -> torch.Tensor:
        """Compute one step; gives float32 logits `[num_sampled, vocab_size]`."""
        ...


class ModelClass(Protocol):
    """What the registry holds."""

    def __call__(
        self, config: ModelConfig, weights: WeightLoader, attention: AttentionBackend[Any], *, max_model_len: int
    ) -> Model:
        """Build the network and load its weights."""
        ...


ARCHITECTURES: Final[Mapping[str, ModelClass]] = {
    "LlamaForCausalLM": LlamaForCausalLM,
}
"""Supported architectures."""


def build_model(config: ModelConfig, weights: WeightLoader, attention: AttentionBackend[Any], *, max_model_len: int) -> Model:
    """Build the model that config.json names, and check that all of its weights were used.

    Raises:
        ModelError: The architecture is not supported, or the weights do not fit it.
    """
    model_class = ARCHITECTURES.get(config.architecture)
    if model_class is None:
        raise ModelError(
            f"architecture {config.architecture!r} is not supported; supported are {', '.join(ARCHITECTURES)}: take another model",
            param="architectures",
        )
    model = model_class(config, weights, attention, max_model_len=max_model_len)
    weights.check_all_taken()
    return model

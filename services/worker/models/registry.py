"""Which family computes which architecture, by the name in config.json; families of other people's packages among them.

A package named by `model.external_package` holds `ARCHITECTURES`, a mapping from architectures to builders like the one here, and
may hold `ENCODERS`. What it names that is here too, it replaces. See docs/external-models.md.
"""

from __future__ import annotations

import importlib
from collections.abc import Mapping
from typing import Any, Final, Protocol

from headrace.errors import ConfigError, ModelError
from headrace.models.model_config import ModelConfig
from headrace.models.pooling_config import Pooling
from services.worker.layers.config_check import check_all_read
from services.worker.layers.ops import Model, Ops
from services.worker.models.bert import bert
from services.worker.models.gemma import gemma2, gemma3
from services.worker.models.gpt_oss import gpt_oss
from services.worker.models.granite import granite
from services.worker.models.llama import llama
from services.worker.models.mistral import mistral
from services.worker.models.mixtral import mixtral
from services.worker.models.olmo import olmo2, olmo3
from services.worker.models.phi3 import phi3
from services.worker.models.qwen import qwen2, qwen3, qwen3_moe
from services.worker.models.smollm3 import smollm3

_SETTING: Final = "model.external_package"


class ModelBuilder(Protocol):
    """A family that generates text: a function, or a class whose instances are models."""

    def __call__(self, config: ModelConfig, ops: Ops, *, max_model_len: int) -> Model:
        """Ask for the network's weights.

        Args:
            config: Shape of the model.
            ops: Where weight handles come from.
            max_model_len: Positions to prepare for, in tokens.

        Raises:
            ModelError: A tensor is missing or has another shape, or the model needs what is not supported.
        """
        ...


class EncoderBuilder(Protocol):
    """A family that gives a vector for each text."""

    def __call__(self, config: ModelConfig, ops: Ops, *, pooling: Pooling) -> Model:
        """As for `ModelBuilder`; `pooling` says how a text's tokens become one vector."""
        ...


ARCHITECTURES: Final[Mapping[str, ModelBuilder]] = {
    "Gemma2ForCausalLM": gemma2,
    "Gemma3ForCausalLM": gemma3,
    "Gemma3ForConditionalGeneration": gemma3,
    "GptOssForCausalLM": gpt_oss,
    "GraniteForCausalLM": granite,
    "LlamaForCausalLM": llama,
    "MistralForCausalLM": mistral,
    "MixtralForCausalLM": mixtral,
    "Olmo2ForCausalLM": olmo2,
    "Olmo3ForCausalLM": olmo3,
    "Phi3ForCausalLM": phi3,
    "Qwen2ForCausalLM": qwen2,
    "Qwen3ForCausalLM": qwen3,
    "Qwen3MoeForCausalLM": qwen3_moe,
    "SmolLM3ForCausalLM": smollm3,
}
"""Architectures that generate text."""

ENCODERS: Final[Mapping[str, EncoderBuilder]] = {"BertModel": bert}
"""Architectures that give vectors."""


def build_model(config: ModelConfig, ops: Ops, *, max_model_len: int, external_package: str = "") -> Model:
    """Build the model that config.json names.

    Args:
        config: Shape of the model.
        ops: Where weight handles come from.
        max_model_len: Positions to prepare for, in tokens.
        external_package: A package with further families; empty for none.

    Raises:
        ModelError: The architecture or a value of config.json is not supported, or the weights do not fit.
        ConfigError: The package cannot be used.
    """
    known: dict[str, ModelBuilder] = {**ARCHITECTURES, **_external(external_package, "ARCHITECTURES")}
    builder = known.get(config.architecture)
    if builder is None:
        raise _unsupported(config, known, is_encoder=config.architecture in ENCODERS)
    model = builder(config, ops, max_model_len=max_model_len)
    check_all_read(config)
    return model


def build_encoder(config: ModelConfig, ops: Ops, *, pooling: Pooling, external_package: str = "") -> Model:
    """Build the encoder that config.json names; otherwise as `build_model`.

    Raises:
        ModelError: As for `build_model`.
        ConfigError: As for `build_model`.
    """
    known: dict[str, EncoderBuilder] = {**ENCODERS, **_external(external_package, "ENCODERS", is_required=False)}
    builder = known.get(config.architecture)
    if builder is None:
        raise _unsupported(config, known, is_encoder=False)
    model = builder(config, ops, pooling=pooling)
    check_all_read(config)
    return model


def _unsupported(config: ModelConfig, known: Mapping[str, Any], *, is_encoder: bool) -> ModelError:
    what = "gives vectors, and text is to be generated" if is_encoder else "is not supported"
    return ModelError(
        f"architecture {config.architecture!r} {what}; supported are {', '.join(sorted(known))}: take another model",
        param="architectures",
    )


def _external(package: str, name: str, *, is_required: bool = True) -> dict[str, Any]:
    """Import a package and give one of its mappings."""
    if not package:
        return {}
    try:
        module = importlib.import_module(package)
    except Exception as error:
        raise ConfigError(f"{_SETTING} {package!r} cannot be imported: {type(error).__name__}: {error}", param=_SETTING) from error
    found = getattr(module, name, None)
    if found is None and not is_required:
        return {}
    if not isinstance(found, Mapping):
        raise ConfigError(f"{_SETTING} {package!r} has no mapping {name} from architectures to builders", param=_SETTING)
    for architecture, builder in found.items():
        if not isinstance(architecture, str) or not callable(builder):
            raise ConfigError(
                f"{_SETTING} {package!r}: {name} holds {architecture!r}: {builder!r}, not a name and a builder", param=_SETTING
            )
    return dict(found)

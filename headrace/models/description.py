"""What a model directory holds, found from headers and JSON files without reading weights.

Apart from `store.py`, which every service uses to find its model: describing one needs the readers of weights.
"""

from __future__ import annotations

import math
import re
from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Final

from headrace.errors import ModelError
from headrace.models.expert_weights import with_single_experts
from headrace.models.model_config import TOKENIZER_FILE, ModelConfig, load_model_config, load_tokenizer_config
from headrace.models.store import name_of
from headrace.models.weights import Weights, open_weights

_EMBEDDING: Final = re.compile(r"(^|\.)(embed_tokens|word_embeddings)\.weight$")
_LAYER: Final = re.compile(r"(^|\.)layers?\.(\d+)\.")
_NOT_TEXT: Final = re.compile(r"(^|\.)(vision|audio)_")
"""Parts of models that take more than text; they have layers of their own."""


@dataclass(frozen=True, slots=True)
class ModelFile:
    """One file of a model directory."""

    name: str
    size_bytes: int


@dataclass(frozen=True, slots=True)
class ModelDescription:
    """What a model directory holds, found from headers and JSON files without reading weights.

    Attributes:
        num_parameters: Values in all weight tensors; a tied output projection counts once.
        context_length: In tokens.
        quantisation: The dtype that holds most parameters, for example `q4_1` or `bf16`.
        num_parameters_by_dtype: Largest first.
        files: Sorted by name.
    """

    name: str
    path: Path
    architecture: str
    num_parameters: int
    context_length: int
    vocab_size: int
    has_chat_template: bool
    quantisation: str
    num_parameters_by_dtype: Mapping[str, int]
    files: tuple[ModelFile, ...]

    @property
    def size_bytes(self) -> int:
        """Size of all files."""
        return sum(file.size_bytes for file in self.files)


def describe(directory: Path) -> ModelDescription:
    """Read a model directory's headers and check that they fit together.

    Raises:
        ModelError: Something is missing, damaged or contradictory; the message names the file and says what to do.
    """
    config = load_model_config(directory)
    tokenizer_config = load_tokenizer_config(directory)
    if not (directory / TOKENIZER_FILE).is_file():
        raise ModelError(f"{directory / TOKENIZER_FILE}: missing; pull the model again, or another that has this file")
    weights = with_single_experts(open_weights(directory))
    check_complete(weights, config, directory)
    by_dtype: Counter[str] = Counter()
    for name in weights.names():
        info = weights.info(name)
        by_dtype[info.dtype_name] += math.prod(info.shape)
    files = (path for path in directory.iterdir() if path.is_file())
    return ModelDescription(
        name=name_of(directory),
        path=directory,
        architecture=config.architecture,
        num_parameters=by_dtype.total(),
        context_length=config.max_position_embeddings,
        vocab_size=config.vocab_size,
        has_chat_template=tokenizer_config.chat_template is not None,
        quantisation=by_dtype.most_common(1)[0][0],
        num_parameters_by_dtype=dict(by_dtype.most_common()),
        files=tuple(ModelFile(name=path.name, size_bytes=path.stat().st_size) for path in sorted(files)),
    )


def check_complete(weights: Weights, config: ModelConfig, directory: Path) -> None:
    """Refuse weights that lack the embedding or a whole layer, or whose embedding contradicts config.json."""
    names = [name for name in weights.names() if not _NOT_TEXT.search(name)]
    embedding = next((name for name in names if _EMBEDDING.search(name)), None)
    if embedding is None:
        raise ModelError(f"{directory}: weights lack an embedding (embed_tokens.weight); pull the model again")
    shape = weights.info(embedding).shape
    expected = (config.vocab_size, config.hidden_size)
    if shape != expected:
        raise ModelError(f"{directory}: {embedding} has shape {shape}, config.json says {expected}; pull the model again")
    layers = {int(found[2]) for name in names if (found := _LAYER.search(name))}
    missing = next((index for index in range(config.num_layers) if index not in layers), None)
    if missing is not None:
        raise ModelError(f"{directory}: weights lack layer {missing} of {config.num_layers}; pull the model again")

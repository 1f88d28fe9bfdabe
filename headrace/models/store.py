"""Where models live: one directory a model, in Hugging Face layout, under a root that the settings name.

Names that start with a dot are a pull's own (locks, unfinished downloads) and are never listed or resolved. A hub id `org/name` is
stored as `org--name` and may be written either way.
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
from headrace.models.model_config import CONFIG_FILE, TOKENIZER_FILE, ModelConfig, load_model_config, load_tokenizer_config
from headrace.models.weights import Weights, open_weights

DEFAULT_MODELS_ROOT: Final = Path("~/.cache/headrace/models")
"""Where models are kept unless the settings say otherwise; `~` is not expanded yet."""

_NAME_PATTERN: Final = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]{0,127}")
_HUB_ID_PATTERN: Final = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]{0,95}/[A-Za-z0-9][A-Za-z0-9._-]{0,95}")
_HUB_SEPARATOR: Final = "--"
_EMBEDDING: Final = "model.embed_tokens.weight"


@dataclass(frozen=True, slots=True)
class ModelEntry:
    """A model directory under the root: the name to ask for it by, and its path."""

    name: str
    path: Path


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


def is_hub_id(text: str) -> bool:
    """Say whether a text has the form `org/name`."""
    return _HUB_ID_PATTERN.fullmatch(text) is not None


def directory_name(name: str) -> str:
    """Give the directory name of a model name or hub id.

    Raises:
        ModelError: The name cannot be a directory's: empty, hidden, or with other characters than letters, digits and `._-`.
    """
    stored = name.replace("/", _HUB_SEPARATOR) if is_hub_id(name) else name
    if _NAME_PATTERN.fullmatch(stored) is None:
        raise ModelError(f"{name!r} is not a model name: use letters, digits, '.', '_' and '-', at most 128, or a hub id org/name")
    return stored


def resolve(name_or_path: str, root: Path) -> Path:
    """Find a model directory by name under the root, or by path.

    Args:
        name_or_path: A name as `list_models` gives it, or the path of a directory in Hugging Face layout.
        root: Where models live.

    Raises:
        ModelError: There is no such directory, or it is no model; the message says what was looked for and how to get it.
    """
    looked_for: list[Path] = []
    if _NAME_PATTERN.fullmatch(name_or_path) or is_hub_id(name_or_path):
        looked_for.append(root.expanduser() / directory_name(name_or_path))
    looked_for.append(Path(name_or_path).expanduser().absolute())
    for directory in looked_for:
        if (directory / CONFIG_FILE).is_file():
            return directory
    places = " or ".join(str(directory) for directory in looked_for)
    raise ModelError(f"no model {name_or_path!r}: looked for {places}; get one with `headrace models pull {name_or_path}`")


def list_models(root: Path) -> list[ModelEntry]:
    """List the models under the root, by name; empty when the root is not there yet."""
    root = root.expanduser()
    if not root.is_dir():
        return []
    found = [path for path in root.iterdir() if not path.name.startswith(".") and (path / CONFIG_FILE).is_file()]
    return [ModelEntry(name=path.name.replace(_HUB_SEPARATOR, "/", 1), path=path) for path in sorted(found)]


def describe(directory: Path) -> ModelDescription:
    """Read a model directory's headers and check that they fit together.

    Raises:
        ModelError: Something is missing, damaged or contradictory; the message names the file and says what to do.
    """
    config = load_model_config(directory)
    tokenizer_config = load_tokenizer_config(directory)
    if not (directory / TOKENIZER_FILE).is_file():
        raise ModelError(f"{directory / TOKENIZER_FILE}: missing; pull the model again, or another that has this file")
    weights = open_weights(directory)
    check_complete(weights, config, directory)
    by_dtype: Counter[str] = Counter()
    for name in weights.names():
        info = weights.info(name)
        by_dtype[info.dtype_name] += math.prod(info.shape)
    files = (path for path in directory.iterdir() if path.is_file())
    return ModelDescription(
        name=directory.name.replace(_HUB_SEPARATOR, "/", 1),
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
    names = weights.names()
    if _EMBEDDING not in names:
        raise ModelError(f"{directory}: weights lack {_EMBEDDING}; pull the model again")
    shape = weights.info(_EMBEDDING).shape
    expected = (config.vocab_size, config.hidden_size)
    if shape != expected:
        raise ModelError(f"{directory}: {_EMBEDDING} has shape {shape}, config.json says {expected}; pull the model again")
    layers = {name.split(".")[2] for name in names if name.startswith("model.layers.")}
    missing = [index for index in range(config.num_layers) if str(index) not in layers]
    if missing:
        raise ModelError(f"{directory}: weights lack layer {missing[0]} of {config.num_layers}; pull the model again")

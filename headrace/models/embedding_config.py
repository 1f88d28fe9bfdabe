"""What a model directory says of vectors: whether the model makes them, of what size, and whether they can be cut."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from headrace.errors import ModelError
from headrace.models.config_fields import PULL_AGAIN
from headrace.models.model_config import ModelConfig
from headrace.models.pooling_config import MODULES_FILE


@dataclass(frozen=True, slots=True)
class EmbeddingConfig:
    """The vectors of a model.

    Attributes:
        size: Numbers in a vector.
        is_matryoshka: Whether their first numbers, brought to length 1, are vectors too.
        dimensions: Sizes to which they can be cut, ascending; empty for any.
    """

    size: int
    is_matryoshka: bool = False
    dimensions: tuple[int, ...] = ()


def load_embedding_config(directory: Path, config: ModelConfig) -> EmbeddingConfig | None:
    """What is known of a model's vectors; None for a model that generates text.

    A model makes vectors where its directory says how (modules.json), or where its class has no head: BertModel and the like.

    Raises:
        ModelError: The sizes to which vectors can be cut are no such sizes.
    """
    if not (directory / MODULES_FILE).is_file() and not config.architecture.endswith("Model"):
        return None
    size, fields = config.hidden_size, config.fields.raw
    dimensions = fields.get("matryoshka_dimensions") or []
    if not isinstance(dimensions, list) or not all(type(one) is int and 0 < one <= size for one in dimensions):
        raise ModelError(
            f"{directory}: matryoshka_dimensions is {dimensions!r}, which is no list of numbers from 1 to {size}; {PULL_AGAIN}",
            param="matryoshka_dimensions",
        )
    return EmbeddingConfig(size, bool(fields.get("is_matryoshka")) or bool(dimensions), tuple(sorted(dimensions)))

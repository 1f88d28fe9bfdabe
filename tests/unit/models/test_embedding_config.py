"""Which model directories make vectors, and to which sizes these can be cut."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from headrace.errors import ModelError
from headrace.models.embedding_config import EmbeddingConfig, load_embedding_config
from headrace.models.model_config import load_model_config


def load(directory: Path, **changes: Any) -> EmbeddingConfig | None:
    fields = {
        "architectures": ["BertModel"],
        "vocab_size": 50,
        "hidden_size": 8,
        "intermediate_size": 16,
        "num_hidden_layers": 1,
        "num_attention_heads": 2,
        "max_position_embeddings": 32,
    }
    (directory / "config.json").write_text(json.dumps(fields | changes))
    return load_embedding_config(directory, load_model_config(directory))


def test_a_class_without_a_head_or_a_directory_that_says_how_makes_vectors(tmp_path: Path) -> None:
    assert load(tmp_path) == EmbeddingConfig(8)
    assert load(tmp_path, architectures=["LlamaForCausalLM"]) is None
    (tmp_path / "modules.json").write_text("[]")
    assert load(tmp_path, architectures=["LlamaForCausalLM"]) == EmbeddingConfig(8)


def test_sizes_to_cut_to_are_the_models_to_say(tmp_path: Path) -> None:
    assert load(tmp_path, is_matryoshka=True) == EmbeddingConfig(8, is_matryoshka=True)
    assert load(tmp_path, matryoshka_dimensions=[4, 2]) == EmbeddingConfig(8, is_matryoshka=True, dimensions=(2, 4))


@pytest.mark.parametrize("dimensions", [[9], [0], ["4"], [True], 4])
def test_sizes_that_are_none_are_refused(tmp_path: Path, dimensions: Any) -> None:
    with pytest.raises(ModelError, match="matryoshka_dimensions"):
        load(tmp_path, matryoshka_dimensions=dimensions)

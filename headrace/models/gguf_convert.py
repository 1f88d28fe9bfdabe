"""Write the Hugging Face side of a GGUF file: config.json, tokenizer files and generation_config.json beside it.

The weights stay the GGUF file, unchanged: services read it in place through `weights.py`.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from headrace.models.gguf_architectures import architecture_of
from headrace.models.gguf_config import hf_config
from headrace.models.gguf_file import GgufFile
from headrace.models.gguf_tokenizer import GgufVocabulary, build_tokenizer, read_vocabulary
from headrace.models.model_config import (
    CONFIG_FILE,
    GENERATION_CONFIG_FILE,
    TOKENIZER_CONFIG_FILE,
    TOKENIZER_FILE,
    load_model_config,
)


def write_hf_files(gguf_path: Path, directory: Path, sampling: Mapping[str, float] | None = None) -> None:
    """Write the four JSON files of a model directory from a GGUF file's metadata.

    Args:
        gguf_path: A GGUF file of a supported architecture.
        directory: Where the files go; it exists.
        sampling: Sampling defaults to put into generation_config.json.

    Raises:
        ModelError: The file is damaged, or of an architecture or tokenizer that is not supported.
    """
    file = GgufFile(gguf_path)
    architecture = architecture_of(file)
    vocabulary = read_vocabulary(file)
    tokenizer = build_tokenizer(file, vocabulary)
    config = hf_config(file, architecture, architecture.hf_tensor_names(file), len(vocabulary.pieces))
    _write_json(directory / CONFIG_FILE, config | _token_id_keys(vocabulary))
    tokenizer.save(str(directory / TOKENIZER_FILE))
    _write_json(directory / TOKENIZER_CONFIG_FILE, _tokenizer_config(file, vocabulary, config["max_position_embeddings"]))
    _write_json(directory / GENERATION_CONFIG_FILE, {**_token_id_keys(vocabulary), **(sampling or {})})
    # Reading back is the check that what was written is whole and consistent.
    load_model_config(directory)


def _token_id_keys(vocabulary: GgufVocabulary) -> dict[str, int | list[int]]:
    keys: dict[str, int | list[int]] = {
        f"{role}_id": token_id for role, token_id in vocabulary.special_ids.items() if role != "unk_token"
    }
    if len(vocabulary.end_ids) > 1:
        keys["eos_token_id"] = vocabulary.end_ids
    return keys


def _tokenizer_config(file: GgufFile, vocabulary: GgufVocabulary, context_length: int) -> dict[str, Any]:
    config: dict[str, Any] = {
        "tokenizer_class": "PreTrainedTokenizerFast",
        "model_max_length": context_length,
        "clean_up_tokenization_spaces": False,
        "add_bos_token": vocabulary.adds_bos,
        "add_eos_token": vocabulary.adds_eos,
        **vocabulary.special_texts(),
    }
    template = file.metadata.get("tokenizer.chat_template")
    if isinstance(template, str):
        config["chat_template"] = template
    return config


def _write_json(path: Path, value: dict[str, Any]) -> None:
    path.write_text(json.dumps(value, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")

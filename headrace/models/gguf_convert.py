"""Write the Hugging Face side of a GGUF file: config.json, tokenizer files and generation_config.json beside it.

The weights stay the GGUF file, unchanged: services read it in place through `weights.py`.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Final

from headrace.errors import ModelError
from headrace.models import gguf_llama
from headrace.models.gguf_file import GgufFile
from headrace.models.gguf_tokenizer import GgufVocabulary, build_tokenizer, read_vocabulary
from headrace.models.model_config import (
    CONFIG_FILE,
    GENERATION_CONFIG_FILE,
    TOKENIZER_CONFIG_FILE,
    TOKENIZER_FILE,
    load_model_config,
)

_EMBEDDING: Final = "model.embed_tokens.weight"
_OUTPUT: Final = "lm_head.weight"


def write_hf_files(gguf_path: Path, directory: Path, sampling: Mapping[str, float] | None = None) -> None:
    """Write the four JSON files of a model directory from a GGUF file's metadata.

    Args:
        gguf_path: A GGUF file of the llama architecture.
        directory: Where the files go; it exists.
        sampling: Sampling defaults to put into generation_config.json.

    Raises:
        ModelError: The file is damaged, or of an architecture or tokenizer that is not supported.
    """
    file = GgufFile(gguf_path)
    names = gguf_llama.hf_tensor_names(file)
    vocabulary = read_vocabulary(file)
    tokenizer = build_tokenizer(file, vocabulary)
    _write_json(directory / CONFIG_FILE, _config(file, names, vocabulary))
    tokenizer.save(str(directory / TOKENIZER_FILE))
    _write_json(directory / TOKENIZER_CONFIG_FILE, _tokenizer_config(file, vocabulary))
    _write_json(directory / GENERATION_CONFIG_FILE, {**_token_id_keys(vocabulary), **(sampling or {})})
    # Reading back is the check that what was written is whole and consistent.
    load_model_config(directory)


def _config(file: GgufFile, names: dict[str, str], vocabulary: GgufVocabulary) -> dict[str, Any]:
    metadata = file.metadata
    hidden_size = gguf_llama.metadata_int(metadata, "llama.embedding_length")
    num_heads = gguf_llama.metadata_int(metadata, "llama.attention.head_count")
    if num_heads == 0 or hidden_size == 0:
        raise ModelError(f"{file.path}: says {num_heads} attention heads over a width of {hidden_size}; pull the model again")
    head_dim = gguf_llama.metadata_int(metadata, "llama.attention.key_length", default=hidden_size // num_heads)
    rotary_dim = gguf_llama.metadata_int(metadata, "llama.rope.dimension_count", default=head_dim)
    if rotary_dim != head_dim:
        raise ModelError(f"{file.path}: rotary embedding over {rotary_dim} of {head_dim} dimensions is not supported")
    rope_theta = gguf_llama.metadata_float(metadata, "llama.rope.freq_base", default=10000.0)
    return {
        "architectures": ["LlamaForCausalLM"],
        "model_type": "llama",
        "vocab_size": _vocab_size(file, names, len(vocabulary.pieces)),
        "hidden_size": hidden_size,
        "intermediate_size": gguf_llama.metadata_int(metadata, "llama.feed_forward_length"),
        "num_hidden_layers": gguf_llama.metadata_int(metadata, "llama.block_count"),
        "num_attention_heads": num_heads,
        "num_key_value_heads": gguf_llama.metadata_int(metadata, "llama.attention.head_count_kv", default=num_heads),
        "head_dim": head_dim,
        "max_position_embeddings": gguf_llama.metadata_int(metadata, "llama.context_length"),
        "rms_norm_eps": gguf_llama.metadata_float(metadata, "llama.attention.layer_norm_rms_epsilon", default=1e-5),
        "rope_theta": rope_theta,
        "rope_scaling": gguf_llama.rope_scaling(file, head_dim=head_dim, rope_theta=rope_theta),
        "attention_bias": "model.layers.0.self_attn.o_proj.bias" in names,
        "mlp_bias": "model.layers.0.mlp.down_proj.bias" in names,
        "hidden_act": "silu",
        # A file without an output projection uses the embedding for both.
        "tie_word_embeddings": _OUTPUT not in names,
        "dtype": "bfloat16",
        **_token_id_keys(vocabulary),
    }


def _vocab_size(file: GgufFile, names: dict[str, str], num_pieces: int) -> int:
    if _EMBEDDING not in names:
        raise ModelError(f"{file.path}: has no token embedding; pull the model again")
    num_rows = file.tensors[names[_EMBEDDING]].shape[0]
    if num_rows < num_pieces:
        raise ModelError(f"{file.path}: {num_pieces} tokens but an embedding of {num_rows} rows; pull the model again")
    return num_rows


def _token_id_keys(vocabulary: GgufVocabulary) -> dict[str, int]:
    return {f"{role}_id": token_id for role, token_id in vocabulary.special_ids.items() if role != "unk_token"}


def _tokenizer_config(file: GgufFile, vocabulary: GgufVocabulary) -> dict[str, Any]:
    config: dict[str, Any] = {
        "tokenizer_class": "PreTrainedTokenizerFast",
        "model_max_length": gguf_llama.metadata_int(file.metadata, "llama.context_length"),
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

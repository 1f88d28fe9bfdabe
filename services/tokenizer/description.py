"""What a model is, for gateways that tokenize by themselves: sizes, special tokens, and the files of its tokenizer."""

from __future__ import annotations

import io
import zipfile
from pathlib import Path
from typing import Final

from headrace.errors import ModelError
from headrace.models.model_config import ModelConfig
from headrace.v1.common_pb2 import SamplingParams
from headrace.v1.tokenizer_pb2 import ModelDescription

_TOKENIZER_FILES: Final = (
    "tokenizer.json",
    "tokenizer_config.json",
    "special_tokens_map.json",
    "added_tokens.json",
    "chat_template.jinja",
    "generation_config.json",
    "config.json",
)
# An archive's entries carry a time; with a fixed one the same files give the same bytes, and the same checksum.
_ENTRY_TIME: Final = (1980, 1, 1, 0, 0, 0)


def describe(directory: Path, config: ModelConfig, *, max_model_len: int, defaults: SamplingParams) -> ModelDescription:
    """What config.json says of a model that is served with `max_model_len`."""
    description = ModelDescription(
        path=str(directory.resolve()),
        architectures=[config.architecture],
        model_type=config.fields.text("model_type", default=""),
        vocab_size=config.vocab_size,
        max_model_len=max_model_len,
        eos_token_ids=config.eos_token_ids,
        sampling_defaults=defaults,
    )
    if config.bos_token_id is not None:
        description.bos_token_id = config.bos_token_id
    pad_token_id = config.fields.get("pad_token_id")
    # Some files give one that is no token, -1 or the like, for none.
    if isinstance(pad_token_id, int) and 0 <= pad_token_id < config.vocab_size:
        description.pad_token_id = pad_token_id
    return description


def tokenizer_zip(directory: Path) -> bytes:
    """The files that make a model's tokenizer, those that are there, as a zip archive without folders.

    Raises:
        ModelError: A file cannot be read.
    """
    archive = io.BytesIO()
    with zipfile.ZipFile(archive, "w", compression=zipfile.ZIP_DEFLATED) as writer:
        for name in _TOKENIZER_FILES:
            path = directory / name
            if not path.is_file():
                continue
            try:
                content = path.read_bytes()
            except OSError as error:
                raise ModelError(f"{path}: cannot be read: {error}; pull the model again") from error
            writer.writestr(zipfile.ZipInfo(name, _ENTRY_TIME), content, compress_type=zipfile.ZIP_DEFLATED)
    return archive.getvalue()

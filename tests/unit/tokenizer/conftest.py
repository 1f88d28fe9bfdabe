"""A small model directory's tokenizer side, built here."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors

from services.tokenizer.constraints import compiler
from tests.patience import WAIT_S

CHATML = (
    "{% for message in messages %}{{ '<s>' + message['role'] + '\n' + message['content'] + '</s>\n' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<s>assistant\n' }}{% endif %}"
)


@pytest.fixture(autouse=True)
def _a_child_may_start_slowly(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(compiler, "START_TIMEOUT_S", WAIT_S)


@pytest.fixture(autouse=True)
def _one_thread_a_text(monkeypatch: pytest.MonkeyPatch) -> None:
    """As the service sets it before it encodes."""
    monkeypatch.setenv("TOKENIZERS_PARALLELISM", "false")


@pytest.fixture(scope="session")
def tiny_tokenizer_json() -> str:
    """Byte-level, one token a byte, `<s>` put before plain text; the vocabulary has 258 tokens."""
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    tokenizer = Tokenizer(models.BPE(vocab={piece: index for index, piece in enumerate(alphabet)}, merges=[]))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.add_special_tokens(["<s>", "</s>"])
    tokenizer.post_processor = processors.TemplateProcessing(single=["<s>", "$A"], special_tokens=[("<s>", 256)])
    # As training leaves it: neither may touch a prompt.
    tokenizer.enable_truncation(max_length=4)
    tokenizer.enable_padding(length=8)
    return tokenizer.to_str()


@pytest.fixture
def model_directory(tmp_path: Path, tiny_tokenizer_json: str) -> Path:
    """A directory with everything but weights; context length 64."""
    directory = tmp_path / "tiny"
    directory.mkdir()
    (directory / "tokenizer.json").write_text(tiny_tokenizer_json, encoding="utf-8")
    config = {
        "architectures": ["LlamaForCausalLM"],
        "vocab_size": 260,
        "hidden_size": 8,
        "intermediate_size": 8,
        "num_hidden_layers": 1,
        "num_attention_heads": 1,
        "max_position_embeddings": 64,
        "eos_token_id": 257,
    }
    (directory / "config.json").write_text(json.dumps(config), encoding="utf-8")
    (directory / "generation_config.json").write_text(json.dumps({"temperature": 0.5, "top_k": 20}), encoding="utf-8")
    (directory / "tokenizer_config.json").write_text(json.dumps({"chat_template": CHATML, "bos_token": "<s>"}), encoding="utf-8")
    return directory

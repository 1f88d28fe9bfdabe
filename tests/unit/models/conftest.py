"""A writer of small GGUF files, made apart from the reader so that it can also write files that lie."""

from __future__ import annotations

import struct
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from tokenizers.pre_tokenizers import ByteLevel

TYPE_NUMBERS = {
    "F32": 0,
    "F16": 1,
    "Q4_0": 2,
    "Q4_1": 3,
    "Q5_0": 6,
    "Q5_1": 7,
    "Q8_0": 8,
    "Q2_K": 10,
    "Q3_K": 11,
    "Q4_K": 12,
    "Q5_K": 13,
    "Q6_K": 14,
    "IQ2_XXS": 16,
    "IQ4_NL": 20,
    "IQ4_XS": 23,
    "BF16": 30,
}


class GgufBuilder:
    """Collects metadata and tensors, and writes them; every number in the header can be overridden."""

    def __init__(self) -> None:
        self.metadata: dict[str, Any] = {}
        self.tensors: list[tuple[str, tuple[int, ...], int, bytes, int | None]] = []
        self.num_tensors: int | None = None
        self.num_entries: int | None = None
        self.version = 3
        self.alignment = 32

    def add(self, name: str, shape: tuple[int, ...], kind: str | int, data: bytes, *, offset: int | None = None) -> None:
        number = TYPE_NUMBERS[kind] if isinstance(kind, str) else kind
        self.tensors.append((name, shape, number, data, offset))

    def add_f32(self, name: str, values: np.ndarray) -> None:
        self.add(name, values.shape, "F32", values.astype("<f4").tobytes())

    def header(self) -> tuple[bytes, bytes]:
        num_tensors = len(self.tensors) if self.num_tensors is None else self.num_tensors
        num_entries = len(self.metadata) if self.num_entries is None else self.num_entries
        head = b"GGUF" + struct.pack("<IQQ", self.version, num_tensors, num_entries)
        for key, value in self.metadata.items():
            head += text(key) + encode(value)
        data = b""
        for name, shape, number, content, offset in self.tensors:
            place = len(data) if offset is None else offset
            dims = struct.pack(f"<I{len(shape)}Q", len(shape), *reversed(shape))
            head += text(name) + dims + struct.pack("<IQ", number, place)
            data += content + bytes(-len(content) % self.alignment)
        return head + bytes(-len(head) % self.alignment), data

    def write(self, path: Path) -> Path:
        head, data = self.header()
        path.write_bytes(head + data)
        return path


class Raw(bytes):
    """A metadata value given as its bytes, type number included."""


def text(value: str) -> bytes:
    data = value.encode()
    return struct.pack("<Q", len(data)) + data


def encode(value: Any) -> bytes:
    if isinstance(value, Raw):
        return bytes(value)
    if isinstance(value, bool):
        return struct.pack("<I?", 7, value)
    if isinstance(value, int):
        return struct.pack("<II", 4, value)
    if isinstance(value, float):
        return struct.pack("<If", 6, value)
    if isinstance(value, str):
        return struct.pack("<I", 8) + text(value)
    inner = [encode(item) for item in value]
    kind = inner[0][:4] if inner else struct.pack("<I", 4)
    return struct.pack("<I", 9) + kind + struct.pack("<Q", len(inner)) + b"".join(item[4:] for item in inner)


def tiny_llama(*, tied: bool = True) -> GgufBuilder:
    """Two layers, four heads of eight over two key heads, a byte-level vocabulary with three merges and two special tokens."""
    rng = np.random.default_rng(7)
    alphabet = sorted(ByteLevel.alphabet())
    pieces = ["<|end|>", "<|user|>", *alphabet, "he", "ll", "hell"]
    builder = GgufBuilder()
    builder.metadata = {
        "general.architecture": "llama",
        "llama.block_count": 2,
        "llama.context_length": 128,
        "llama.embedding_length": 32,
        "llama.feed_forward_length": 64,
        "llama.attention.head_count": 4,
        "llama.attention.head_count_kv": 2,
        "llama.rope.freq_base": 10000.0,
        "llama.attention.layer_norm_rms_epsilon": 1e-5,
        "tokenizer.ggml.model": "gpt2",
        "tokenizer.ggml.pre": "smollm",
        "tokenizer.ggml.tokens": pieces,
        "tokenizer.ggml.token_type": [3, 3, *[1] * (len(pieces) - 2)],
        "tokenizer.ggml.merges": ["h e", "l l", "he ll"],
        "tokenizer.ggml.eos_token_id": 0,
        "tokenizer.ggml.bos_token_id": 1,
        "tokenizer.chat_template": "{% for m in messages %}{{ m['content'] }}{% endfor %}",
    }
    shapes: dict[str, tuple[int, ...]] = {"token_embd.weight": (len(pieces), 32), "output_norm.weight": (32,)}
    if not tied:
        shapes["output.weight"] = (len(pieces), 32)
    for layer in range(2):
        block = f"blk.{layer}."
        shapes |= {f"{block}{name}.weight": (32,) for name in ("attn_norm", "ffn_norm")}
        shapes |= {f"{block}{name}.weight": (32, 32) for name in ("attn_q", "attn_output")}
        shapes |= {f"{block}{name}.weight": (16, 32) for name in ("attn_k", "attn_v")}
        shapes |= {f"{block}{name}.weight": (64, 32) for name in ("ffn_gate", "ffn_up")}
        shapes[f"{block}ffn_down.weight"] = (32, 64)
    for name, shape in shapes.items():
        builder.add_f32(name, rng.standard_normal(shape))
    return builder


@pytest.fixture
def gguf_builder() -> GgufBuilder:
    return GgufBuilder()


@pytest.fixture
def llama_builder() -> GgufBuilder:
    return tiny_llama()


@pytest.fixture
def untied_llama_builder() -> GgufBuilder:
    return tiny_llama(tied=False)


@pytest.fixture
def raw_value() -> type[Raw]:
    return Raw

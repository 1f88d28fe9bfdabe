"""What GGUF files mean in Hugging Face terms, by architecture: tensor names, row order, and what was added to norms.

Converters to GGUF rename the tensors. For some architectures they also reorder the rows of the query and key projections (halves of
a head interleaved), so that rotary embedding turns neighbouring pairs; Hugging Face models turn the first half of a head against
the second, and reading puts the rows back. The order is one of rows, so it can be restored on packed blocks without unpacking them.
For Gemma they store scales of norms with 1 added, which reading takes off.

Source: llama.cpp's conversion scripts (what each architecture's file holds) and gguf's table of tensor names.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Final

import numpy as np
import numpy.typing as npt

from headrace.errors import ModelError
from headrace.models.gguf_file import GgufFile
from headrace.models.gguf_metadata import GgufMetadata

ROPE_FACTORS_TENSOR: Final = "rope_freqs.weight"
"""Per-frequency divisors that stand for Llama 3's rope scaling; not a weight of the Hugging Face model."""

ROPE_LONG_TENSOR: Final = "rope_factors_long.weight"
ROPE_SHORT_TENSOR: Final = "rope_factors_short.weight"
"""Per-frequency divisors of longrope, past the original context and within it; config.json holds them as lists."""

_NOT_WEIGHTS: Final = frozenset({ROPE_FACTORS_TENSOR, ROPE_LONG_TENSOR, ROPE_SHORT_TENSOR})

_WHOLE_MODEL_NAMES: Final[Mapping[str, str]] = {
    "token_embd": "model.embed_tokens",
    "output_norm": "model.norm",
    "output": "lm_head",
}
_PROJECTIONS: Final[Mapping[str, str]] = {
    "attn_q": "self_attn.q_proj",
    "attn_k": "self_attn.k_proj",
    "attn_v": "self_attn.v_proj",
    "attn_output": "self_attn.o_proj",
    "ffn_gate": "mlp.gate_proj",
    "ffn_up": "mlp.up_proj",
    "ffn_down": "mlp.down_proj",
}
_PRE_NORMS: Final[Mapping[str, str]] = {"attn_norm": "input_layernorm", "ffn_norm": "post_attention_layernorm"}
_HEAD_NORMS: Final[Mapping[str, str]] = {"attn_q_norm": "self_attn.q_norm", "attn_k_norm": "self_attn.k_norm"}
_POST_NORMS: Final[Mapping[str, str]] = {
    "post_attention_norm": "post_attention_layernorm",
    "post_ffw_norm": "post_feedforward_layernorm",
}
_GEMMA_NORMS: Final[Mapping[str, str]] = {
    "attn_norm": "input_layernorm",
    "ffn_norm": "pre_feedforward_layernorm",
    **_POST_NORMS,
}
_LAYER_PATTERN: Final = re.compile(r"blk\.(\d+)\.([a-z_]+)\.(weight|bias)")
_WHOLE_PATTERN: Final = re.compile(r"([a-z_]+)\.(weight|bias)")


@dataclass(frozen=True, slots=True)
class GgufArchitecture:
    """How files of one architecture read.

    Attributes:
        name: `general.architecture` of the file, and the prefix of its metadata keys.
        hf_class: The model's class, as config.json names it.
        model_type: Likewise.
        layer_names: A layer's tensors, without suffix: GGUF name → Hugging Face name.
        interleaves_heads: Query and key rows are reordered.
        norm_offset: What was added to the scales of all norms.
    """

    name: str
    hf_class: str
    model_type: str
    layer_names: Mapping[str, str]
    interleaves_heads: bool = False
    norm_offset: float = 0.0

    def hf_tensor_name(self, name: str) -> str | None:
        """Translate a tensor name; None for one that a model of this architecture does not have."""
        layer = _LAYER_PATTERN.fullmatch(name)
        if layer is not None and layer[2] in self.layer_names:
            return f"model.layers.{int(layer[1])}.{self.layer_names[layer[2]]}.{layer[3]}"
        whole = _WHOLE_PATTERN.fullmatch(name)
        if whole is not None and whole[1] in _WHOLE_MODEL_NAMES:
            return f"{_WHOLE_MODEL_NAMES[whole[1]]}.{whole[2]}"
        return None

    def hf_tensor_names(self, file: GgufFile) -> dict[str, str]:
        """Map Hugging Face tensor names to the file's own.

        Raises:
            ModelError: The file has a tensor that this architecture does not have.
        """
        names: dict[str, str] = {}
        for name in file.tensors:
            if name in _NOT_WEIGHTS:
                continue
            hf_name = self.hf_tensor_name(name)
            if hf_name is None:
                raise ModelError(f"{file.path}: tensor {name} does not belong to the {self.name} architecture; take another model")
            names[hf_name] = name
        return names

    def num_interleaved_heads(self, file: GgufFile, name: str) -> int | None:
        """Give the number of heads whose rows are interleaved in this tensor; None where the rows are in order."""
        layer = _LAYER_PATTERN.fullmatch(name)
        if not self.interleaves_heads or layer is None or layer[2] not in ("attn_q", "attn_k"):
            return None
        metadata = GgufMetadata(file, self.name)
        num_heads = metadata.integer("attention.head_count")
        return num_heads if layer[2] == "attn_q" else metadata.integer("attention.head_count_kv", default=num_heads)

    def offset_of(self, name: str) -> float:
        """What was added to this tensor's values."""
        return self.norm_offset if name.endswith("norm.weight") else 0.0


def _pre_norm(name: str, hf_class: str, model_type: str | None = None, **options: Any) -> GgufArchitecture:
    layer_names = {**_PROJECTIONS, **_PRE_NORMS, **options.pop("more_names", {})}
    return GgufArchitecture(name, hf_class, model_type or name, layer_names, **options)


_ALL: Final = (
    _pre_norm("llama", "LlamaForCausalLM", interleaves_heads=True),
    _pre_norm("qwen2", "Qwen2ForCausalLM"),
    _pre_norm("qwen3", "Qwen3ForCausalLM", more_names=_HEAD_NORMS),
    GgufArchitecture("gemma2", "Gemma2ForCausalLM", "gemma2", {**_PROJECTIONS, **_GEMMA_NORMS}, norm_offset=1.0),
    GgufArchitecture(
        "gemma3", "Gemma3ForCausalLM", "gemma3_text", {**_PROJECTIONS, **_GEMMA_NORMS, **_HEAD_NORMS}, norm_offset=1.0
    ),
    GgufArchitecture(
        "phi3",
        "Phi3ForCausalLM",
        "phi3",
        {
            "attn_qkv": "self_attn.qkv_proj",
            "attn_output": "self_attn.o_proj",
            "ffn_up": "mlp.gate_up_proj",
            "ffn_down": "mlp.down_proj",
            **_PRE_NORMS,
        },
    ),
    GgufArchitecture("olmo2", "Olmo2ForCausalLM", "olmo2", {**_PROJECTIONS, **_POST_NORMS, **_HEAD_NORMS}),
    _pre_norm("granite", "GraniteForCausalLM", interleaves_heads=True),
    _pre_norm("smollm3", "SmolLM3ForCausalLM", interleaves_heads=True),
)

ARCHITECTURES: Final[Mapping[str, GgufArchitecture]] = {architecture.name: architecture for architecture in _ALL}
"""Architectures that can be read, by their names in GGUF. Mistral's dense models are `llama` there."""


def architecture_of(file: GgufFile) -> GgufArchitecture:
    """Give a file's architecture.

    Raises:
        ModelError: It is not supported, or a mixture of experts under the same name; says what is supported.
    """
    name = file.metadata.get("general.architecture")
    architecture = ARCHITECTURES.get(name) if isinstance(name, str) else None
    if architecture is None:
        raise ModelError(f"{file.path}: GGUF architecture {name!r} is not supported; supported are {', '.join(ARCHITECTURES)}")
    num_experts = GgufMetadata(file, architecture.name).integer("expert_count", default=0)
    if num_experts > 0:
        raise ModelError(f"{file.path}: a mixture of {num_experts} experts is not supported in GGUF; take a dense model")
    return architecture


def rows_per_head(num_rows: int, num_heads: int) -> int:
    """Give the number of rows of each head.

    Raises:
        ModelError: The heads do not divide the rows, or a head has no halves.
    """
    head_dim = num_rows // max(1, num_heads)
    if num_rows != num_heads * head_dim or head_dim % 2:
        raise ModelError(f"{num_rows} rows cannot be {num_heads} heads with an even number of rows each; pull the model again")
    return head_dim


def restore_row_order(rows: npt.NDArray[Any], *, num_heads: int) -> npt.NDArray[Any]:
    """Undo the interleaving of head halves: `[num_heads * head_dim, ...]` in, the same shape out, in memory of its own.

    In the file, rows `2i` and `2i + 1` of a head are its rows `i` and `head_dim / 2 + i`.

    Raises:
        ModelError: As for `rows_per_head`.
    """
    head_dim = rows_per_head(rows.shape[0], num_heads)
    pairs = rows.reshape(num_heads, head_dim // 2, 2, *rows.shape[1:])
    return np.array(pairs.swapaxes(1, 2), order="C").reshape(rows.shape)

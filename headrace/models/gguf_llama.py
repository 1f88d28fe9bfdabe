"""What a GGUF file of the `llama` architecture means in Hugging Face terms: tensor names, row order, rope scaling.

Converters to GGUF rename the tensors and reorder the rows of the query and key projections (halves of a head interleaved), so that
rotary embedding turns neighbouring pairs. Hugging Face models turn the first half of a head against the second; reading puts the
rows back. The order is one of rows, so it can be restored on packed blocks without unpacking them.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import Any, Final

import numpy as np
import numpy.typing as npt

from headrace.errors import ModelError
from headrace.models.gguf_file import GgufFile, GgufValue

ARCHITECTURE: Final = "llama"
ROPE_FACTORS_TENSOR: Final = "rope_freqs.weight"
"""Per-frequency divisors that stand for Llama 3's rope scaling; not a weight of the Hugging Face model."""

_WHOLE_MODEL_NAMES: Final[Mapping[str, str]] = {
    "token_embd": "model.embed_tokens",
    "output_norm": "model.norm",
    "output": "lm_head",
}
_LAYER_NAMES: Final[Mapping[str, str]] = {
    "attn_norm": "input_layernorm",
    "attn_q": "self_attn.q_proj",
    "attn_k": "self_attn.k_proj",
    "attn_v": "self_attn.v_proj",
    "attn_output": "self_attn.o_proj",
    "ffn_norm": "post_attention_layernorm",
    "ffn_gate": "mlp.gate_proj",
    "ffn_up": "mlp.up_proj",
    "ffn_down": "mlp.down_proj",
}
_LAYER_PATTERN: Final = re.compile(r"blk\.(\d+)\.([a-z_]+)\.(weight|bias)")
_WHOLE_PATTERN: Final = re.compile(r"([a-z_]+)\.(weight|bias)")

# The only parameters that published Llama 3.x checkpoints use; `factor` is read from the tensor itself.
_LLAMA3_LOW_FREQ_FACTOR: Final = 1.0
_LLAMA3_HIGH_FREQ_FACTOR: Final = 4.0
_LLAMA3_ORIGINAL_CONTEXT: Final = 8192


def hf_tensor_name(name: str) -> str | None:
    """Translate a GGUF tensor name; None for one that a Llama model in Hugging Face layout does not have."""
    layer = _LAYER_PATTERN.fullmatch(name)
    if layer is not None and layer[2] in _LAYER_NAMES:
        return f"model.layers.{int(layer[1])}.{_LAYER_NAMES[layer[2]]}.{layer[3]}"
    whole = _WHOLE_PATTERN.fullmatch(name)
    if whole is not None and whole[1] in _WHOLE_MODEL_NAMES:
        return f"{_WHOLE_MODEL_NAMES[whole[1]]}.{whole[2]}"
    return None


def hf_tensor_names(file: GgufFile) -> dict[str, str]:
    """Map Hugging Face tensor names to the file's own.

    Raises:
        ModelError: Another architecture, or a tensor that this architecture does not have.
    """
    check_architecture(file)
    names: dict[str, str] = {}
    for name in file.tensors:
        if name == ROPE_FACTORS_TENSOR:
            continue
        hf_name = hf_tensor_name(name)
        if hf_name is None:
            raise ModelError(f"{file.path}: tensor {name} does not belong to the {ARCHITECTURE} architecture; take another model")
        names[hf_name] = name
    return names


def check_architecture(file: GgufFile) -> None:
    """Refuse a file of another architecture, and mixtures of experts under the same name."""
    architecture = file.metadata.get("general.architecture")
    if architecture != ARCHITECTURE:
        raise ModelError(f"{file.path}: GGUF architecture {architecture!r} is not supported; {ARCHITECTURE!r} is")
    num_experts = metadata_int(file.metadata, "llama.expert_count", default=0)
    if num_experts > 0:
        raise ModelError(f"{file.path}: a mixture of {num_experts} experts is not supported in GGUF; take a dense model")


def num_rotary_heads(metadata: Mapping[str, GgufValue], gguf_name: str) -> int | None:
    """Give the number of heads whose rows are interleaved in this tensor; None where the rows are in order."""
    layer = _LAYER_PATTERN.fullmatch(gguf_name)
    if layer is None or layer[2] not in ("attn_q", "attn_k"):
        return None
    num_heads = metadata_int(metadata, "llama.attention.head_count")
    if layer[2] == "attn_q":
        return num_heads
    return metadata_int(metadata, "llama.attention.head_count_kv", default=num_heads)


def restore_row_order(rows: npt.NDArray[Any], *, num_heads: int) -> npt.NDArray[Any]:
    """Undo the interleaving of head halves: `[num_heads * head_dim, ...]` in, the same shape out.

    In the file, rows `2i` and `2i + 1` of a head are its rows `i` and `head_dim / 2 + i`.
    """
    head_dim = rows.shape[0] // max(1, num_heads)
    if rows.shape[0] != num_heads * head_dim or head_dim % 2:
        raise ModelError(f"{rows.shape[0]} rows cannot be {num_heads} heads with an even number of rows each; pull the model again")
    pairs = rows.reshape(num_heads, head_dim // 2, 2, *rows.shape[1:])
    return np.ascontiguousarray(pairs.swapaxes(1, 2)).reshape(rows.shape)


def rope_scaling(file: GgufFile, *, head_dim: int, rope_theta: float) -> dict[str, Any] | None:
    """Give the `rope_scaling` entry of config.json, or None when positions are not scaled.

    Llama 3's scaling is stored as a tensor of divisors. The parameters behind it are found by computing the same tensor from them
    and comparing, so a scaling that this code does not know is an error and never a silently wrong model.
    """
    kind = file.metadata.get("llama.rope.scaling.type")
    if kind == "linear":
        linear_factor = metadata_float(file.metadata, "llama.rope.scaling.factor", default=1.0)
        return {"rope_type": "linear", "factor": linear_factor} if linear_factor != 1.0 else None
    if kind not in (None, "none"):
        raise ModelError(f"{file.path}: rope scaling {kind!r} is not supported in GGUF; 'linear' and Llama 3's are")
    if ROPE_FACTORS_TENSOR not in file.tensors:
        return None
    stored = file.unpack(ROPE_FACTORS_TENSOR, file.packed(ROPE_FACTORS_TENSOR)).astype(np.float32)
    factor = float(stored.max())
    expected = _llama3_divisors(factor, head_dim=head_dim, rope_theta=rope_theta)
    if stored.shape != expected.shape or not np.allclose(stored, expected, rtol=1e-3):
        raise ModelError(f"{file.path}: {ROPE_FACTORS_TENSOR} is not Llama 3's rope scaling; this scaling is not supported")
    return {
        "rope_type": "llama3",
        "factor": factor,
        "low_freq_factor": _LLAMA3_LOW_FREQ_FACTOR,
        "high_freq_factor": _LLAMA3_HIGH_FREQ_FACTOR,
        "original_max_position_embeddings": _LLAMA3_ORIGINAL_CONTEXT,
    }


def _llama3_divisors(factor: float, *, head_dim: int, rope_theta: float) -> npt.NDArray[np.float32]:
    """Frequencies slower than the low bound are divided by `factor`, faster than the high bound by 1, a smooth mix between."""
    wavelengths = 2 * np.pi * rope_theta ** (np.arange(0, head_dim, 2, dtype=np.float64) / head_dim)
    turns = _LLAMA3_ORIGINAL_CONTEXT / wavelengths
    smooth = np.clip((turns - _LLAMA3_LOW_FREQ_FACTOR) / (_LLAMA3_HIGH_FREQ_FACTOR - _LLAMA3_LOW_FREQ_FACTOR), 0.0, 1.0)
    return (1.0 / ((1.0 - smooth) / factor + smooth)).astype(np.float32)


def metadata_int(metadata: Mapping[str, GgufValue], key: str, *, default: int | None = None) -> int:
    """Read a whole, non-negative number; a missing one without a default is an error that names the key."""
    value = metadata.get(key, default)
    if isinstance(value, bool) or not isinstance(value, int) or value < 0:
        raise ModelError(f"GGUF metadata {key} is {value!r}, not a whole number; pull the model again")
    return value


def metadata_float(metadata: Mapping[str, GgufValue], key: str, *, default: float) -> float:
    """Read a positive number as the shortest decimal that is the same float32: 1e-05, and not 9.999999747378752e-06."""
    value = metadata.get(key, default)
    if isinstance(value, bool) or not isinstance(value, (int, float)) or not 0 < value < float("inf"):
        raise ModelError(f"GGUF metadata {key} is {value!r}, not a number above 0; pull the model again")
    return float(str(np.float32(value)))

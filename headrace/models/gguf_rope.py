"""Rope scaling of a GGUF file as config.json says it.

Files say it by metadata or by tensors of divisors. A scaling that is not known here is an error and never a silently wrong model.
"""

from __future__ import annotations

import math
from typing import Any, Final

import numpy as np
import numpy.typing as npt

from headrace.errors import ModelError
from headrace.models.gguf_architectures import ROPE_FACTORS_TENSOR, ROPE_LONG_TENSOR, ROPE_SHORT_TENSOR
from headrace.models.gguf_file import GgufFile
from headrace.models.gguf_metadata import GgufMetadata, shortest

# The only parameters that published Llama 3.x checkpoints use; `factor` is read from the tensor itself.
_LLAMA3_LOW_FREQ_FACTOR: Final = 1.0
_LLAMA3_HIGH_FREQ_FACTOR: Final = 4.0
_LLAMA3_ORIGINAL_CONTEXT: Final = 8192

_TYPES: Final = ("none", "linear", "yarn", "longrope")
_YARN_DEFAULTS: Final = {"yarn_beta_fast": ("beta_fast", 32.0), "yarn_beta_slow": ("beta_slow", 1.0)}


def rope_scaling(file: GgufFile, metadata: GgufMetadata, *, rotary_dim: int, rope_theta: float) -> dict[str, Any] | None:
    """Give the `rope_scaling` entry of config.json, or None when positions are not scaled.

    Args:
        file: The file.
        metadata: Its architecture's.
        rotary_dim: Dimensions of a head that are turned.
        rope_theta: Base of the frequencies.

    Raises:
        ModelError: The scaling is not known here.
    """
    if ROPE_LONG_TENSOR in file.tensors or ROPE_SHORT_TENSOR in file.tensors:
        return _longrope(file, metadata, rotary_dim)
    kind = metadata.get("rope.scaling.type")
    if kind not in (None, *_TYPES):
        raise ModelError(f"{file.path}: rope scaling {kind!r} is not supported in GGUF; {', '.join(_TYPES)} and Llama 3's are")
    if kind == "linear":
        factor = metadata.real("rope.scaling.factor", default=1.0)
        return {"rope_type": "linear", "factor": factor} if factor != 1.0 else None
    if kind == "yarn":
        return _yarn(metadata)
    if kind == "longrope":
        raise ModelError(f"{file.path}: rope scaling is longrope, but {ROPE_LONG_TENSOR} is missing; pull the model again")
    return _llama3(file, rotary_dim, rope_theta) if ROPE_FACTORS_TENSOR in file.tensors else None


def _yarn(metadata: GgufMetadata) -> dict[str, Any] | None:
    factor = metadata.real("rope.scaling.factor", default=1.0)
    if factor == 1.0:
        return None
    if metadata.has("rope.scaling.yarn_log_multiplier"):
        raise metadata.bad("rope.scaling.yarn_log_multiplier", metadata.get("rope.scaling.yarn_log_multiplier"), "absent")
    scaling: dict[str, Any] = {
        "rope_type": "yarn",
        "factor": factor,
        "original_max_position_embeddings": metadata.integer("rope.scaling.original_context_length"),
    }
    if metadata.real("rope.scaling.yarn_ext_factor", default=1.0) != 1.0:
        raise metadata.bad("rope.scaling.yarn_ext_factor", metadata.get("rope.scaling.yarn_ext_factor"), "1")
    for key, (name, default) in _YARN_DEFAULTS.items():
        value = metadata.real(f"rope.scaling.{key}", default=default)
        if value != default:
            scaling[name] = value
    if metadata.has("rope.scaling.yarn_attn_factor"):
        scaling["attention_factor"] = metadata.real("rope.scaling.yarn_attn_factor")
    return scaling


def _longrope(file: GgufFile, metadata: GgufMetadata, rotary_dim: int) -> dict[str, Any]:
    factors = {}
    for key, name in (("short_factor", ROPE_SHORT_TENSOR), ("long_factor", ROPE_LONG_TENSOR)):
        if name not in file.tensors:
            raise ModelError(f"{file.path}: tensor {name} is missing; pull the model again")
        values = _divisors(file, name)
        if values.shape != (rotary_dim // 2,):
            raise ModelError(f"{file.path}: {name} has shape {list(values.shape)}, not [{rotary_dim // 2}]; pull the model again")
        factors[key] = [shortest(value) for value in values.tolist()]
    original = metadata.integer("rope.scaling.original_context_length")
    context = metadata.integer("context_length")
    if original < 2:
        raise metadata.bad("rope.scaling.original_context_length", original, "a context length")
    scaling: dict[str, Any] = {"rope_type": "longrope", **factors, "original_max_position_embeddings": original}
    # Attention is scaled by a function of the two lengths; the file says it where the model's makers chose another.
    usual = math.sqrt(1 + math.log(context / original) / math.log(original)) if context > original else 1.0
    factor = metadata.real("rope.scaling.attn_factor", default=usual)
    if not math.isclose(factor, usual, rel_tol=1e-5):
        scaling["attention_factor"] = factor
    return scaling


def _llama3(file: GgufFile, rotary_dim: int, rope_theta: float) -> dict[str, Any]:
    """Llama 3's scaling from its divisors: found by computing the same tensor from the parameters and comparing."""
    stored = _divisors(file, ROPE_FACTORS_TENSOR)
    factor = float(stored.max())
    expected = _llama3_divisors(factor, rotary_dim=rotary_dim, rope_theta=rope_theta)
    if stored.shape != expected.shape or not np.allclose(stored, expected, rtol=1e-3):
        raise ModelError(f"{file.path}: {ROPE_FACTORS_TENSOR} is not Llama 3's rope scaling; this scaling is not supported")
    return {
        "rope_type": "llama3",
        "factor": factor,
        "low_freq_factor": _LLAMA3_LOW_FREQ_FACTOR,
        "high_freq_factor": _LLAMA3_HIGH_FREQ_FACTOR,
        "original_max_position_embeddings": _LLAMA3_ORIGINAL_CONTEXT,
    }


def _divisors(file: GgufFile, name: str) -> npt.NDArray[np.float32]:
    values = file.unpack(name, file.packed(name)).astype(np.float32)
    if not (np.isfinite(values).all() and (values > 0).all()):
        raise ModelError(f"{file.path}: {name} holds what divides no frequency; pull the model again")
    return values


def _llama3_divisors(factor: float, *, rotary_dim: int, rope_theta: float) -> npt.NDArray[np.float32]:
    """Frequencies slower than the low bound are divided by `factor`, faster than the high bound by 1, a smooth mix between."""
    wavelengths = 2 * np.pi * rope_theta ** (np.arange(0, rotary_dim, 2, dtype=np.float64) / rotary_dim)
    turns = _LLAMA3_ORIGINAL_CONTEXT / wavelengths
    smooth = np.clip((turns - _LLAMA3_LOW_FREQ_FACTOR) / (_LLAMA3_HIGH_FREQ_FACTOR - _LLAMA3_LOW_FREQ_FACTOR), 0.0, 1.0)
    return (1.0 / ((1.0 - smooth) / factor + smooth)).astype(np.float32)

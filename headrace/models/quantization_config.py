"""The `quantization_config` of config.json, checked: how the tensors of a quantised safetensors checkpoint are laid out.

What is read here decides how stored tensors are put together; which modules are quantised is seen from the tensors themselves, so
lists of modules left out (`modules_to_not_convert`, `ignore`) hold by what the files store.

Source: transformers' quantisation configurations; the formats of AutoAWQ, GPTQModel and compressed-tensors.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any, Final

from headrace.errors import ModelError

QUANTIZATION_KEY: Final = "quantization_config"
_GPTQ_BITS: Final = (4, 8)
_PACKED_BITS: Final = (4, 8)
_COMPRESSED_FORMATS: Final = ("pack-quantized", "int-quantized", "float-quantized", "naive-quantized")


@dataclass(frozen=True, slots=True)
class QuantizationScheme:
    """How quantised tensors are stored.

    Attributes:
        method: `quant_method`, for example `gptq`.
        bits: Size of a packed code; None where each tensor says it itself.
        zero_offset: What is added to a stored zero point: 1 in GPTQ's first format.
        block_shape: Rows and columns that share a scale; None where scales are of whole rows or tensors.
        input_type: What the checkpoint's maker quantised the inputs of its matrices to, symmetrically: `int8` or `float8`; empty
            where inputs stayed as they were, or not all groups of layers say the same.
    """

    method: str
    bits: int | None = None
    zero_offset: int = 0
    block_shape: tuple[int, int] | None = None
    input_type: str = ""


def read_scheme(config: Mapping[str, Any]) -> QuantizationScheme | None:
    """Give the scheme that a config.json names; None where the checkpoint is not quantised.

    Raises:
        ModelError: It is not supported; names the value and what is.
    """
    raw = config.get(QUANTIZATION_KEY)
    if raw is None:
        return None
    if not isinstance(raw, dict):
        raise _refused("is", raw, "an object")
    method = raw.get("quant_method")
    read = _READERS.get(method) if isinstance(method, str) else None
    if read is None:
        raise _refused("quant_method is", method, ", ".join(_READERS))
    return read(raw)


def _awq(raw: Mapping[str, Any]) -> QuantizationScheme:
    _check(raw, "bits", (4,))
    _check(raw, "version", ("gemm",), default="gemm")
    _check(raw, "zero_point", (True,), default=True)
    return QuantizationScheme("awq", bits=4)


def _gptq(raw: Mapping[str, Any]) -> QuantizationScheme:
    bits = _check(raw, "bits", _GPTQ_BITS)
    checkpoint_format = _check(raw, "checkpoint_format", ("gptq", "gptq_v2"), default="gptq")
    _check(raw, "is_marlin_format", (False,), default=False)
    for pattern, changes in (raw.get("dynamic") or {}).items():
        # A pattern that starts with "-:" leaves modules out, which shows in the tensors.
        if not pattern.startswith("-:") and isinstance(changes, dict) and changes.get("bits", bits) != bits:
            raise _refused("dynamic changes bits to", changes["bits"], f"the same as bits, {bits}")
    return QuantizationScheme("gptq", bits=bits, zero_offset=1 if checkpoint_format == "gptq" else 0)


def _compressed_tensors(raw: Mapping[str, Any]) -> QuantizationScheme:
    groups = raw.get("config_groups")
    if not isinstance(groups, dict) or not groups:
        raise _refused("config_groups is", groups, "an object of groups")
    if raw.get("transform_config"):
        raise _refused("transform_config is", raw["transform_config"], "none: weights without online rotations")
    sparsity = raw.get("sparsity_config") or {}
    if sparsity.get("format", "dense") != "dense":
        raise _refused("sparsity_config.format is", sparsity["format"], "dense")
    blocks = {_compressed_group(raw, f"config_groups.{name}", group) for name, group in groups.items()} - {None}
    if len(blocks) > 1:
        raise _refused("config_groups have block_structure", sorted(filter(None, blocks)), "one for all groups")
    input_types = {_input_type(group.get("input_activations")) for group in groups.values()}
    return QuantizationScheme(
        "compressed-tensors",
        block_shape=next(iter(blocks), None),
        input_type=input_types.pop() if len(input_types) == 1 else "",
    )


def _compressed_group(raw: Mapping[str, Any], name: str, group: Any) -> tuple[int, int] | None:
    """Check one group of layers; gives the shape of its blocks where it has any."""
    weights = group.get("weights") if isinstance(group, dict) else None
    if not isinstance(weights, dict):
        raise _refused(f"{name}.weights is", weights, "an object")
    stored_format = group.get("format") or raw.get("format")
    if stored_format not in _COMPRESSED_FORMATS:
        raise _refused(f"{name}.format is", stored_format, ", ".join(_COMPRESSED_FORMATS))
    kind, bits = weights.get("type", "int"), weights.get("num_bits")
    allowed = {"int": _PACKED_BITS if stored_format == "pack-quantized" else (8,), "float": (8,)}.get(kind)
    if allowed is None or bits not in allowed or (kind == "float" and stored_format == "pack-quantized"):
        raise _refused(f"{name}.weights is", f"{kind} of {bits} bits as {stored_format}", "int of 4 or 8 bits, float of 8")
    if weights.get("strategy") != "block":
        return None
    return _block_shape(f"{name}.weights.block_structure", weights.get("block_structure"))


def _input_type(declared: Any) -> str:
    """What a group of layers has its inputs quantised to; see `QuantizationScheme`."""
    if not isinstance(declared, dict) or declared.get("num_bits") != 8 or declared.get("symmetric") is False:
        return ""
    return {"int": "int8", "float": "float8"}.get(declared.get("type", "int"), "")


def _fp8(raw: Mapping[str, Any]) -> QuantizationScheme:
    _check(raw, "fmt", ("e4m3", "e5m2"), default="e4m3")
    block = raw.get("weight_block_size")
    return QuantizationScheme(
        "fp8",
        block_shape=None if block is None else _block_shape("weight_block_size", block),
        input_type="float8" if raw.get("activation_scheme") in ("dynamic", "static") else "",
    )


def _fbgemm_fp8(raw: Mapping[str, Any]) -> QuantizationScheme:
    return QuantizationScheme("fbgemm_fp8")


def _modelopt(raw: Mapping[str, Any]) -> QuantizationScheme:
    _check(raw, "quant_algo", ("FP8",))
    return QuantizationScheme("modelopt")


def _mxfp4(raw: Mapping[str, Any]) -> QuantizationScheme:
    # Only experts are stored so, each tensor under a name of its own: whoever knows experts puts them together.
    return QuantizationScheme("mxfp4")


_READERS: Final[Mapping[str, Callable[[Mapping[str, Any]], QuantizationScheme]]] = {
    "awq": _awq,
    "gptq": _gptq,
    "compressed-tensors": _compressed_tensors,
    "fp8": _fp8,
    "fbgemm_fp8": _fbgemm_fp8,
    "modelopt": _modelopt,
    "mxfp4": _mxfp4,
}


def _check(raw: Mapping[str, Any], key: str, allowed: tuple[Any, ...], *, default: Any = None) -> Any:
    """Give a value that must be one of a few; text is compared without case."""
    value = raw.get(key)
    if value is None:
        value = default
    if isinstance(value, str) and value not in allowed:
        value = value.lower()
    if value not in allowed or isinstance(value, bool) != isinstance(allowed[0], bool):
        raise _refused(f"{key} is", raw.get(key), ", ".join(map(str, allowed)))
    return value


def _block_shape(name: str, value: Any) -> tuple[int, int]:
    if isinstance(value, str):
        # Early files of compressed-tensors write "128x128".
        value = [int(part) if part.isdecimal() else part for part in value.split("x")]
    is_shape = isinstance(value, list) and len(value) == 2 and all(type(item) is int and item > 0 for item in value)
    if not is_shape:
        raise _refused(f"{name} is", value, "two numbers of rows and columns")
    return value[0], value[1]


def _refused(what: str, value: Any, supported: str) -> ModelError:
    return ModelError(
        f"{QUANTIZATION_KEY} of config.json: {what} {value!r}, which is not supported; supported: {supported}; "
        "take another checkpoint",
        param=QUANTIZATION_KEY,
    )

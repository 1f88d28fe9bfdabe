"""What is known of a tensor without reading it, whatever file holds it."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True, slots=True)
class TensorInfo:
    """What is known of a tensor without reading it.

    Attributes:
        name: Hugging Face name, for example `model.layers.0.self_attn.q_proj.weight`.
        shape: Row-major shape.
        dtype_name: How it is stored: `f32`, `f16`, `bf16`, `f8_e4m3`, `f8_e5m2`, an integer type, a GGUF quantisation such as
            `q4_1`, or another one such as `awq_int4`.
    """

    name: str
    shape: tuple[int, ...]
    dtype_name: str

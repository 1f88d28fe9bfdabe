"""Linear layers: the one place that knows how a weight matrix is laid out for multiplication.

bfloat16 weights are packed once, at load, into oneDNN's blocked layout where the CPU multiplies bfloat16 natively: a packed
decode step of SmolLM2-135M takes two thirds of the time that plain `F.linear` takes, since nothing is reordered at each call.
Everything else is `F.linear`. oneDNN chooses its kernel, and so the order of its sums, by the number of rows: in bfloat16 a row's
result may differ in its last bits from batch size to batch size.
"""

from __future__ import annotations

import torch
from torch.nn import functional

# oneDNN asks for a typical number of rows when it lays weights out; measured, the layout is the same for 1, 16 and 512.
_PACK_ROWS = 16


class Linear:
    """`y = x @ weight.T + bias`.

    Args:
        weight: `[out_features, in_features]`. Not kept when it is packed.
        bias: `[out_features]`, or None.
    """

    def __init__(self, weight: torch.Tensor, bias: torch.Tensor | None = None) -> None:
        self.out_features, self.in_features = weight.shape
        self.num_bytes = weight.nbytes
        self._bias = bias
        self._is_packed = weight.device.type == "cpu" and weight.dtype is torch.bfloat16 and can_pack_bfloat16()
        self._weight = _pack(weight) if self._is_packed else weight

    def __call__(self, x: torch.Tensor) -> torch.Tensor:
        """Multiply `x: [num_rows, in_features]`; gives `[num_rows, out_features]` of the same type."""
        if self._is_packed:
            packed_product: torch.Tensor = torch.ops.mkldnn._linear_pointwise(x, self._weight, self._bias, "none", [], "")
            return packed_product
        return functional.linear(x, self._weight, self._bias)


def can_pack_bfloat16() -> bool:
    """Whether this CPU and this build of torch multiply bfloat16 through packed oneDNN weights."""
    mkldnn = torch.ops.mkldnn
    is_built = hasattr(mkldnn, "_reorder_linear_weight") and hasattr(mkldnn, "_linear_pointwise")
    return is_built and torch.backends.mkldnn.is_available() and bool(mkldnn._is_mkldnn_bf16_supported())


def _pack(weight: torch.Tensor) -> torch.Tensor:
    packed: torch.Tensor = torch.ops.mkldnn._reorder_linear_weight(weight.contiguous(), _PACK_ROWS)
    return packed

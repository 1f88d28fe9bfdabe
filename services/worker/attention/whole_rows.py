"""Attention of encoders in plain torch: a token attends to all tokens of its row, before and after it; nothing is kept."""

from __future__ import annotations

import torch
from torch.nn import functional

from services.worker.layers.ops import AttentionSpec, StepTensors


def attend_whole_rows(step: StepTensors, queries: torch.Tensor, keys_values: torch.Tensor, spec: AttentionSpec) -> torch.Tensor:
    """Attend row by row, so that a row's result does not depend on its neighbours.

    Args:
        step: Of whole rows.
        queries: `[num_tokens, num_heads, head_dim]`.
        keys_values: `[num_tokens, 2, num_kv_heads, head_dim]`.
        spec: The layer.

    Returns:
        `[num_tokens, num_heads * head_dim]`.
    """
    outputs = torch.empty_like(queries)
    num_repeats = spec.num_heads // spec.num_kv_heads
    start = 0
    for count in step.row_counts.tolist():
        tokens = slice(start, start + count)
        keys, values = keys_values[tokens].permute(1, 2, 0, 3).repeat_interleave(num_repeats, dim=1).unsqueeze(1).unbind(0)
        selected = queries[tokens].transpose(0, 1).unsqueeze(0)
        attended = functional.scaled_dot_product_attention(selected, keys, values, scale=spec.scale)
        outputs[tokens] = attended.squeeze(0).transpose(0, 1)
        start += count
    return outputs.flatten(1)

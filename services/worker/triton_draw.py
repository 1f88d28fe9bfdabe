"""Draws tokens where the logits are, by a Triton kernel: the tokens that `sampler.draw_tokens` draws on the CPU."""

from __future__ import annotations

from typing import Final

import numpy as np
import numpy.typing as npt
import torch

from kernels.sample.inputs import SamplingRows
from kernels.sample.launch import sample
from services.worker.batch_inputs import Limits
from services.worker.device import Device
from services.worker.gpu_step import Staging
from services.worker.sampler import logits_of
from services.worker.sampling_table import Int64Array, SampledRows

_NUM_PARAMETERS: Final = 6


class TritonDraw:
    """See `sampler.Draw`.

    Args:
        device: What draws.
        limits: No more rows than a step may have tokens are drawn for at once.
    """

    def __init__(self, device: Device, limits: Limits) -> None:
        self._torch_device = device.torch_device
        self._staging = Staging(device, _NUM_PARAMETERS * limits.max_num_batched_tokens)

    def __call__(self, logits: torch.Tensor, rows: SampledRows, indices: Int64Array) -> Int64Array:
        """Draw."""
        seeds, positions, top_k, temperature, top_p, min_p = self._staging.send(
            (
                torch.from_numpy(rows.seeds[indices].view(np.int64)),
                torch.from_numpy(rows.positions[indices]),
                torch.from_numpy(rows.top_k[indices]),
                _bits(rows.temperature[indices]),
                _bits(rows.top_p[indices]),
                _bits(rows.min_p[indices]),
            )
        )
        parameters = SamplingRows(
            temperature=_floats(temperature),
            top_k=top_k.to(torch.int32),
            top_p=_floats(top_p),
            min_p=_floats(min_p),
            seeds=seeds,
            positions=positions,
        )
        # The draw changes no logits: neither adjustments nor a mask are handed to it.
        tokens, _ = sample(logits_of(logits, indices).to(self._torch_device), parameters)
        token_ids: Int64Array = tokens.cpu().numpy()
        return token_ids


def _bits(values: npt.NDArray[np.float32]) -> torch.Tensor:
    """Numbers on their way through a staging memory of integers."""
    return torch.from_numpy(values).view(torch.int32)


def _floats(bits: torch.Tensor) -> torch.Tensor:
    return bits.to(torch.int32).view(torch.float32)

"""A step's way to the device: laid out in page-locked memory and sent as one copy that the host does not wait for."""

from __future__ import annotations

from collections.abc import Sequence

import torch

from services.worker.attention.triton_paged import StagedStep
from services.worker.batch_inputs import Limits
from services.worker.device import Device
from services.worker.layers.ops import StepTensors

# Three a token, and two for those whose logits are wanted: to be sampled, and to say how likely a prompt was.
_TOKEN_ARRAYS = 5
_ROW_ARRAYS = 5


class Staging:
    """Page-locked memory through which numbers are sent, one lot after the other: the next is laid out when the last was read.

    Args:
        device: Where to.
        size: No lot has more numbers.
    """

    def __init__(self, device: Device, size: int) -> None:
        self._host = device.staging(size, torch.int64)
        self._device = torch.empty(size, dtype=torch.int64, device=device.torch_device)
        self._is_read = device.fence()

    def send(self, arrays: Sequence[torch.Tensor]) -> list[torch.Tensor]:
        """Send int64 arrays; gives them on the device, valid until the next call."""
        self._is_read.synchronize()
        sent, start = [], 0
        for array in arrays:
            end = start + array.numel()
            self._host[start:end].view(array.shape).copy_(array)
            sent.append(self._device[start:end].view(array.shape))
            start = end
        self._device[:start].copy_(self._host[:start], non_blocking=True)
        self._is_read.record()
        return sent


class StepStaging(Staging):
    """Sends steps.

    Args:
        device: Where to.
        limits: No step is larger.
    """

    def __init__(self, device: Device, limits: Limits) -> None:
        max_pages = -(-limits.max_model_len // limits.page_size)
        num_rows = limits.max_num_seqs + 1
        super().__init__(device, _TOKEN_ARRAYS * limits.max_num_batched_tokens + num_rows * (_ROW_ARRAYS + max_pages))
        self._page_size = limits.page_size

    def load(self, step: StepTensors) -> StagedStep:
        """Send a step.

        Args:
            step: On the host.

        Returns:
            The step on the device, valid until the next one.
        """
        num_decode = step.num_decode_rows
        lengths = step.row_starts + step.row_counts
        extend_counts = step.row_counts[num_decode:]
        query_starts = torch.zeros(len(extend_counts) + 1, dtype=torch.int64, device="cpu")
        torch.cumsum(extend_counts, 0, out=query_starts[1:])
        width = -(-int(lengths.max()) // self._page_size)
        sent = self.send(
            (
                step.token_ids,
                step.positions,
                step.slot_mapping,
                step.sampled_tokens,
                step.row_starts,
                step.row_counts,
                lengths,
                query_starts,
                step.page_tables[:, :width],
            )
        )
        token_ids, positions, slot_mapping, sampled_tokens, row_starts, row_counts, lengths_sent, starts_sent, page_tables = sent
        return StagedStep(
            token_ids=token_ids,
            positions=positions,
            slot_mapping=slot_mapping,
            row_starts=row_starts,
            row_counts=row_counts,
            page_tables=page_tables,
            num_decode_rows=num_decode,
            sampled_tokens=sampled_tokens,
            lengths=lengths_sent,
            query_starts=starts_sent,
            max_length=int(lengths[:num_decode].max()) if num_decode else 0,
            max_new_tokens=int(extend_counts.max()) if len(extend_counts) else 0,
        )

"""Decode steps as captured graphs: one for each of some numbers of rows; a step is padded to the next of them.

A step of one token a row is hundreds of small launches whatever the batch, and launching takes longer than computing. A graph
launches them as one, over inputs and outputs that stay where they are. Padded rows have no context, are stored nowhere, and give
logits that nobody reads.
"""

from __future__ import annotations

from bisect import bisect_left
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Final

import torch

from services.worker.attention.triton_paged import StagedStep
from services.worker.batch_inputs import Limits
from services.worker.device import Device, Graph
from services.worker.gpu_step import StepStaging
from services.worker.layers.ops import StepTensors

PADS: Final = (0, 0, -1, 0, 0)
"""What padded rows have for token, position, slot, length and index of the sampled token."""


@dataclass(frozen=True, slots=True)
class Outputs:
    """What a step gives, on the device.

    Attributes:
        logits: float32 `[num_sampled, vocab_size]`.
        best: int64 `[num_sampled]`, the likeliest tokens.
        is_finite: bool `[num_sampled]`, whether all of a row's logits are.
    """

    logits: torch.Tensor
    best: torch.Tensor
    is_finite: torch.Tensor

    @classmethod
    def of(cls, logits: torch.Tensor) -> Outputs:
        """Find the likeliest tokens; a sum is finite only if all its terms are, and is one pass."""
        wide = logits.float()
        return cls(wide, wide.argmax(dim=-1), torch.isfinite(wide.sum(dim=-1)))

    def first(self, count: int) -> Outputs:
        """Give the first rows."""
        return Outputs(self.logits[:count], self.best[:count], self.is_finite[:count])


class DecodeGraphs:
    """The graphs.

    Args:
        device: What captures and launches.
        staging: How a step's numbers get to the device.
        limits: Sizes of the worker.
        vocab_size: Width of the logits.
        batch_sizes: Numbers of rows to capture, none over `max_num_seqs`.
    """

    def __init__(
        self, device: Device, staging: StepStaging, limits: Limits, *, vocab_size: int, batch_sizes: Sequence[int]
    ) -> None:
        self.batch_sizes: tuple[int, ...] = ()
        """What is captured, ascending."""
        self._device = device
        self._staging = staging
        self._wanted = sorted(batch_sizes, reverse=True)
        # Each with the step that it reads, which lives as long.
        self._graphs: dict[int, tuple[Graph, StagedStep]] = {}
        self._max_length = limits.max_model_len
        num_rows = self._wanted[0] if self._wanted else 0
        where = device.torch_device
        self._pads = torch.tensor(PADS, dtype=torch.int64, device="cpu").unsqueeze(1).expand(-1, num_rows)
        self._inputs = torch.zeros((len(PADS), num_rows), dtype=torch.int64, device=where)
        self._page_tables = torch.zeros((num_rows, -(-limits.max_model_len // limits.page_size)), dtype=torch.int64, device=where)
        self._outputs = Outputs(
            torch.zeros((num_rows, vocab_size), dtype=torch.float32, device=where),
            torch.zeros(num_rows, dtype=torch.int64, device=where),
            torch.zeros(num_rows, dtype=torch.bool, device=where),
        )

    def capture(self, compute: Callable[[StagedStep], torch.Tensor]) -> tuple[int, ...]:
        """Capture all graphs, the largest first: what it takes serves all others.

        Args:
            compute: Computes a step; gives its logits, of any floating-point type.

        Returns:
            The numbers of rows for which the memory did not suffice.
        """
        dropped = []
        self._inputs.copy_(self._pads)
        for size in self._wanted:
            try:
                self._graphs[size] = self._captured(size, compute)
            except Exception as error:
                if not self._device.is_out_of_memory(error):
                    raise
                dropped.append(size)
            if size in dropped:
                # Not while the error is at hand, which holds what was taken before it.
                self._device.release()
        self.batch_sizes = tuple(sorted(self._graphs))
        return tuple(dropped)

    def size_for(self, step: StepTensors) -> int | None:
        """The number of rows of the graph that a step fits into; None for one that fits into none."""
        num_rows = step.row_counts.shape[0]
        if step.num_decode_rows != num_rows or step.sampled_tokens.shape[0] > num_rows:
            return None
        index = bisect_left(self.batch_sizes, num_rows)
        return self.batch_sizes[index] if index < len(self.batch_sizes) else None

    def replay(self, step: StepTensors, size: int) -> Outputs:
        """Compute a step.

        Args:
            step: On the host.
            size: From `size_for`.

        Returns:
            Valid until the next step.
        """
        num_rows, lengths = step.num_decode_rows, step.row_starts + 1
        padded = self._pads[:, :size].clone()
        padded[:4, :num_rows] = torch.stack((step.token_ids, step.positions, step.slot_mapping, lengths))
        padded[4, : step.sampled_tokens.shape[0]] = step.sampled_tokens
        width = min(self._page_tables.shape[1], step.page_tables.shape[1])
        inputs, page_tables = self._staging.send((padded, step.page_tables[:, :width]))
        self._inputs[:, :size].copy_(inputs)
        self._page_tables[:num_rows, :width].copy_(page_tables)
        self._graphs[size][0].replay()
        return self._outputs.first(step.sampled_tokens.shape[0])

    def _captured(self, size: int, compute: Callable[[StagedStep], torch.Tensor]) -> tuple[Graph, StagedStep]:
        step, outputs = self._step(size), self._outputs.first(size)

        def run() -> None:
            found = Outputs.of(compute(step))
            outputs.logits.copy_(found.logits)
            outputs.best.copy_(found.best)
            outputs.is_finite.copy_(found.is_finite)

        # Kernels are compiled and libraries set up at their first call, which cannot be captured.
        run()
        return self._device.capture(run), step

    def _step(self, size: int) -> StagedStep:
        token_ids, positions, slot_mapping, lengths, sampled_tokens = self._inputs[:, :size].unbind()
        return StagedStep(
            token_ids=token_ids,
            positions=positions,
            slot_mapping=slot_mapping,
            row_starts=positions,
            row_counts=torch.ones_like(positions),
            page_tables=self._page_tables[:size],
            num_decode_rows=size,
            sampled_tokens=sampled_tokens,
            lengths=lengths,
            query_starts=torch.zeros(1, dtype=torch.int64, device=lengths.device),
            max_length=self._max_length,
            max_new_tokens=0,
        )

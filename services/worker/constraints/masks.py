"""Masks of tokens that a grammar allows, laid over the logits of a row."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, Final

import numpy as np
import numpy.typing as npt
import torch

Int32Array = npt.NDArray[np.int32]
BoolArray = npt.NDArray[np.bool_]
LikeliestAllowed = Callable[[torch.Tensor, Int32Array], int]
"""Finds the likeliest token that a mask allows, and it allows one; arguments are those of `mask_row`."""

_FEW_TOKENS: Final = 128
"""At least as many as any other adjustment may rule out."""


def mask_row(logits: torch.Tensor, mask: Int32Array) -> None:
    """Set the logits of tokens whose bit is 0 to minus infinity, in place, where that leaves any token.

    A row may have lost all that its mask allows to an earlier adjustment, such as an end that may not come yet: then the mask wins.

    Args:
        logits: `[vocab_size]`.
        mask: `[ceil(vocab_size / 32)]`; bit `t % 32` of word `t // 32` stands for token `t`, 1 allows it.
    """
    is_allowed = _bits(mask, len(logits))
    logits.masked_fill_(torch.from_numpy(~is_allowed).to(logits.device), -torch.inf)
    if np.bitwise_count(mask.view(np.uint32)).sum() <= _FEW_TOKENS:
        allowed = torch.from_numpy(np.flatnonzero(is_allowed)).to(logits.device)
        if len(allowed) and bool(torch.isneginf(logits[allowed]).all()):
            logits[allowed] = 0.0


def likeliest_allowed(logits: torch.Tensor, mask: Int32Array) -> int:
    """See `LikeliestAllowed`; the logits may be changed as `mask_row` does."""
    is_allowed = _bits(mask, len(logits))
    num_allowed = np.count_nonzero(is_allowed)
    if num_allowed > max(len(logits) // 2, _FEW_TOKENS):
        logits[torch.from_numpy(np.flatnonzero(~is_allowed)).to(logits.device)] = -torch.inf
        return int(logits.argmax())
    allowed = torch.from_numpy(np.flatnonzero(is_allowed)).to(logits.device)
    return int(allowed[logits[allowed].argmax()])


def native_likeliest_allowed(library: Any) -> LikeliestAllowed:
    """One that calls a native kernel: for logits on the CPU, a tenth of the time."""

    def find(logits: torch.Tensor, mask: Int32Array) -> int:
        assert logits.dtype == torch.float32 and logits.stride(0) == 1
        return int(library.hr_likeliest_allowed(logits.data_ptr(), mask.ctypes.data, len(logits)))

    return find


def _bits(mask: Int32Array, vocab_size: int) -> BoolArray:
    return np.unpackbits(mask.view(np.uint8), count=vocab_size, bitorder="little").view(np.bool_)

"""Calls of kernels at the sizes of the roofline on paper (`kernels/RESOURCES.md`), to be timed on a GPU. Triton comes late."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import torch

BF16 = torch.bfloat16


@dataclass(frozen=True, slots=True)
class Bench:
    """One call.

    Attributes:
        op: Folder under `kernels/`.
        label: That of its workload on the roofline.
        prepare: Makes inputs on a device; gives the call.
    """

    op: str
    label: str
    prepare: Callable[[torch.device], Callable[[], Any]]


def benches() -> Iterator[Bench]:
    """All of them."""
    for num_tokens in (64, 4096):
        yield Bench("rms_norm", f"add_rms_norm bf16 {num_tokens} × 4096", lambda device, n=num_tokens: _rms_norm(device, n))
        yield Bench("act_and_mul", f"silu_and_mul bf16 {num_tokens} × 14336", lambda device, n=num_tokens: _silu(device, n))
        yield Bench("rotary", f"bf16 {num_tokens} tokens, 40 heads of 128", lambda device, n=num_tokens: _rotary(device, n))
        yield Bench("store_kv", f"bf16 {num_tokens} tokens, 8 heads of 128", lambda device, n=num_tokens: _store_kv(device, n))
    for rows, length in ((1, 131072), (64, 4096)):
        label = f"bf16 {rows} rows of {length}, 32 heads on 8 of 128"
        yield Bench("paged_decode_attention", label, lambda device, r=rows, n=length: _decode(device, r, n))
    for new, cached in ((8192, 0), (2048, 30720)):
        label = f"bf16 {new} new over {cached} cached, 32 heads on 8 of 128"
        yield Bench("extend_attention", label, lambda device, n=new, c=cached: _extend(device, n, c))
    yield Bench("sample", "draw of 64 rows × 128256", _sample)
    for num_tokens, experts in ((1, 2), (64, 8), (4096, 8)):
        label = f"Mixtral 8x7B bf16, {num_tokens} tokens, {experts} of 8 experts"
        yield Bench("fused_moe", label, lambda device, n=num_tokens: _mixtral(device, n))


def _normal(device: torch.device, *shape: int, dtype: torch.dtype = BF16) -> torch.Tensor:
    return torch.randn(shape, device=device, dtype=dtype)


def _rms_norm(device: torch.device, num_tokens: int) -> Callable[[], Any]:
    from kernels.rms_norm.launch import add_rms_norm

    x, residual, weight = _normal(device, num_tokens, 4096), _normal(device, num_tokens, 4096), _normal(device, 4096)
    return lambda: add_rms_norm(x, residual, weight, eps=1e-6, out=x)


def _silu(device: torch.device, num_tokens: int) -> Callable[[], Any]:
    from kernels.act_and_mul.launch import silu_and_mul

    x = _normal(device, num_tokens, 2 * 14336)
    out = torch.empty((num_tokens, 14336), device=device, dtype=BF16)
    return lambda: silu_and_mul(x, out=out)


def _rotary(device: torch.device, num_tokens: int) -> Callable[[], Any]:
    from kernels.rotary.launch import rotary

    queries, keys = _normal(device, num_tokens, 32, 128), _normal(device, num_tokens, 8, 128)
    cos, sin = (_normal(device, 8192, 64, dtype=torch.float32) for _ in range(2))
    positions = torch.arange(num_tokens, device=device)
    return lambda: rotary(queries, keys, positions, cos, sin, is_interleaved=False)


def _store_kv(device: torch.device, num_tokens: int) -> Callable[[], Any]:
    from kernels.store_kv.launch import store_kv

    keys, values = _normal(device, num_tokens, 8, 128), _normal(device, num_tokens, 8, 128)
    pages = _normal(device, num_tokens // 16, 16, 2, 8, 128)
    slots = torch.randperm(num_tokens, device=device)
    return lambda: store_kv(keys, values, pages, slots)


def _paged(device: torch.device, num_rows: int, length: int) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Pages in random order, page tables, lengths."""
    width = length // 16
    pages = _normal(device, num_rows * width, 16, 2, 8, 128)
    tables = torch.randperm(num_rows * width, device=device).view(num_rows, width)
    return pages, tables, torch.full((num_rows,), length, device=device)


def _decode(device: torch.device, num_rows: int, length: int) -> Callable[[], Any]:
    from kernels.attention_inputs import Scoring
    from kernels.paged_decode_attention.launch import paged_decode_attention

    pages, tables, lengths = _paged(device, num_rows, length)
    queries = _normal(device, num_rows, 32, 128)
    scoring = Scoring(128**-0.5)
    return lambda: paged_decode_attention(queries, pages, tables, lengths, scoring=scoring, max_length=length)


def _extend(device: torch.device, num_new: int, num_cached: int) -> Callable[[], Any]:
    from kernels.attention_inputs import Scoring
    from kernels.extend_attention.launch import extend_attention

    pages, tables, lengths = _paged(device, 1, num_new + num_cached)
    queries, starts = _normal(device, num_new, 32, 128), torch.tensor([0, num_new], device=device)
    scoring = Scoring(128**-0.5)
    return lambda: extend_attention(queries, pages, tables, starts, lengths, scoring=scoring, max_new_tokens=num_new)


def _sample(device: torch.device) -> Callable[[], Any]:
    from kernels.sample.inputs import SamplingRows
    from kernels.sample.launch import sample

    logits = _normal(device, 64, 128256, dtype=torch.float32)
    ones, numbers = torch.ones(64, device=device), torch.arange(64, device=device)
    rows = SamplingRows(
        temperature=ones,
        top_k=torch.zeros(64, dtype=torch.int32, device=device),
        top_p=ones,
        min_p=torch.zeros(64, device=device),
        seeds=numbers,
        positions=numbers,
    )
    return lambda: sample(logits, rows)


def _mixtral(device: torch.device, num_tokens: int) -> Callable[[], Any]:
    from kernels.fused_moe.launch import fused_moe, route
    from kernels.fused_moe.reference import Experts

    layer = Experts(_normal(device, 8, 2 * 14336, 4096), _normal(device, 8, 4096, 14336))
    x = _normal(device, num_tokens, 4096)
    weights, experts = route(_normal(device, num_tokens, 8), 2)
    return lambda: fused_moe(x, layer, weights, experts)

"""Goal: paged attention in torch is attention by its definition, with windows, soft caps and sinks, whatever stands beside a row.

Method: random pages; each query computed alone, in float64, over a list of its keys.
"""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch

from services.worker.attention.torch_cpu import TorchCpuAttention, _as_codes
from services.worker.layers.ops import AttentionSpec, StepTensors

NUM_HEADS, NUM_KV_HEADS, HEAD_DIM = 4, 2, 8

SPECS: dict[str, dict[str, Any]] = {
    "plain": {},
    "window": {"window": 19},
    "window of one": {"window": 1},
    "soft cap": {"soft_cap": 2.0},
    "sinks": {"sinks": torch.tensor([-1.0, 0.5, 2.0, 6.0])},
    "all": {"window": 19, "soft_cap": 3.0, "sinks": torch.tensor([-1.0, 0.5, 2.0, 6.0])},
}


class Pages:
    """Rows of cached and new tokens in shuffled pages; unused places hold what would spoil a sum."""

    def __init__(self, rows: list[tuple[int, int]], page_size: int) -> None:
        self.rows, self.page_size = rows, page_size
        self.kv_format: torch.dtype | None = None
        generator = torch.Generator().manual_seed(1)
        counts = [-(-(start + count) // page_size) for start, count in rows]
        order = torch.randperm(sum(counts), generator=generator).tolist()
        self.tables = [[order.pop() for _ in range(count)] for count in counts]
        self.layer = torch.full((sum(counts), page_size, 2, NUM_KV_HEADS, HEAD_DIM), 1e4)
        self.context = [torch.randn(start + count, 2, NUM_KV_HEADS, HEAD_DIM, generator=generator) for start, count in rows]
        self.queries = [torch.randn(count, NUM_HEADS, HEAD_DIM, generator=generator) for _, count in rows]
        for (start, _), table, context in zip(rows, self.tables, self.context, strict=True):
            for position in range(start):
                self.layer[table[position // page_size], position % page_size] = context[position]

    def attend(self, chosen: list[int], spec: AttentionSpec) -> list[torch.Tensor]:
        """Attend with some of the rows in one step, in order: those of one token first."""
        rows = [self.rows[index] for index in chosen]
        num_decode_rows = sum(count == 1 for _, count in rows)
        width = max(len(self.tables[index]) for index in chosen) * 3 // 2 + 4
        tables = torch.tensor([(self.tables[index] * width)[:width] for index in chosen])
        slots = [
            self.tables[index][position // self.page_size] * self.page_size + position % self.page_size
            for index, (start, count) in zip(chosen, rows, strict=True)
            for position in range(start, start + count)
        ]
        none = torch.zeros(0, dtype=torch.int64)
        starts, counts = (torch.tensor(column) for column in zip(*rows, strict=True))
        step = StepTensors(none, none, torch.tensor(slots), starts, counts, tables, num_decode_rows, none)
        attention = TorchCpuAttention(page_size=self.page_size, dtype=torch.float32, kv_format=self.kv_format)
        queries = torch.cat([self.queries[index] for index in chosen])
        keys_values = torch.cat([self.context[index][self.rows[index][0] :] for index in chosen])
        outputs = attention.attend(attention.prepare(step), self.layer.clone(), queries, keys_values, spec)
        return list(outputs.view(-1, NUM_HEADS, HEAD_DIM).split([count for _, count in rows]))

    def expected(self, index: int, spec: AttentionSpec) -> torch.Tensor:
        start, count = self.rows[index]
        outputs = torch.empty(count, NUM_HEADS, HEAD_DIM, dtype=torch.float64)
        for token in range(count):
            end = start + token + 1
            first = 0 if spec.window is None else max(0, end - spec.window)
            for head in range(NUM_HEADS):
                keys, values = self.context[index][first:end, :, head * NUM_KV_HEADS // NUM_HEADS].double().unbind(1)
                scores = keys @ self.queries[index][token, head].double() * spec.scale
                if spec.soft_cap is not None:
                    scores = spec.soft_cap * (scores / spec.soft_cap).tanh()
                weights = scores.exp()
                sink = 0.0 if spec.sinks is None else math.exp(float(spec.sinks[head]))
                outputs[token, head] = weights @ values / (weights.sum() + sink)
        return outputs


ROWS = [(0, 1), (3, 1), (18, 1), (19, 1), (40, 1), (150, 1), (151, 1), (0, 2), (0, 19), (0, 30), (7, 12), (64, 9), (150, 40)]


@pytest.mark.parametrize("page_size", [1, 4, 32])
@pytest.mark.parametrize("name", SPECS)
def test_rows_of_all_lengths_attend_as_defined(name: str, page_size: int) -> None:
    spec = AttentionSpec(0, NUM_HEADS, NUM_KV_HEADS, HEAD_DIM, scale=0.6, **SPECS[name])
    pages = Pages(ROWS, page_size)
    for index, output in enumerate(pages.attend(list(range(len(ROWS))), spec)):
        torch.testing.assert_close(output.double(), pages.expected(index, spec), rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("name", SPECS)
def test_a_row_is_the_same_to_the_last_bit_whatever_stands_beside_it(name: str) -> None:
    spec = AttentionSpec(0, NUM_HEADS, NUM_KV_HEADS, HEAD_DIM, scale=0.6, **SPECS[name])
    pages = Pages(ROWS, 4)
    together = pages.attend(list(range(len(ROWS))), spec)
    for index in range(len(ROWS)):
        assert torch.equal(pages.attend([index], spec)[0], together[index]), ROWS[index]


def to_float8(values: torch.Tensor) -> torch.Tensor:
    return values.to(torch.float8_e4m3fn)


@pytest.mark.parametrize("name", SPECS)
def test_pages_of_8_bits_attend_over_rounded_keys_and_values(name: str) -> None:
    spec = AttentionSpec(0, NUM_HEADS, NUM_KV_HEADS, HEAD_DIM, scale=0.6, **SPECS[name])
    plain, expected = Pages(ROWS, 4), Pages(ROWS, 4)
    expected.context = [to_float8(context).float() for context in plain.context]
    plain.layer = _as_codes(plain.layer, torch.float8_e4m3fn)
    plain.kv_format = torch.float8_e4m3fn
    # New tokens come unrounded, and are rounded before they are stored and attended to.
    for index, output in enumerate(plain.attend(list(range(len(ROWS))), spec)):
        torch.testing.assert_close(output.double(), expected.expected(index, spec), rtol=1e-4, atol=1e-5)


def test_a_chunked_row_over_8_bit_pages_is_the_whole_one() -> None:
    spec = AttentionSpec(0, NUM_HEADS, NUM_KV_HEADS, HEAD_DIM, scale=0.6)
    whole = Pages([(0, 30)], 4)
    whole.kv_format = torch.float8_e4m3fn
    whole.layer = torch.zeros(whole.layer.shape, dtype=torch.uint8)
    (expected,) = whole.attend([0], spec)
    later = Pages([(19, 11)], 4)
    later.kv_format = torch.float8_e4m3fn
    later.context, later.queries = whole.context, [whole.queries[0][19:]]
    later.layer = torch.zeros(later.layer.shape, dtype=torch.uint8)
    for position in range(19):
        codes = to_float8(whole.context[0][position]).view(torch.uint8)
        later.layer[later.tables[0][position // 4], position % 4] = codes
    (found,) = later.attend([0], spec)
    torch.testing.assert_close(found, expected[19:], rtol=1e-5, atol=1e-6)


def test_values_out_of_an_8_bit_type_become_its_largest() -> None:
    codes = _as_codes(torch.tensor([1e6, -1e6, 0.0, 448.0]), torch.float8_e4m3fn)
    assert codes.view(torch.float8_e4m3fn).float().tolist() == [448.0, -448.0, 0.0, 448.0]


def test_what_is_not_finite_is_no_number_in_an_8_bit_type() -> None:
    codes = _as_codes(torch.tensor([math.inf, -math.inf, math.nan, 1.0]), torch.float8_e4m3fn)
    assert codes.view(torch.float8_e4m3fn).float().isnan().tolist() == [True, True, True, False]

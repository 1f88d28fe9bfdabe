"""Goal: rotation, storing and attention over pages are those of `kernels/cpu/reference.py`, and the same bits in any batch.

Bounds: rounding a query, key or attention weight to bfloat16 may go the other way where the kernels' float32 numbers lie at a tie.
Such an element moves an output by up to 2 ** -8 of a value times its weight; they are few, so the mean is held far closer.
"""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import numpy as np
import numpy.typing as npt
import pytest
import torch

from kernels.cpu.library import PAGES_BF16, PAGES_E4M3, aligned_zeros
from kernels.cpu.reference import Attention, attend, round_bfloat16, round_e4m3
from tests.native.programs import Program, Rows

DIFFERENCE_MAX = 2e-2
DIFFERENCE_MEAN = 2e-4
"""Of values that are of order 1."""

PAGE_TYPES = {PAGES_BF16: np.uint16, PAGES_E4M3: np.uint8}

FloatArray = npt.NDArray[np.float32]


@pytest.fixture(params=PAGE_TYPES, ids=["bf16", "e4m3"])
def page_format(request: pytest.FixtureRequest) -> int:
    number: int = request.param
    return number


def expected_of(tokens: FloatArray, layer: Attention, page_format: int) -> npt.NDArray[np.float64]:
    """What the reference gives over pages of a format."""
    return attend(tokens, layer, round_kv=round_e4m3 if page_format == PAGES_E4M3 else round_bfloat16)


def layer_of(random: np.random.Generator, **changes: Any) -> Attention:
    """A layer; `pairs`, `norms` ("heads" or "all") and `has_sinks` make its vectors."""
    pairs, norms, has_sinks = (changes.pop(name, None) for name in ("pairs", "norms", "has_sinks"))
    head_dim = changes.get("head_dim", 32)
    layer = Attention(**{"num_heads": 6, "num_kv_heads": 2, "head_dim": head_dim, "scale": head_dim**-0.5} | changes)
    if pairs:
        angles = np.arange(512)[:, None] * 10.0 ** -np.linspace(0, 4, pairs)
        layer = replace(layer, cos=np.cos(angles).astype(np.float32), sin=np.sin(angles).astype(np.float32))
    if norms:
        sizes = [head_dim, head_dim] if norms == "heads" else [layer.num_heads * head_dim, layer.num_kv_heads * head_dim]
        q_norm, k_norm = ((1 + 0.3 * random.standard_normal(size)).astype(np.float32) for size in sizes)
        layer = replace(layer, q_norm=q_norm, k_norm=k_norm)
    if has_sinks:
        layer = replace(layer, sinks=random.standard_normal(layer.num_heads).astype(np.float32) * 2)
    return layer


class Sequences:
    """Sequences of a layer's inputs, and a program that computes pieces of them over shuffled pages."""

    def __init__(self, library: Any, isa: int, layer: Attention, tokens: list[FloatArray], **options: Any) -> None:
        page_size = options.setdefault("page_size", 16)
        page_type = PAGE_TYPES[options.setdefault("page_format", PAGES_BF16)]
        self.layer = layer
        self._tokens = tokens
        self._page_size = page_size
        only_sampled = options.pop("only_sampled", False)
        self._program = Program(library, isa=isa, **{"max_tokens": 700} | options)
        width = layer.num_heads * layer.head_dim
        out = self._program.attend(self._program.feed(np.concatenate(tokens)), layer, only_sampled=only_sampled)
        self._program.finish(self._program.gather(out, width) if only_sampled else out, width)
        self._offsets = np.cumsum([0, *map(len, tokens)])
        counts = [-(-len(each) // page_size) for each in tokens]
        items = 2 * layer.num_kv_heads * layer.head_dim * page_size
        # Old numbers, but finite ones, as in pages that served other sequences.
        pages = aligned_zeros((sum(counts) + 1) * items, page_type).reshape(-1, items)
        pages[...] = 0x4640 if page_type is np.uint16 else 0x7C
        self._program.set_pages(pages)
        order = iter(np.random.default_rng(len(tokens)).permutation(sum(counts)) + 1)
        width = max(counts)
        self._tables = np.array([([next(order) for _ in range(count)] * width)[:width] for count in counts])
        self.num_computed = [0] * len(tokens)

    def share(self, which: int, of: int, num_tokens: int) -> None:
        """Let a sequence begin with whole pages of another one, which has computed them."""
        assert num_tokens % self._page_size == 0 and num_tokens <= self.num_computed[of]
        self._tables[which, : num_tokens // self._page_size] = self._tables[of, : num_tokens // self._page_size]
        self.num_computed[which] = num_tokens

    def step(self, counts: dict[int, int]) -> dict[int, FloatArray]:
        """Compute the next tokens of some sequences: number by sequence."""
        ids, rows = self._next(counts)
        ends = np.cumsum(rows.row_counts)[:-1]
        return dict(zip(counts, np.split(self._program.run(ids, rows), ends), strict=True))

    def step_sampled(self, counts: dict[int, int], sampled: list[int]) -> FloatArray:
        """Compute the next tokens, of which some are sampled, by their number in the step."""
        ids, rows = self._next(counts)
        return self._program.run(ids, rows, sampled=sampled)

    def _next(self, counts: dict[int, int]) -> tuple[list[int], Rows]:
        ids: list[int] = []
        rows = Rows(page_tables=self._tables[list(counts)])
        for which, count in counts.items():
            start = self.num_computed[which]
            positions = range(start, start + count)
            ids += (self._offsets[which] + np.array(positions)).tolist()
            rows.positions += positions
            rows.slot_mapping += [
                int(self._tables[which, position // self._page_size]) * self._page_size + position % self._page_size
                for position in positions
            ]
            rows.row_starts.append(start)
            rows.row_counts.append(count)
            self.num_computed[which] += count
        return ids, rows


def tokens_of(random: np.random.Generator, layer: Attention, *lengths: int) -> list[FloatArray]:
    return [(random.standard_normal((length, layer.width)) * 1.5).astype(np.float32) for length in lengths]


def assert_near(ours: FloatArray, expected: npt.NDArray[np.float64]) -> None:
    difference = np.abs(ours - expected)
    assert difference.max() <= DIFFERENCE_MAX
    assert difference.mean() <= DIFFERENCE_MEAN


LAYERS: dict[str, dict[str, Any]] = {
    "grouped": {"pairs": 16},
    "multi_head": {"num_heads": 4, "num_kv_heads": 4, "pairs": 16},
    "one_kv_head": {"num_heads": 16, "num_kv_heads": 1, "head_dim": 16, "pairs": 8},
    "no_rotation": {},
    "partial_rotation": {"head_dim": 80, "pairs": 20},
    "odd_pairs": {"head_dim": 48, "pairs": 9},
    "window": {"pairs": 16, "window": 37},
    "window_of_one": {"pairs": 16, "window": 1},
    "wide_window": {"pairs": 16, "window": 140},
    "soft_cap": {"pairs": 16, "soft_cap": 5.0},
    "soft_cap_and_window": {"pairs": 16, "soft_cap": 50.0, "window": 64, "scale": 0.3},
    "sinks": {"pairs": 16, "has_sinks": True},
    "sinks_and_window": {"pairs": 16, "has_sinks": True, "window": 20},
    "norms_per_head": {"pairs": 16, "norms": "heads"},
    "norms_over_all_heads": {"pairs": 16, "norms": "all"},
    "head_dim_16": {"head_dim": 16, "pairs": 8},
    "head_dim_64": {"num_heads": 3, "num_kv_heads": 1, "head_dim": 64, "pairs": 32},
    "head_dim_96": {"num_heads": 2, "num_kv_heads": 1, "head_dim": 96, "pairs": 48},
    "head_dim_256": {"num_heads": 2, "num_kv_heads": 1, "head_dim": 256, "pairs": 128},
}


@pytest.mark.parametrize("name", LAYERS)
def test_prefill_and_decode_attend_as_the_reference(
    library: Any, isa: int, name: str, page_format: int, random: np.random.Generator
) -> None:
    layer = layer_of(random, **LAYERS[name])
    tokens = tokens_of(random, layer, 150, 23)
    sequences = Sequences(library, isa, layer, tokens, page_format=page_format)
    expected = [expected_of(each, layer, page_format) for each in tokens]
    first = sequences.step({1: 20, 0: 131})
    assert_near(first[0], expected[0][:131])
    assert_near(first[1], expected[1][:20])
    second = sequences.step({0: 1, 1: 3})
    assert_near(second[0], expected[0][131:132])
    assert_near(second[1], expected[1][20:])
    assert_near(sequences.step({0: 18})[0], expected[0][132:])


@pytest.mark.parametrize("page_size", [16, 32, 64, 128])
def test_pages_of_any_size_hold_the_same(
    library: Any, isa: int, page_size: int, page_format: int, random: np.random.Generator
) -> None:
    layer = layer_of(random, pairs=16)
    tokens = tokens_of(random, layer, 150, 40, 1)
    results = [
        Sequences(library, isa, layer, tokens, page_size=size, page_format=page_format).step({2: 1, 0: 150, 1: 40})
        for size in (16, page_size)
    ]
    for which, each in enumerate(tokens):
        assert_near(results[1][which], expected_of(each, layer, page_format))
        assert np.array_equal(results[0][which], results[1][which])


@pytest.mark.parametrize("name", ["grouped", "wide_window", "sinks", "one_kv_head"])
def test_chunks_neighbours_and_threads_change_no_bit(
    library: Any, isa: int, name: str, page_format: int, random: np.random.Generator
) -> None:
    """A long row alone is split by chunks among threads; among others it is not."""
    layer = layer_of(random, **LAYERS[name])
    tokens = tokens_of(random, layer, 300, 61, 17, 5, 130, 1, 2)
    whole = [Sequences(library, isa, layer, [each], page_format=page_format).step({0: len(each)})[0] for each in tokens]
    for num_threads in (1, 2, 3):
        alone = Sequences(library, isa, layer, tokens, num_threads=num_threads, page_format=page_format)
        for count in (297, 1, 1, 1):
            first = alone.num_computed[0]
            assert np.array_equal(alone.step({0: count})[0], whole[0][first : first + count])
        together = Sequences(library, isa, layer, tokens, num_threads=num_threads, page_format=page_format)
        together.step({0: 200, 4: 129, 1: 1})
        for counts in ({4: 1, 0: 99, 1: 30, 2: 17, 3: 5}, {0: 1, 1: 30, 5: 1, 6: 2}):
            firsts = dict.fromkeys(counts, 0) | {which: together.num_computed[which] for which in counts}
            for which, out in together.step(counts).items():
                assert np.array_equal(out, whole[which][firsts[which] : firsts[which] + counts[which]]), (num_threads, which)


def family_of(random: np.random.Generator, layer: Attention, shared: dict[int, int], lengths: list[int]) -> list[FloatArray]:
    """Sequences that begin as the first one does, with so many tokens of it."""
    tokens = tokens_of(random, layer, *lengths)
    for which, num_tokens in shared.items():
        tokens[which][:num_tokens] = tokens[0][:num_tokens]
    return tokens


@pytest.mark.parametrize("name", ["grouped", "wide_window", "window", "sinks", "multi_head", "head_dim_64"])
@pytest.mark.parametrize("num_threads", [1, 2])
def test_sequences_that_share_pages_attend_together_to_the_same_bits(
    library: Any, isa: int, name: str, num_threads: int, page_format: int, random: np.random.Generator
) -> None:
    """Their rows read shared pages once. Some share all, some a chunk, some nothing, some have drafts or a prompt left."""
    layer = layer_of(random, **LAYERS[name])
    shared = {1: 384, 2: 384, 3: 128, 4: 256, 6: 384, 7: 384, 9: 16}
    tokens = family_of(random, layer, shared, [400, 395, 391, 300, 505, 390, 402, 384 + 9, 200, 140])
    whole = [Sequences(library, isa, layer, [each], page_format=page_format).step({0: len(each)})[0] for each in tokens]
    together = Sequences(library, isa, layer, tokens, num_threads=num_threads, page_format=page_format, max_tokens=4000)
    together.step({0: 390})
    for which, num_tokens in shared.items():
        together.share(which, 0, num_tokens)
    together.step({3: 100, 4: 240, 5: 380, 8: 190, 9: 120})
    for counts in (
        dict.fromkeys(range(10), 1),
        {6: 2, 0: 1, 3: 1, 7: 2, 2: 2, 9: 1, 8: 1, 1: 1, 4: 1, 5: 1},
        {0: 1, 7: 6, 2: 1, 1: 1, 6: 1, 4: 5},
        dict.fromkeys((4, 2, 0, 1), 1),
    ):
        firsts = {which: together.num_computed[which] for which in counts}
        for which, out in together.step(counts).items():
            assert np.array_equal(out, whole[which][firsts[which] : firsts[which] + counts[which]]), which


@pytest.mark.parametrize("part", ["queries", "values"])
def test_poison_does_not_pass_between_sequences_that_share_pages(
    library: Any, isa: int, part: str, random: np.random.Generator
) -> None:
    layer = layer_of(random, pairs=16)
    tokens = family_of(random, layer, {1: 256, 2: 256, 3: 256}, [270] * 4)
    whole = [Sequences(library, isa, layer, [each]).step({0: 270})[0] for each in tokens]
    width = layer.num_heads * layer.head_dim
    tokens[2][258, slice(0, width) if part == "queries" else slice(-layer.num_kv_heads * layer.head_dim, None)] = np.nan
    together = Sequences(library, isa, layer, tokens)
    together.step({0: 257})
    for which in (1, 2, 3):
        together.share(which, 0, 256)
    together.step(dict.fromkeys((1, 2, 3), 1))
    for _ in range(2):
        firsts = dict(enumerate(together.num_computed))
        for which, out in together.step(dict.fromkeys(range(4), 1)).items():
            is_poisoned = which == 2 and firsts[which] == 258
            assert np.isnan(out).any() if is_poisoned else np.array_equal(out[0], whole[which][firsts[which]])
    after = together.step({2: 1})[2]
    assert np.isnan(after).any() == (part == "values")


@pytest.mark.parametrize("num_threads", [1, 2])
def test_sampled_tokens_alone_are_the_same_bits(library: Any, isa: int, num_threads: int, random: np.random.Generator) -> None:
    """In chunks of prompts, in one token of a long sequence (split by chunks), and beside rows of which none is."""
    layer = layer_of(random, pairs=16)
    tokens = tokens_of(random, layer, 300, 61, 5)
    whole = [Sequences(library, isa, layer, [each]).step({0: len(each)})[0] for each in tokens]
    sequences = Sequences(library, isa, layer, tokens, num_threads=num_threads, only_sampled=True)
    mixed = sequences.step_sampled({0: 200, 1: 60, 2: 5}, [7, 199, 260, 264])
    assert np.array_equal(mixed, np.stack([whole[0][7], whole[0][199], whole[2][0], whole[2][4]]))
    assert sequences.step_sampled({0: 99, 1: 1}, [99]).tolist() == whole[1][60:].tolist()
    assert np.array_equal(sequences.step_sampled({0: 1}, [0])[0], whole[0][299])


@pytest.mark.parametrize("name", ["grouped", "sinks", "window", "soft_cap", "norms_per_head"])
@pytest.mark.parametrize("part", ["queries", "keys", "values"])
def test_poison_ends_in_its_own_sequence(
    library: Any, isa: int, name: str, part: str, page_format: int, random: np.random.Generator
) -> None:
    """From the poisoned token on, as far as its keys are seen; and in no other sequence."""
    layer = layer_of(random, **LAYERS[name])
    tokens = tokens_of(random, layer, 40, 25, 150)
    width, kv_width = layer.num_heads * layer.head_dim, layer.num_kv_heads * layer.head_dim
    start, end = {"queries": (0, width), "keys": (width, width + kv_width), "values": (width + kv_width, layer.width)}[part]
    poisoned = [each.copy() for each in tokens]
    poisoned[0][3:16, start:end] = np.nan
    clean, dirty = (
        Sequences(library, isa, layer, given, page_format=page_format).step({0: 40, 1: 25, 2: 150}) for given in (tokens, poisoned)
    )
    assert np.array_equal(clean[1], dirty[1])
    assert np.array_equal(clean[2], dirty[2])
    assert not np.isfinite(dirty[0][3:16]).all(axis=1).any()
    assert np.isfinite(clean[0]).all()


def test_all_keys_poisoned_is_never_taken_for_none(library: Any, isa: int, page_format: int, random: np.random.Generator) -> None:
    """A sink would make the result finite."""
    layer = layer_of(random, **LAYERS["sinks"])
    tokens = tokens_of(random, layer, 40)
    tokens[0][:16] = np.nan
    assert not np.isfinite(Sequences(library, isa, layer, tokens, page_format=page_format).step({0: 40})[0]).any()


def test_8_bit_pages_of_their_own_numbers_give_the_bits_of_bfloat16(library: Any, isa: int, random: np.random.Generator) -> None:
    """Keys and values of all magnitudes that 8 bits have, so that nothing is rounded: reading is all that differs."""
    layer = layer_of(random, head_dim=80)
    tokens = tokens_of(random, layer, 300, 61, 1)
    width = layer.num_heads * layer.head_dim
    for each in tokens:
        each[:, width:] = round_e4m3(each[:, width:] * 2.0 ** random.integers(-8, 2, each[:, width:].shape))
    sequences = [Sequences(library, isa, layer, tokens, page_format=number, page_size=32) for number in PAGE_TYPES]
    for counts in ({0: 150, 1: 40}, {0: 149, 2: 1}, {0: 1, 1: 21}):
        ours, theirs = (each.step(counts) for each in sequences)
        for which in counts:
            assert np.array_equal(ours[which], theirs[which])


def kept(library: Any, isa: int, values: FloatArray) -> FloatArray:
    """What 8-bit pages give back of `[n, 256]` values: sequences of one token each."""
    layer = Attention(num_heads=1, num_kv_heads=1, head_dim=256, scale=1.0)
    tokens = np.zeros((len(values), 1, layer.width), np.float32)
    tokens[:, 0, 512:] = values
    outputs = Sequences(library, isa, layer, list(tokens), page_format=PAGES_E4M3).step(dict.fromkeys(range(len(values)), 1))
    return np.concatenate(list(outputs.values()))


def test_every_8_bit_number_is_kept(library: Any, isa: int) -> None:
    numbers = torch.arange(256, dtype=torch.uint8).view(torch.float8_e4m3fn).float().numpy()
    assert np.isnan(numbers).sum() == 2
    np.testing.assert_array_equal(kept(library, isa, numbers[None])[0], numbers)


def test_numbers_are_kept_as_torch_rounds_them(library: Any, isa: int, random: np.random.Generator) -> None:
    """Numbers of all magnitudes, all that lie halfway between two of 8 bits, their neighbours, and what is beyond the largest."""
    numbers = torch.arange(127, dtype=torch.uint8).view(torch.float8_e4m3fn).float().numpy()
    ties = ((numbers[1:] + numbers[:-1]) / 2).astype(np.float32)
    given = np.concatenate(
        [
            ties, -ties, np.nextafter(ties, np.float32(0)), np.nextafter(ties, np.float32(1e3)),
            [448, 449, 463, 464, 465, 1e6, -1e6, 3e38, 1e-40, 2**-10, 0.0],
            random.standard_normal(1021) * 10.0 ** random.integers(-4, 4, 1021),
        ]
    ).astype(np.float32).reshape(6, 256)  # fmt: skip
    expected = torch.from_numpy(given).clamp(-448, 448).to(torch.float8_e4m3fn).float().numpy()
    np.testing.assert_array_equal(kept(library, isa, given), expected)
    np.testing.assert_array_equal(round_e4m3(given), expected)


def test_what_is_not_finite_is_no_number_in_8_bit_pages(library: Any, isa: int) -> None:
    """Infinity would become the largest number, and a row that has failed would look well."""
    values = np.ones((4, 256), np.float32)
    values[0, 3], values[1, 255], values[2, 0] = np.inf, -np.inf, np.nan
    assert np.array_equal(np.isnan(kept(library, isa, values)), ~np.isfinite(values))

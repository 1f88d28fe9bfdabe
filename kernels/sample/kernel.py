"""Sampling in Triton: penalties and biases on a list of tokens, and a draw that needs no sort. See README.md."""

from __future__ import annotations

import triton
import triton.language as tl

INFINITY_BITS: tl.constexpr = tl.constexpr(0x7F800000)
"""float32's infinity as an integer: distances of tokens that may be drawn lie below."""


@triton.jit
def sample_adjust_kernel(
    logits_ptr,
    starts_ptr,
    tokens_ptr,
    output_counts_ptr,
    is_seen_ptr,
    biases_ptr,
    repetition_ptr,
    frequency_ptr,
    presence_ptr,
    vocab_size,
    stride_logits_row,
    BLOCK: tl.constexpr,
):
    """Adjust the logits of `BLOCK` entries of one row, in place; grid `[num_rows, blocks of the longest list]`."""
    row = tl.program_id(0).to(tl.int64)
    start = tl.load(starts_ptr + row).to(tl.int64)
    num_entries = tl.load(starts_ptr + row + 1).to(tl.int64) - start
    indices = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    is_entry = indices < num_entries
    tokens = tl.load(tokens_ptr + start + indices, mask=is_entry, other=0)
    is_entry = is_entry & (tokens >= 0) & (tokens < vocab_size)
    counts = tl.load(output_counts_ptr + start + indices, mask=is_entry, other=0).to(tl.float32)
    is_seen = tl.load(is_seen_ptr + start + indices, mask=is_entry, other=0) != 0
    biases = tl.load(biases_ptr + start + indices, mask=is_entry, other=0.0)
    places = logits_ptr + row * stride_logits_row + tokens
    values = tl.load(places, mask=is_entry, other=0.0)
    repetition = tl.load(repetition_ptr + row)
    penalised = tl.where(values > 0, values / repetition, values * repetition)
    values = tl.where(is_seen, penalised, values)
    values = values - tl.load(frequency_ptr + row) * counts
    values = values - tl.where(counts > 0, tl.load(presence_ptr + row), 0.0)
    tl.store(places, values + biases, mask=is_entry)


@triton.jit
def distances(row_ptr, start, vocab_size, maximum, temperature, BLOCK: tl.constexpr):
    """Read a block of logits as `(logit - maximum) / temperature`, at most 0, and the bits of its magnitude.

    Numbers of one sign are ordered as their bits are, so a smaller integer is a likelier token. Past the vocabulary and for
    excluded tokens it is infinity's.
    """
    tokens = start + tl.arange(0, BLOCK)
    logits = tl.load(row_ptr + tokens, mask=tokens < vocab_size, other=float("-inf"))
    scaled = (logits - maximum) / temperature
    return scaled, tl.abs(scaled).to(tl.int32, bitcast=True)


@triton.jit
def survey(row_ptr, vocab_size, BLOCK: tl.constexpr):
    """Find the largest logit, the first token that has it, and how many are NaN or plus infinity.

    Each lane keeps what it has seen, and only at the end are lanes compared: no block waits for the one before.
    """
    offsets = tl.arange(0, BLOCK)
    best = tl.full((BLOCK,), float("-inf"), dtype=tl.float32)
    starts = tl.zeros((BLOCK,), dtype=tl.int32)
    num_bad = tl.zeros((BLOCK,), dtype=tl.int32)
    for start in range(0, vocab_size, BLOCK):
        logits = tl.load(row_ptr + (start + offsets), mask=start + offsets < vocab_size, other=float("-inf"))
        num_bad += ((logits != logits) | (logits == float("inf"))).to(tl.int32)
        is_larger = logits > best
        best = tl.where(is_larger, logits, best)
        starts = tl.where(is_larger, start, starts)
    maximum = tl.max(best, axis=0)
    token = tl.min(tl.where(best == maximum, starts + offsets, vocab_size), axis=0)
    return maximum, token, tl.sum(num_bad, axis=0)


@triton.jit
def near_enough(row_ptr, vocab_size, maximum, temperature, k, share, BLOCK: tl.constexpr):
    """Find a distance, as bits, within which `k` tokens and a share of the mass lie: the smallest of eight; the last is all.

    Returns:
        The distance, how many tokens lie within it, and the mass of all tokens.
    """
    ways = tl.arange(0, 8)
    # 0.5, 0.84, 1.4, 2.4, 4, 6.7, 11.3: a text's next token mostly has all that matters within the fifth or sixth.
    ends = tl.exp2(0.75 * ways.to(tl.float32) - 1.0).to(tl.int32, bitcast=True)
    ends = tl.where(ways == 7, INFINITY_BITS - 1, ends)
    counts = tl.zeros((8,), dtype=tl.int32)
    masses = tl.zeros((8,), dtype=tl.float64)
    for start in range(0, vocab_size, BLOCK):
        scaled, bits = distances(row_ptr, start, vocab_size, maximum, temperature, BLOCK)
        is_within = bits[:, None] <= ends[None, :]
        counts += tl.sum(is_within.to(tl.int32), axis=0)
        masses += tl.sum(tl.where(is_within, tl.exp(scaled)[:, None], 0.0), axis=0).to(tl.float64)
    whole = tl.max(masses, axis=0)
    is_enough = (counts >= k) & (masses >= share.to(tl.float64) * whole)
    way = tl.min(tl.where(is_enough, ways, 7), axis=0)
    return tl.sum(tl.where(ways == way, ends, 0), axis=0), tl.sum(tl.where(ways == way, counts, 0), axis=0), whole


@triton.jit
def gather_near(near_logits_ptr, near_tokens_ptr, row_ptr, vocab_size, maximum, temperature, near, BLOCK: tl.constexpr):
    """List the tokens within a distance, and their logits, in order of ids."""
    num_found = near * 0
    for start in range(0, vocab_size, BLOCK):
        _, bits = distances(row_ptr, start, vocab_size, maximum, temperature, BLOCK)
        is_near = bits <= near
        num_here = tl.sum(is_near.to(tl.int32), axis=0)
        if num_here > 0:
            tokens = start + tl.arange(0, BLOCK)
            places = num_found + tl.cumsum(is_near.to(tl.int32), axis=0) - 1
            tl.store(near_logits_ptr + places, tl.load(row_ptr + tokens, mask=is_near), mask=is_near)
            tl.store(near_tokens_ptr + places, tokens, mask=is_near)
        num_found += num_here
    # What one thread has stored others read.
    tl.debug_barrier()


@triton.jit
def thresholds(low, shift, WAYS: tl.constexpr):
    """Cut the range from `low` on into pieces of `2 ** shift`; gives the last integer of each, `[WAYS]`."""
    ends = low.to(tl.int64) + ((tl.arange(0, WAYS).to(tl.int64) + 1) << shift) - 1
    return tl.minimum(ends, 0x7FFFFFFF).to(tl.int32)


@triton.jit
def distance_of_kth(row_ptr, vocab_size, maximum, temperature, k, BITS: tl.constexpr, BLOCK: tl.constexpr):
    """Find the smallest distance within which `k` tokens lie, as bits, `BITS` of them a pass over the row."""
    low = k * 0
    for step in range((31 + BITS - 1) // BITS):
        shift = ((31 + BITS - 1) // BITS - 1 - step) * BITS
        ends = thresholds(low, shift, 1 << BITS)
        counts = tl.zeros((1 << BITS,), dtype=tl.int32)
        for start in range(0, vocab_size, BLOCK):
            _, bits = distances(row_ptr, start, vocab_size, maximum, temperature, BLOCK)
            is_token = start + tl.arange(0, BLOCK) < vocab_size
            is_within = (bits[:, None] <= ends[None, :]) & is_token[:, None]
            counts += tl.sum(is_within.to(tl.int32), axis=0)
        low += tl.sum((counts < k).to(tl.int32), axis=0) << shift
    return low


@triton.jit
def distance_of_mass(row_ptr, vocab_size, maximum, temperature, wanted, limit, BITS: tl.constexpr, BLOCK: tl.constexpr):
    """Find the smallest distance within which a mass lies, of tokens within `limit`, as bits, `BITS` of them a pass."""
    low = limit * 0
    for step in range((31 + BITS - 1) // BITS):
        shift = ((31 + BITS - 1) // BITS - 1 - step) * BITS
        ends = thresholds(low, shift, 1 << BITS)
        masses = tl.zeros((1 << BITS,), dtype=tl.float64)
        for start in range(0, vocab_size, BLOCK):
            scaled, bits = distances(row_ptr, start, vocab_size, maximum, temperature, BLOCK)
            weights = tl.where(bits <= limit, tl.exp(scaled), 0.0)
            masses += tl.sum(tl.where(bits[:, None] <= ends[None, :], weights[:, None], 0.0), axis=0).to(tl.float64)
        # Of the last piece nothing is asked: what was not reached before it is reached in it. Nor of pieces that end where it does,
        # at the largest integer: they hold the whole mass too, but summed another way, which may fall a last bit short of it.
        is_asked = ends < tl.max(ends, axis=0)
        is_short = (masses < wanted) & is_asked
        low += tl.sum(is_short.to(tl.int32), axis=0) << shift
    return low


@triton.jit
def mass_within(row_ptr, vocab_size, maximum, temperature, limit, BLOCK: tl.constexpr):
    """Sum the weights of tokens within a distance: float32 within a block, float64 over blocks."""
    total = tl.zeros((), dtype=tl.float64)
    for start in range(0, vocab_size, BLOCK):
        scaled, bits = distances(row_ptr, start, vocab_size, maximum, temperature, BLOCK)
        total += tl.sum(tl.where(bits <= limit, tl.exp(scaled), 0.0), axis=0).to(tl.float64)
    return total


@triton.jit
def uniform(seed, position):
    """Draw a float64 in [0, 1) by seed and position alone: Philox4x32-10, the upper 52 bits of its first two words."""
    position = position.to(tl.uint64, bitcast=True)
    low = (position & 0xFFFFFFFF).to(tl.uint32)
    high = (position >> 32).to(tl.uint32)
    zero = low * 0
    word_0, word_1, _, _ = tl.philox(seed.to(tl.uint64, bitcast=True), low, high, zero, zero)
    bits = ((word_1.to(tl.uint64) << 32) | word_0.to(tl.uint64)) >> 12
    return bits.to(tl.float64) * 2.220446049250313e-16


@triton.jit
def draw(row_ptr, vocab_size, maximum, temperature, limit, number, NUM_BLOCKS: tl.constexpr, BLOCK: tl.constexpr):
    """Give the first token, in order, at which the mass within `limit` goes past `number` of the whole, all in float64."""
    blocks = tl.arange(0, NUM_BLOCKS)
    masses = tl.zeros((NUM_BLOCKS,), dtype=tl.float64)
    for start in range(0, vocab_size, BLOCK):
        scaled, bits = distances(row_ptr, start, vocab_size, maximum, temperature, BLOCK)
        mass = tl.sum(tl.where(bits <= limit, tl.exp(scaled), 0.0).to(tl.float64), axis=0)
        masses = tl.where(blocks == start // BLOCK, mass, masses)
    up_to = tl.cumsum(masses, axis=0)
    target = number * tl.max(up_to, axis=0)
    # A running sum may end a last bit below the sum: then it is the last block, and its last token, of any weight.
    first = tl.min(tl.where((up_to > target) & (masses > 0.0), blocks, NUM_BLOCKS), axis=0)
    block = tl.minimum(first, tl.max(tl.where(masses > 0.0, blocks, 0), axis=0))
    before = tl.sum(tl.where(blocks < block, masses, 0.0), axis=0)
    offsets = tl.arange(0, BLOCK)
    scaled, bits = distances(row_ptr, block * BLOCK, vocab_size, maximum, temperature, BLOCK)
    weights = tl.where(bits <= limit, tl.exp(scaled), 0.0).to(tl.float64)
    is_past = (before + tl.cumsum(weights, axis=0) > target) & (weights > 0.0)
    first = tl.min(tl.where(is_past, offsets, BLOCK), axis=0)
    last = tl.max(tl.where(weights > 0.0, offsets, 0), axis=0)
    return block * BLOCK + tl.minimum(first, last)


@triton.jit(do_not_specialize_on_alignment=["seeds_ptr", "positions_ptr"])
def sample_draw_kernel(
    tokens_ptr,
    is_valid_ptr,
    logits_ptr,
    temperature_ptr,
    top_k_ptr,
    top_p_ptr,
    min_p_ptr,
    seeds_ptr,
    positions_ptr,
    near_logits_ptr,
    near_tokens_ptr,
    vocab_size,
    stride_logits_row,
    NEAR: tl.constexpr,
    BITS: tl.constexpr,
    NUM_BLOCKS: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """Choose one row's token; grid `[num_rows]`. What a row does not ask for is not computed.

    Where top-k or top-p leave `NEAR` tokens or fewer, and mostly they do, these are listed in `near_*: [num_rows, NEAR]`, and only
    the list is looked at.
    """
    row = tl.program_id(0).to(tl.int64)
    row_ptr = logits_ptr + row * stride_logits_row
    maximum, token, num_bad = survey(row_ptr, vocab_size, BLOCK)
    is_valid = (num_bad == 0) & (maximum > float("-inf"))
    tl.store(is_valid_ptr + row, is_valid.to(tl.uint8))
    temperature = tl.load(temperature_ptr + row)
    if is_valid & (temperature > 0.0):
        limit = tl.full((), INFINITY_BITS - 1, dtype=tl.int32)
        top_k, top_p, min_p = tl.load(top_k_ptr + row), tl.load(top_p_ptr + row), tl.load(min_p_ptr + row)
        has_top_k = (top_k > 0) & (top_k < vocab_size)
        near_logits_ptr += row * NEAR
        near_tokens_ptr += row * NEAR
        size = vocab_size
        mass = tl.zeros((), dtype=tl.float64)
        if has_top_k | (top_p < 1.0):
            # The mass that top-p takes its share of is what top-k has left.
            k, share = tl.where(has_top_k, top_k, 0), tl.where(has_top_k, 0.0, top_p)
            near, num_near, mass = near_enough(row_ptr, vocab_size, maximum, temperature, k, share, BLOCK)
            if num_near <= NEAR:
                gather_near(near_logits_ptr, near_tokens_ptr, row_ptr, vocab_size, maximum, temperature, near, BLOCK)
                row_ptr = near_logits_ptr
                size = num_near
        is_listed = size < vocab_size
        if has_top_k:
            k = tl.minimum(top_k, size)
            limit = tl.minimum(limit, distance_of_kth(row_ptr, size, maximum, temperature, k, BITS, BLOCK))
            mass = mass_within(row_ptr, size, maximum, temperature, limit, BLOCK)
        if top_p < 1.0:
            wanted = top_p.to(tl.float64) * mass
            limit = tl.minimum(limit, distance_of_mass(row_ptr, size, maximum, temperature, wanted, limit, BITS, BLOCK))
        if min_p > 0.0:
            limit = tl.minimum(limit, tl.abs(tl.log(min_p)).to(tl.int32, bitcast=True))
        number = uniform(tl.load(seeds_ptr + row), tl.load(positions_ptr + row))
        token = draw(row_ptr, size, maximum, temperature, limit, number, NUM_BLOCKS, BLOCK)
        if is_listed:
            token = tl.load(near_tokens_ptr + token)
    tl.store(tokens_ptr + row, tl.where(is_valid, token, 0).to(tl.int64))
